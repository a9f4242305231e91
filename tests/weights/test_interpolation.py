"""The line between two models: exact where it must be, straight in between, refused where there is none."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import conservtl as ctl
from conservtl.testing import models, state_dicts
from conservtl.testing.weights import random_weights


def network(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            body=nn.Linear(4, 5),
            norm=nn.BatchNorm1d(5),
            head=nn.Linear(5, classes),
        )
    )


def pair():
    """Two networks that differ in every tensor."""
    one, other = network(seed=1), network(seed=2)
    for seed, model in enumerate((one, other)):
        model.load_state_dict(random_weights(model, seed))
    return one, other


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class TestInterpolate:
    @settings(max_examples=40, deadline=None)
    @given(st.data(), st.floats(0, 1))
    def test_it_is_the_formula_on_any_model(self, data, t):
        """Against (1 - t) w0 + t w1 in float64; integers are the adapted model's."""
        model, _ = data.draw(models())
        source = data.draw(state_dicts(model, partial=False)).plain
        adapted = random_weights(model, 5)
        for name, found in ctl.interpolate(source, adapted, t).items():
            if found.is_floating_point():
                expected = (1 - t) * source[name].double() + t * adapted[name].double()
                assert torch.allclose(found.double(), expected, atol=1e-6, rtol=1e-6)
            else:
                assert torch.equal(found, adapted[name])

    @settings(max_examples=25, deadline=None)
    @given(st.data(), st.floats(0, 1), st.floats(0, 1))
    def test_it_is_affine_in_t(self, data, t, share):
        """Half way between two points of the line lies the point half way between."""
        model, _ = data.draw(models())
        model = model.double()
        source, adapted = random_weights(model, 1), random_weights(model, 2)
        first, second = ctl.interpolate(source, adapted, t), ctl.interpolate(source, adapted, share)
        middle = ctl.interpolate(source, adapted, (t + share) / 2)
        again = ctl.interpolate(first, second, 0.5)
        assert all(torch.allclose(middle[name], again[name]) for name in middle)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_ends_are_exact(self, dtype):
        source, adapted = (model.to(dtype) for model in pair())
        start, end = source.state_dict(), adapted.state_dict()
        start["norm.num_batches_tracked"] = end["norm.num_batches_tracked"]
        assert same(ctl.interpolate(source, adapted, 0), start)
        assert same(ctl.interpolate(source, adapted, 1), end)

    def test_what_is_equal_stays_to_the_bit(self):
        """A frozen weight is not moved by rounding, and an infinity in a mask does not become NaN."""
        source = {"w": torch.randn(1000), "mask": torch.tensor([0.0, -torch.inf])}
        found = ctl.interpolate(source, copy.deepcopy(source), 0.3)
        assert same(found, source)

    def test_half_precision_is_mixed_in_full(self):
        """Rounded once, at the end."""
        source, adapted = ({"w": torch.randn(500).bfloat16()} for _ in range(2))
        expected = 0.7 * source["w"].double() + 0.3 * adapted["w"].double()
        assert torch.allclose(
            ctl.interpolate(source, adapted, 0.3)["w"].double(), expected, rtol=2**-8 + 1e-6, atol=1e-6
        )

    def test_integers_are_never_averaged(self):
        source, adapted = pair()
        source.norm.num_batches_tracked.fill_(100)
        adapted.norm.num_batches_tracked.fill_(7)
        for t in (0, 0.5, 1):
            found = ctl.interpolate(source, adapted, t)["norm.num_batches_tracked"]
            assert (found, found.dtype) == (7, torch.int64)

    @pytest.mark.parametrize(("kind", "share"), [("interpolate", 0.25), ("adapted", 1.0), ("source", 0.0)])
    def test_running_statistics(self, kind, share):
        """Both of them, and the norm's weights like all others."""
        source, adapted = pair()
        found = ctl.interpolate(source, adapted, 0.25, batch_norm=kind)
        for name in ("running_mean", "running_var", "weight"):
            part = 0.25 if name == "weight" else share
            one, other = getattr(source.norm, name).detach(), getattr(adapted.norm, name).detach()
            assert torch.allclose(found[f"norm.{name}"], (1 - part) * one + part * other)

    def test_the_tensors_are_new(self):
        """Neither model changes with what is done to the result."""
        source, adapted = pair()
        before = copy.deepcopy((source.state_dict(), adapted.state_dict()))
        for t in (0, 0.5, 1):
            for tensor in ctl.interpolate(source, adapted, t).values():
                tensor.zero_()
        assert same(source.state_dict(), before[0])
        assert same(adapted.state_dict(), before[1])

    def test_wrapped_models_and_prefixed_files_have_the_models_own_names(self, tmp_path):
        source, adapted = pair()
        torch.save({"state_dict": {f"module.{n}": t for n, t in source.state_dict().items()}}, tmp_path / "source.pt")
        found = ctl.interpolate(tmp_path / "source.pt", nn.DataParallel(adapted), 0.5)
        assert same(found, ctl.interpolate(source, adapted, 0.5))
        adapted.load_state_dict(found)

    def test_what_is_fresh_is_the_adapted_models(self):
        source, adapted = pair()
        other = network(classes=7)
        found = ctl.interpolate(source, other, 0.25, fresh=["head"])
        assert torch.equal(found["head.weight"], other.head.weight)
        assert torch.equal(found["head.bias"], other.head.bias)
        expected = 0.75 * source.body.weight + 0.25 * other.body.weight
        assert torch.allclose(found["body.weight"], expected.detach())
        # One that would fit stays too, where it is named; and what the source alone has is left out.
        same_size = ctl.interpolate(source, adapted, 0.25, fresh=["head"])
        assert torch.equal(same_size["head.weight"], adapted.head.weight)
        headless = {n: t for n, t in adapted.state_dict().items() if "head" not in n}
        assert ctl.interpolate(source, headless, 0.25, fresh=["head"]).keys() == headless.keys()

    def test_other_keys_are_refused(self):
        source, adapted = pair()
        less = {n: t for n, t in source.state_dict().items() if n != "head.bias"}
        with pytest.raises(ctl.SourceError, match=r"'head.bias' is in the adapted model only.*fresh=\['head.bias'"):
            ctl.interpolate(less, adapted, 0.5)
        with pytest.raises(ctl.SourceError, match=r"'head.bias' is in the source model only"):
            ctl.interpolate(adapted, less, 0.5)

    def test_other_shapes_are_refused(self):
        with pytest.raises(ctl.SourceError, match=r"'head.weight' has shape \(3, 5\) in the source and \(1, 5\)"):
            ctl.interpolate(network(), network(classes=1), 0.5)  # it would broadcast

    def test_a_glob_that_names_nothing_is_refused(self):
        with pytest.raises(ctl.SelectorError, match="'heed'"):
            ctl.interpolate(*pair(), 0.5, fresh=["heed"])

    @pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
    def test_beyond_the_ends_is_refused(self, t):
        with pytest.raises(ctl.SpecError, match=r"between 0 \(the source\) and 1"):
            ctl.interpolate(*pair(), t)

    def test_one_model_has_no_line(self):
        """Adapting changes a model in place, so that this is what a forgotten copy looks like."""
        model = network()
        with pytest.raises(ctl.SourceError, match="one and the same model"):
            ctl.interpolate(model, nn.DataParallel(model), 0.5)

    def test_an_unknown_batch_norm_is_refused(self):
        with pytest.raises(ctl.SpecError, match="batch_norm must be one of"):
            ctl.interpolate(*pair(), 0.5, batch_norm="recompute")


class TestPath:
    def test_it_goes_from_end_to_end(self):
        source, adapted = pair()
        found = dict(ctl.interpolation_path(source, adapted, 5))
        assert list(found) == [0.0, 0.25, 0.5, 0.75, 1.0]
        for t, state in found.items():
            assert same(state, ctl.interpolate(source, adapted, t))

    def test_eleven_points_are_tenths(self):
        assert [t for t, _ in ctl.interpolation_path(*pair())] == pytest.approx([number / 10 for number in range(11)])

    def test_bad_input_is_refused_at_once(self):
        """Not when the first point is asked for."""
        with pytest.raises(ctl.SpecError, match="at least 2, for the two ends; received 1"):
            ctl.interpolation_path(*pair(), 1)
        with pytest.raises(ctl.SourceError, match="is in the source model only"):
            ctl.interpolation_path(network(), {"body.weight": torch.zeros(5, 4)})
