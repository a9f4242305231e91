"""Small rules of methods, at their borders."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.methods.base import Order
from conservtl.methods.feature_conservation.distance import ldifs
from conservtl.methods.feature_extraction.probe_head import depth_of
from conservtl.methods.input_transform.affine import _close, _pads_with_zeros
from conservtl.methods.lhuc.hidden_units import channel_dim, is_recurrent, unit_count
from conservtl.methods.lora.factors import _fault, _has_rank


def test_the_order_of_application():
    assert [one.name for one in sorted(Order)] == ["ORIGIN", "HEAD", "STRENGTH", "TIME"]
    assert len(set(map(int, Order))) == 4


@pytest.mark.parametrize(
    ("module", "largest"),
    [(nn.Linear(3, 4), 3), (nn.Linear(4, 3), 3), (nn.Conv2d(1, 8, 3), 8), (nn.Conv1d(1, 8, 5), 5)],
)
def test_a_product_has_no_higher_rank_than_its_weight(module, largest):
    assert [_has_rank(module, rank) for rank in (1, largest, largest + 1)] == [True, True, False]


@pytest.mark.parametrize(
    ("module", "holders", "fault"),
    [
        (nn.Linear(2, 2), 1, None),
        (nn.Conv3d(2, 2, 1), 1, None),
        (nn.Conv2d(2, 2, 1, groups=2), 1, "is a convolution in groups"),
        (nn.Linear(2, 2), 2, "shares its weight with another module"),
        (nn.Embedding(2, 2), 1, "is a Embedding"),
        (nn.ConvTranspose1d(2, 2, 1), 1, "is a ConvTranspose1d"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 1, "has a parametrised weight"),
    ],
)
def test_weights_that_a_product_of_low_rank_can_change(module, holders, fault):
    counts = Counter({id(parameter): holders for parameter in module.parameters()})
    assert _fault(module, counts) == fault


def test_a_weight_of_integers_is_named_by_its_type():
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert _fault(module, Counter({id(module.weight): 1})) == "has a weight of int8"


@pytest.mark.parametrize(
    ("module", "zeros"),
    [
        (nn.Linear(2, 2), False),
        (nn.Conv1d(2, 2, 3), False),
        (nn.Conv1d(2, 2, 3, padding=1), True),
        (nn.Conv2d(2, 2, 3, padding=(0, 1)), True),
        (nn.Conv1d(2, 2, 3, padding="same"), True),
        (nn.Conv1d(2, 2, 1, padding="same"), False),
        (nn.Conv2d(2, 2, (1, 2), padding="same"), True),
        (nn.Conv1d(2, 2, 3, padding="valid"), False),
        (nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), False),
    ],
)
def test_modules_that_pad_with_zeros(module, zeros):
    assert _pads_with_zeros(module) == zeros


@pytest.mark.parametrize(
    ("other", "close"),
    [
        ([[2.0, 1.0], []], True),
        ([[2.0, 1.0019], []], True),
        ([[2.0, 1.0021], []], False),  # beyond a thousandth of the largest
        ([[2.0, float("nan")], []], False),
        ([[2.0, 1.0]], False),
        (None, False),
    ],
)
def test_outputs_that_are_equal_but_for_rounding(other, close):
    given = [torch.tensor([2.0, 1.0]), torch.tensor([])]
    assert _close(given, other and [torch.tensor(one) for one in other]) == close
    assert not _close([], [])


@pytest.mark.parametrize(("output", "depth"), [(1, 0), ((1, 2), 1), ([1], 1), (((1,), 2), 2)])
def test_the_depth_of_a_tensor_in_tuples(output, depth):
    assert depth_of(output) == depth


@pytest.mark.parametrize(
    ("module", "count", "dim", "recurrent"),
    [
        (nn.Linear(2, 3), 3, -1, False),
        (nn.Conv1d(2, 3, 1), 3, -2, False),
        (nn.Conv2d(2, 3, 1), 3, -3, False),
        (nn.Conv3d(2, 3, 1), 3, -4, False),
        (nn.BatchNorm2d(3), 3, 1, False),
        (nn.GroupNorm(1, 3), 3, 1, False),
        (nn.LayerNorm(3), 3, -1, False),
        (nn.LayerNorm((2, 3)), None, -1, False),
        (nn.RMSNorm(3), 3, -1, False),
        (nn.LSTM(2, 3, bidirectional=True), 6, 0, True),
        (nn.Embedding(2, 3), None, 0, False),
    ],
)
def test_units_that_amplitudes_scale(module, count, dim, recurrent):
    assert (unit_count(module), channel_dim(module), is_recurrent(module)) == (count, dim, recurrent)


def test_feature_vectors_of_length_1_without_padding():
    """By a loop over the positions that count; vectors that are all 0 have a finite gradient."""
    generator = torch.Generator().manual_seed(0)
    features, source = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = [
        (features[n, :, p] / features[n, :, p].norm() - source[n, :, p] / source[n, :, p].norm()).square().sum()
        for n, p in mask.nonzero().tolist()
    ]
    torch.testing.assert_close(ldifs(features, source, 1, mask), torch.stack(expected).mean())
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    ldifs(zero, torch.zeros(2, 3, 4), 1, mask).backward()
    assert not zero.grad.any()


class TwoHeads(nn.Module):
    """A body with two heads beside each other, each of two layers."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.main = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, classes))
        self.aux = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, classes))

    def forward(self, x):
        return self.main(self.body(x)), self.aux(self.body(x))


class TestParallelHeads:
    def adapted(self, strategy):
        layers = ["body.0", "body.2", "main", "aux"]
        return ctl.adapt(TwoHeads(3), TwoHeads(7), [strategy], layers=layers, head=["main.2", "aux.2"])

    def test_features_are_compared_before_them(self):
        assert self.adapted(ctl.FeatureConservation()).plan.terms[0].taps == ("body.0", "body.2")

    def test_their_class_scores_have_no_amplitudes(self):
        plan = self.adapted(ctl.LHUC()).plan
        amplitudes = [row.name for row in plan.rows if row.name.endswith("lhuc")]
        assert sorted(amplitudes) == ["aux.0.lhuc", "body.0.lhuc", "body.2.lhuc", "main.0.lhuc"]

    def test_they_share_the_last_rate(self):
        plan = self.adapted(ctl.DiscriminativeLR(decay=0.5)).plan
        found = {row.layer: row.scale for row in plan.rows if row.kind == "weight" and row.origin == "source"}
        assert found == {"body.0": 0.25, "body.2": 0.5, "main": 1.0, "aux": 1.0}
