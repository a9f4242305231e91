"""The layers of published architectures: each as its expected file has it, and by the laws of a division."""

from __future__ import annotations

from collections import Counter

import maps
import pytest

from conservtl.layers import find_layers
from conservtl.layers.first_use import first_use


def architectures():
    return [pytest.param(n, marks=pytest.mark.slow if n in maps.LARGE else ()) for n in maps.ARCHITECTURES]


@pytest.mark.filterwarnings("ignore")  # of the libraries, about deprecated arguments
@pytest.mark.parametrize("name", architectures())
def test_map(name):
    pytest.importorskip(name.partition(".")[0])
    model, example = maps.build(name)
    found = find_layers(model, example)
    assert maps.table(found) == maps.file(name).read_text()
    held = Counter(info.name for layer in found for info in layer.parameters)
    assert held == Counter(name for name, _ in model.named_parameters())
    used = first_use(model, example)
    firsts = [min(ranks) for layer in found if (ranks := [used[i.name] for i in layer.parameters if i.name in used])]
    assert firsts == sorted(firsts)
    marked = {info.head or info.candidate for layer in found for info in layer.parameters} - {None}
    assert marked, "a head, or modules that may be it"


def test_every_expected_file_has_its_architecture():
    assert {path.name for path in maps.file("").parent.glob("*.txt")} == {maps.file(n).name for n in maps.ARCHITECTURES}


def test_the_quick_ones_hold_every_family():
    assert maps.ARCHITECTURES.keys() >= maps.LARGE
    quick = [name.lower() for name in maps.ARCHITECTURES if name not in maps.LARGE]
    assert len(quick) >= 60
    assert not [family for family in maps.FAMILIES if not any(family in name for name in quick)]
