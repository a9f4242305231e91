"""Headers of saved models from strangers: any change of a field reads or is refused in one message."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import conservtl as ctl

JUNK = [
    *(None, True, -1, 1e308, "x", "", [], {}, [1], ["a"], {"a": 1}, [[]], [None]),
    *(
        {"kind": "nope"},
        [{"kind": "nope"}],
        [{"kind": 7}],
        [{"kind": "lhuc", "on": 7}],
        [{"kind": "instance_statistics"}],
    ),
    *([10**18], [-1], [0, 10**18], {"values": "x"}, {"values": [[1], [2, 3]]}, {"values": [10**30]}),
]


class Recurrent(nn.Module):
    """A network whose additions cannot be merged, so that the header describes them."""

    def __init__(self):
        super().__init__()
        self.body = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tensors of a saved model, its header, and where it is kept in the file."""
    adaptation = ctl.adapt(Recurrent(), Recurrent(), [ctl.LHUC()], example=torch.zeros(1, 5, 3))
    folder = ctl.save(adaptation, tmp_path_factory.mktemp("saved") / "out", ["no", "yes"], preprocessing={"rate": 8000})
    with safe_open(folder / "model.safetensors", "pt") as file:
        ((key, text),) = file.metadata().items()
    return load_file(folder / "model.safetensors"), json.loads(text), key


def places(value, at=()):
    """Yield the place of each value in a header."""
    if at:
        yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed(header, at, **to):
    """Return a header with another value at a place, or without it."""
    header = copy.deepcopy(header)
    part = header
    for key in at[:-1]:
        part = part[key]
    if to:
        part[at[-1]] = to["value"]
    else:
        del part[at[-1]]
    return header


def ends(saved, header, folder):
    """Return how adapting from a file with a header and loading it end: read or refused."""
    tensors, _, key = saved
    save_file(tensors, folder / "model.safetensors", metadata={key: json.dumps(header)})
    found = []
    for read in (
        lambda: ctl.adapt(Recurrent(), folder / "model.safetensors", example=torch.zeros(1, 5, 3)),
        lambda: ctl.load_adapted(folder, Recurrent),
    ):
        try:
            read()
            found.append("read")
        except ctl.ConservtlError as error:
            found.append("refused" if len(str(error)) < 2000 else "a message too long")
    return found


@pytest.mark.filterwarnings("ignore")
def test_each_field_with_junk_or_left_out(saved, tmp_path):
    """A sixth of all junk at each place, another sixth at the next."""
    header, found = saved[1], []
    for number, at in enumerate(places(header)):
        found += ends(saved, changed(header, at), tmp_path)
        for value in JUNK[number % 6 :: 6]:
            found += ends(saved, changed(header, at, value=value), tmp_path)
    assert set(found) == {"read", "refused"}


@pytest.mark.parametrize("extension", [{"kind": "nope"}, {"kind": "instance_statistics", "share": "much"}])
def test_an_extension_that_is_none_is_named(saved, tmp_path, extension):
    tensors, header, key = saved
    header = changed(header, ("extended", "extensions"), value=[extension])
    save_file(tensors, tmp_path / "model.safetensors", metadata={key: json.dumps(header)})
    with pytest.raises(ctl.SourceError, match=r"header must describe its extensions; 0.*The file is damaged"):
        ctl.adapt(Recurrent(), tmp_path / "model.safetensors", example=torch.zeros(1, 5, 3))


def test_additions_without_a_list_of_layers_are_found_as_by_default(saved, tmp_path):
    header = saved[1]
    assert ends(saved, changed(header, ("extended", "layers")), tmp_path) == ends(saved, header, tmp_path)
