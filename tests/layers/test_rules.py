"""Small rules by which layers are found, at their borders."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.layers import find_layers
from conservtl.layers.copying import deep_copy
from conservtl.layers.find import _common, _host
from conservtl.layers.first_use import _is_integer, _names_scores, calls
from conservtl.layers.head import _beside, _sizes
from conservtl.layers.info import Layer, layer_of
from conservtl.layers.plain import behind, replace_module
from conservtl.layers.units import Unit, _has_weight, is_adapted, is_norm


def holder(kind, *shapes, base=nn.Module):
    """A module of a class of this name with parameters of these shapes."""
    module = type(kind, (base,), {})()
    for number, shape in enumerate(shapes):
        module.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))
    return module


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (nn.LayerNorm(4), True),
        (nn.BatchNorm1d(4, affine=False), True),
        (holder("FrozenNorm", (8,), (1, 8, 1)), True),
        (holder("ChannelNORM", (8,)), True),
        (holder("NormalisedLinear", (8, 4)), False),
        (holder("Scale", (8,)), False),
    ],
)
def test_norms(module, norm):
    assert is_norm(module) == norm


@pytest.mark.parametrize(
    ("leaf", "weight"),
    [
        (nn.Linear(3, 1), True),
        (nn.Conv2d(1, 1, 1), True),
        (nn.Embedding(1, 4), True),
        (nn.LayerNorm((3, 4)), False),
        (holder("Token", (1, 1, 8)), False),
        (holder("Table", (1, 8)), True),
        (holder("Map", (2, 5, 8)), True),
        (holder("Scale", (8,)), False),
        (holder("PositionalEncoding", (5, 8)), False),
        (holder("PosEmbed", (5, 8)), False),
        (holder("Composite", (5, 8)), True),
        (holder("Decomposition", (5, 8)), True),
        (holder("RelPositionBias", (5, 8)), False),
        (type("PositionTable", (nn.Embedding,), {})(3, 4), True),
        (type("PositionMap", (nn.Linear,), {})(3, 4), True),
    ],
)
def test_leaves_that_are_layers(leaf, weight):
    assert _has_weight(leaf) == weight


@pytest.mark.parametrize(
    ("children", "adapted"),
    [
        ({"base_layer"}, True),
        ({"original_module", "modules_to_save"}, True),
        ({"original_module"}, False),
        ({"modules_to_save", "lora_A"}, False),
        (set(), False),
    ],
)
def test_weights_with_an_adapter(children, adapted):
    module = nn.Module()
    for name in children:
        module.add_module(name, nn.Linear(1, 1))
    assert is_adapted(module) == adapted


def unit(parent, kind="weight"):
    return Unit(f"{parent}.x", parent, kind, (), ())


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("a.b", "a.c", 1),
        ("a.b", "a.b", 2),
        ("a", "a.b", 1),
        ("a.b", "a", 1),
        ("", "a", 0),
        ("", "", 1),
        ("b.a", "a", 0),
    ],
)
def test_containers_that_two_units_share(one, other, shared):
    assert _common(unit(one), unit(other)) == shared


@pytest.mark.parametrize(
    ("kinds", "parents", "host"),
    [
        (("weight", "extra", "weight"), ("a", "a", "a"), 0),  # as near: the one before
        (("weight", "extra", "weight"), ("a", "b", "b"), 2),
        (("block", "extra", "weight"), ("a", "a", "a"), 2),
        (("weight", "extra", "block"), ("a", "b", "b"), 0),
        (("block", "extra", "block"), ("a", "a", "b"), 0),
        (("block", "extra", "block"), ("a", "b", "b"), 2),
        (("block", "extra", "block"), ("a", "c", "b"), 2),  # as near to both towers
        (("weight", "extra"), ("a", "a"), 0),
        (("extra", "block"), ("a", "a"), 1),
    ],
)
def test_the_layer_that_an_extra_joins(kinds, parents, host):
    ordered = [unit(parent, kind) for kind, parent in zip(kinds, parents, strict=True)]
    place = kinds.index("extra")
    before = place - 1 if place else None
    after = place + 1 if place + 1 < len(kinds) else None
    assert _host(ordered[place], ordered, before, after) == host


@pytest.mark.parametrize(
    ("size", "final", "beside"),
    [((4, 3), (4, 2), True), ((4, 1), (4, 2), False), ((4, 4), (4, 2), False), ((5, 3), (4, 2), False)],
)
def test_two_maps_of_one_input(size, final, beside):
    assert _beside(size, final) == beside


def test_sizes_of_maps():
    modules = nn.Linear(3, 4), nn.Conv2d(5, 6, 1, groups=1), nn.ConvTranspose1d(7, 8, 1), nn.Embedding(9, 10)
    assert list(map(_sizes, modules)) == [(3, 4), (5, 6), (7, 8), None]


def test_the_layer_of_a_module():
    layers = [Layer("a", (), ("a.b", "c")), Layer("d", (), ("d",))]
    found = {name: layer_of(layers, name) for name in ("a.b", "a.b.x.y", "c", "d.e", "a", "", "x")}
    assert {name: layer and layer.name for name, layer in found.items()} == {
        "a.b": "a", "a.b.x.y": "a", "c": "a", "d.e": "d", "a": None, "": None, "x": None
    }  # fmt: skip
    assert layer_of([Layer("all", (), ("",))], "x").name == "all"


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ({"logits": 1}, True),
        ({"out": 1, "aux": 2}, True),
        ({"features": 1}, False),
        (SimpleNamespace(logits=1), True),
        (SimpleNamespace(states=1), False),
        ((1, 2), False),
    ],
)
def test_outputs_that_are_named_as_scores(result, named):
    assert _names_scores(result) == named
    tensor = torch.zeros(1)
    tensor.logits = 1
    assert not _names_scores(tensor)


def test_integers_are_numbers_that_count():
    kinds = (torch.int64, torch.uint8, torch.bool, torch.float16, torch.complex64)
    assert [_is_integer(torch.zeros(1, dtype=one)) for one in kinds] == [True, True, False, False, False]


class Pair(NamedTuple):
    one: int
    two: int


@pytest.mark.parametrize(
    ("example", "ways"),
    [
        ({"x": 1}, [((), {"x": 1}), (({"x": 1},), {})]),
        ({1: 1}, [(({1: 1},), {})]),
        ((1, 2), [((1, 2), {}), (((1, 2),), {}), ((1,), {})]),
        ([], [((), {}), (([],), {})]),
        (Pair(1, 2), [((Pair(1, 2),), {})]),
        (1, [((1,), {})]),
    ],
)
def test_ways_to_call_a_model_with_an_example(example, ways):
    assert [call(lambda *args, **kwargs: (args, kwargs)) for call in calls(example)] == ways


class Sums(nn.Module):
    def forward(self, x, y=2.0, *rest, z=3.0, **more):
        return x + y * z


def test_a_module_in_front_of_a_model_with_further_arguments():
    model = behind(nn.Threshold(0.0, 10.0), "first", Sums())
    x = torch.tensor([-1.0, 1.0])
    assert model(x).tolist() == [16.0, 7.0]
    assert model(x, 1.0, z=5.0).tolist() == [15.0, 6.0]


def test_a_module_is_replaced_wherever_it_is_held():
    old, new = nn.Linear(1, 1), nn.Identity()
    inner = nn.Sequential(old)
    model = nn.ModuleDict({"a": old, "b": inner, "c": nn.ReLU()})
    assert replace_module(model, old, new) is model
    assert (model["a"], model["b"][0]) == (new, new)
    assert isinstance(model["c"], nn.ReLU)
    assert replace_module(old, old, new) is new
    around = nn.Sequential(inner)  # the new module holds the old one
    assert replace_module(nn.Sequential(inner), inner, around)[0][0] is inner


@pytest.mark.parametrize(("depth", "copied"), [(1, True), (3, True), (4, False)])
def test_models_in_an_objects_attributes(depth, copied):
    """A lock is shared with the copy if the model that holds it is found."""
    model = nn.Linear(1, 1)
    model.lock = threading.Lock()
    original = model
    for _ in range(depth):
        original = SimpleNamespace(inner=original)
    if not copied:
        with pytest.raises(TypeError, match="lock"):
            deep_copy(original)
        return
    copy = deep_copy(original)
    for _ in range(depth):
        copy = copy.inner
    assert copy is not model
    assert copy.lock is model.lock


@pytest.mark.parametrize(
    ("count", "said"),
    [(2, "0.weight, 0.bias, 1.weight, 1.bias. Add"), (3, "0.bias, 1.weight, 1.bias, 2.weight and 1 more")],
)
def test_parameters_that_no_glob_matches_are_named_up_to_five(count, said):
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(count)), nn.LayerNorm(1))
    with pytest.raises(ctl.SelectorError, match=f"none of .* matches .*{said}"):
        find_layers(model, layers=[str(count)])
