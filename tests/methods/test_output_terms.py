"""The divergences to the source's outputs, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import conservtl as ctl
from conservtl.methods.output_conservation import OutputConservationTerm, cross_entropy_to_source, kl_to_source
from conservtl.plan.term import View


def by_hand(logits, source, temperature):
    """(cross-entropy, KL), both times T squared: sums over classes, mean over examples, with plain floats."""
    ce, kl = 0.0, 0.0
    for ours, theirs in zip(logits.tolist(), source.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in theirs]
        q = [math.exp(v / temperature) for v in ours]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        ce -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    scale = temperature**2 / len(logits)
    return ce * scale, kl * scale


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(0.5, 5), st.integers(1, 4), st.integers(2, 5))
def test_values(seed, temperature, count, classes):
    torch.manual_seed(seed)
    ours, theirs = torch.randn(2, count, classes)
    ce, kl = by_hand(ours, theirs, temperature)
    assert cross_entropy_to_source(ours, theirs, temperature).item() == pytest.approx(ce, rel=1e-4, abs=1e-5)
    assert kl_to_source(ours, theirs, temperature).item() == pytest.approx(kl, rel=1e-3, abs=1e-5)


def test_their_gradients_are_one_and_do_not_reach_the_source():
    ours, theirs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    ours.requires_grad_()
    theirs.requires_grad_()
    (a,) = torch.autograd.grad(cross_entropy_to_source(ours, theirs, 2.0), ours)
    (b,) = torch.autograd.grad(kl_to_source(ours, theirs, 2.0), ours)
    torch.testing.assert_close(a, b)
    kl_to_source(ours, theirs).backward()
    assert theirs.grad is None


def test_the_squared_temperature_keeps_the_gradient_of_one_size():
    """Without it a temperature of 10 would make the term a hundred times weaker."""
    ours, theirs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    ours.requires_grad_()
    sizes = [torch.autograd.grad(kl_to_source(ours, theirs, t), ours)[0].norm().item() for t in (10.0, 100.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


class TestFrames:
    """Outputs (N, frames, classes) with lengths, as torchaudio's models give them."""

    def view(self, *, garbage=0.0):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 4, 3, generator=generator)
        logits[1, 2:] = garbage
        return View((logits, torch.tensor([4, 2])))

    def term(self):
        return OutputConservationTerm(by="OutputConservation", weight=1.0)

    def source(self):
        return View((torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([4, 2])))

    def test_padding_does_not_count(self):
        values = [self.term().value(self.view(garbage=g), self.source(), {}) for g in (0.0, 50.0, math.nan)]
        assert values[0] == values[1] == values[2]
        flat = torch.cat([self.view().outputs[0][0], self.view().outputs[0][1, :2]])
        theirs = torch.cat([self.source().outputs[0][0], self.source().outputs[0][1, :2]])
        torch.testing.assert_close(values[0], kl_to_source(flat, theirs))

    def test_nor_does_its_gradient(self):
        logits, lengths = self.view(garbage=50.0).outputs
        logits.requires_grad_()
        self.term().value(View((logits, lengths)), self.source(), {}).backward()
        assert not logits.grad[1, 2:].any()
        assert logits.grad[1, :2].any()

    def test_all_count_where_no_lengths_are_given(self):
        value = self.term().value(View((self.view().outputs[0], None)), self.source(), {})
        torch.testing.assert_close(value, kl_to_source(self.view().outputs[0], self.source().outputs[0]))


def test_other_classes_are_refused():
    with pytest.raises(ctl.SpecError, match=r"shape \(2, 3\), the source \(2, 5\).*same classes"):
        OutputConservationTerm(by="me", weight=1.0).value(View(torch.zeros(2, 3)), View(torch.zeros(2, 5)), {})


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ctl.SpecError, match=r"must be logits.*received str"):
        OutputConservationTerm(by="me", weight=1.0).value(View("x"), View("x"), {})


def test_half_precision_is_computed_in_full():
    ours, theirs = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    half = kl_to_source(ours.bfloat16(), theirs.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, kl_to_source(ours.bfloat16().float(), theirs.bfloat16().float()))


def test_shares_of_a_step_add_up_to_one_batch():
    """Losses that are sums divided by the number of labels of the whole step, and terms by their batches' shares."""
    torch.manual_seed(0)
    source, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    adaptation = ctl.adapt(model, source, [ctl.OutputConservation(rho=0.3)])
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        model.weight.add_(0.5)

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            loss = torch.nn.functional.cross_entropy(model(x[part]), labels[part], reduction="sum") / len(x)
            adaptation.loss(loss, model(x[part]), x[part], share=len(x[part]) / len(x)).backward()
        return model.weight.grad.clone()

    torch.testing.assert_close(gradient([slice(0, 2), slice(2, 5)]), gradient([slice(0, 5)]))
