"""Classes put over a module's own: in place, once, and taken off again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.layers.extended import ExtendedModule, extend_module, extended_modules, own_class, restore_module


class Shifted(ExtendedModule):
    kind = "shifted"
    settings = ("shift",)

    def forward(self, x):
        return super().forward(x) + self.shift


class Doubled(ExtendedModule):
    kind = "doubled"

    def forward(self, x):
        return 2 * super().forward(x)


def shifted(shift=1.0):
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    extend_module(module, Shifted, shift=shift)
    return module


def test_it_computes_otherwise_and_is_what_it_was():
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    plain, weight = module(x), module.weight
    extend_module(module, Shifted, shift=1.0)
    assert torch.equal(module(x), plain + 1)
    assert isinstance(module, nn.Linear)
    assert module.weight is weight
    assert own_class(module) is nn.Linear
    restore_module(module)
    assert type(module) is own_class(module) is nn.Linear
    assert torch.equal(module(x), plain)
    assert "shift" not in vars(module)


def test_a_second_time_sets_it_anew():
    module = shifted(1.0)
    before = module(torch.zeros(1, 2))
    cls = type(module)
    extend_module(module, Shifted, shift=3.0)
    assert type(module) is cls is type(shifted())
    torch.testing.assert_close(module(torch.zeros(1, 2)), before + 2)


def test_another_extension_is_refused():
    with pytest.raises(ctl.SpecError, match="Linear is extended by Shifted and cannot be extended by Doubled too"):
        extend_module(shifted(), Doubled)


def test_a_module_that_is_not_extended_stays_as_it_is():
    module = nn.Linear(2, 2)
    restore_module(module)
    assert type(module) is own_class(module) is nn.Linear


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles(protocol):
    module, x = shifted(2.0), torch.ones(1, 2)
    for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module, protocol))):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))
        restore_module(twin)
        torch.testing.assert_close(twin(x), module(x) - 2)
    assert isinstance(module, ExtendedModule)


def test_a_class_with_a_state_of_its_own_keeps_it():
    """As a module that leaves a buffer out of its pickle."""
    module = Stateful(2, 2)
    extend_module(module, Shifted, shift=1.0)
    twin = pickle.loads(pickle.dumps(module))
    assert (twin.note, twin.shift) == ("restored", 1.0)


class Stateful(nn.Linear):
    note = "made"

    def __getstate__(self):
        return vars(self).copy()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.note = "restored"


def test_names_are_canonical():
    model = nn.Sequential(nn.Flatten(), shifted())
    assert list(extended_modules(torch.compile(model, backend="eager"))) == ["1"]
