"""The source model's outputs are computed once where they are the same in every epoch, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import conservtl as ctl
from conservtl.adaptation.origin import Origin

EPOCHS = 3
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _unfrozen(monkeypatch):
    """Make the generator anew: what was there when tests were collected is frozen, and hidden from ``gc``."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


class Source(nn.Module):
    """Counts the examples that it is run on."""

    def __init__(self, change):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.change, self.seen = change, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.head(self.change(self.body(x).tanh(), self.training))


def layerdrop(x, training):
    """Draws in eval mode too, to no effect, as layerdrop of Hugging Face models does."""
    return 2 * x if torch.rand(()) < 0.5 and training else x


CHANGES = {
    "none": (lambda x, _: x, True),
    "dropout": (lambda x, training: F.dropout(x, 0.5, training), True),
    "layerdrop": (layerdrop, True),
    "dropout in eval mode": (lambda x, _: F.dropout(x, 0.5), False),
    "NumPy's": (lambda x, _: x + 1e-3 * RNG.random(), False),
}


@pytest.mark.parametrize(("change", "kept"), CHANGES.values(), ids=CHANGES)
def test_is_run_once_for_each_example_unless_its_outputs_are_random(change, kept, monkeypatch):
    torch.manual_seed(0)
    model, source = Source(change), Source(change)
    built = []
    kept_source = Origin.__init__

    def note(self, *args, **options):
        kept_source(self, *args, **options)
        built.append(self.source_model)

    monkeypatch.setattr(Origin, "__init__", note)
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation()])
    built[-1].seen = []
    data = torch.randn(40, 4), torch.randint(3, (40,))
    ctl.fit(adaptation, data, training=ctl.Training(device="cpu", epochs=EPOCHS, batch_size=8, lr=1e-3), seed=1)
    runs = sum(built[-1].seen) / 40
    assert runs <= 2 if kept else runs >= EPOCHS
