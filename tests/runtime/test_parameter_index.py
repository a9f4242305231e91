"""Changes of an optimizer's parameters that the lookup notices, shards included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conservtl.runtime.parameter_index import ParameterIndex

dist = torch.distributed


def index_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ParameterIndex(optimizer, SimpleNamespace(revision=0, frozen=frozenset())), optimizer


def grown(index):
    """Whether the places have changed since they were looked at last."""
    before = index.places
    with index:
        pass
    assert index.places in (before, before + 1)
    return index.places > before


def test_memory_groups_and_parameters_are_places_and_training_is_none():
    model = nn.Linear(2, 2)
    index, optimizer = index_of(model)
    assert [grown(index), grown(index)] == [True, False]
    model.weight.data = model.weight.data.clone()
    assert [grown(index), grown(index)] == [True, False]
    model.weight.requires_grad_(False)
    assert not grown(index)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(0))]})
    assert [grown(index), grown(index)] == [True, False]


def test_no_changes_are_looked_for_in_a_block_and_a_block_inside_it():
    model = nn.Linear(2, 2)
    index, optimizer = index_of(model)
    added = {"params": [nn.Parameter(torch.zeros(1))]}
    with index:
        with index:
            pass
        optimizer.add_param_group(added)
        index.frozen()
        assert index.places == 1
    index.frozen()
    assert index.places == 2


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_memory_of_a_shard(tmp_path):
    """A shard hides its place: that of this process's part counts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.zeros(3), init_device_mesh("cpu", (1,))))
        index, _ = index_of(model)
        assert [grown(index), grown(index)] == [True, False]
        model.weight._local_tensor = torch.ones(3)
        assert [grown(index), grown(index)] == [True, False]
    finally:
        dist.destroy_process_group()
