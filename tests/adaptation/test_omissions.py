"""What a hand-written loop leaves out or does twice is noticed, once; a loop that does all is never warned."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import conservtl as ctl
from conservtl.plan.decision import After

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
HALF = ctl.WeightInterpolation(t=0.5)


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.body, self.head, self.checkpointed = nn.Linear(4, 4), nn.Linear(4, 3), checkpointed

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))


class Score(After):
    """An ``after`` decision that needs a validation part."""

    kind: Literal["with_score"] = "with_score"
    scored: ClassVar[bool] = True

    def describe(self):
        return "asks for the score"

    def finish(self, ending):
        return {"score": ending.score()}


class WithScore(ctl.Strategy):
    """A strategy with that decision."""

    kind: Literal["with_score"] = "with_score"

    def apply(self, plan):
        return plan.with_after(Score(by=self.label))


def adapted(*strategies, **options):
    torch.manual_seed(0)
    model = Net(**options)
    return ctl.adapt(model, copy.deepcopy(model.state_dict()), strategies)


def train(adaptation, optimizer, steps=1, model=None, accumulate=1):
    model = adaptation.model if model is None else model
    for _ in range(steps):
        for _ in range(accumulate):
            model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(*strategies, steps=1):
    adaptation = adapted(*strategies)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    train(adaptation, optimizer, steps)
    return adaptation, optimizer


@pytest.fixture
def caught():
    """Every warning, those of finalizers too, as a list of their messages."""
    gc.collect()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", ctl.OmissionWarning)
        yield lambda: [str(each.message) for each in record if issubclass(each.category, ctl.OmissionWarning)]


class TestFinish:
    def test_it_happens_once(self):
        """t = 0.5 of the way; a second call would leave a quarter."""
        adaptation, optimizer = trained(HALF)
        end, start = adaptation.model.body.weight.detach().clone(), adaptation.start["body.weight"]
        for _ in range(2):
            assert adaptation.finish() == {"weight_interpolation": {"t": 0.5}}
            torch.testing.assert_close(adaptation.model.body.weight.detach(), (start + end) / 2)
        train(adaptation, optimizer)
        more = adaptation.model.body.weight.detach().clone()
        adaptation.finish()  # after further steps there is something to do again
        torch.testing.assert_close(adaptation.model.body.weight.detach(), (start + more) / 2)

    def test_after_fit_it_is_done_and_each_fit_does_it(self):
        adaptation = adapted(HALF)
        for _ in range(2):
            settings = ctl.Training(device="cpu", epochs=1, lr=0.1)
            result = ctl.fit(adaptation, (X, torch.zeros(8, dtype=torch.long)), training=settings)
            weight = adaptation.model.body.weight.detach().clone()
            assert adaptation.finish() == result.after
            assert torch.equal(adaptation.model.body.weight, weight)

    def test_it_is_part_of_the_state(self):
        """Saved with the weights, after or before the end."""
        for finished in (True, False):
            first, _ = trained(HALF)
            if finished:
                first.finish()
            file = io.BytesIO()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ctl.OmissionWarning)
                torch.save((first.model.state_dict(), first.state_dict()), file)
            file.seek(0)
            weights, state = torch.load(file)
            again = adapted(HALF)
            again.load_state_dict(state)
            again.model.load_state_dict(weights)
            first.finish()
            again.finish()
            assert torch.equal(again.model.body.weight, first.model.body.weight)

    def test_what_failed_can_be_done_again(self):
        """And what came before it is not done twice."""
        adaptation, _ = trained(HALF, WithScore())
        assert [after.by for after in adaptation.plan.after] == ["WeightInterpolation", "WithScore"]
        end, start = adaptation.model.body.weight.detach().clone(), adaptation.start["body.weight"]
        for _ in range(2):
            with pytest.raises(ctl.SpecError, match="WithScore chooses on a validation part"):
                adaptation.finish()
            torch.testing.assert_close(adaptation.model.body.weight.detach(), (start + end) / 2)
        assert adaptation.finish(score=lambda: 1.0) == {
            "weight_interpolation": {"t": 0.5},
            "with_score": {"score": 1.0},
        }
        torch.testing.assert_close(adaptation.model.body.weight.detach(), (start + end) / 2)


WAYS = {
    "weights": (lambda a: torch.save(a.model.state_dict(), io.BytesIO()), "the adapted model was saved"),
    "model": (lambda a: torch.save(a.model, io.BytesIO()), "the adapted model was saved"),
    "adaptation": (pickle.dumps, "the adapted model was saved"),
    "merged": (lambda a: a.merged(), "the adapted model was exported"),
    "export": (lambda a: torch.export.export(a.model, (X,)), "the adapted model was exported"),
    "trace": (lambda a: torch.jit.trace(a.model, X), "the adapted model was exported"),
}


class TestLeftOut:
    MESSAGE = r"WeightInterpolation was not carried out: call adaptation\.finish\(\.\.\.\)"

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize(("leave", "event"), WAYS.values(), ids=WAYS)
    def test_it_is_said_once(self, leave, event):
        adaptation, _ = trained(HALF)
        with pytest.warns(ctl.OmissionWarning, match=f"{event}, but {self.MESSAGE}"):
            leave(adaptation)
        leave(adaptation)
        adaptation, _ = trained(HALF)
        adaptation.finish()
        leave(adaptation)

    def test_deletion(self, caught):
        adaptation, optimizer = trained(HALF)
        del adaptation, optimizer
        gc.collect()
        (message,) = caught()
        assert message.startswith("the adaptation was deleted, but WeightInterpolation was not carried out")

    def test_a_checkpoint_to_go_on_from_is_no_result(self):
        """In any order, and however often."""
        adaptation, optimizer = trained(HALF)
        for _ in range(2):
            state = {"m": adaptation.model.state_dict(), "o": optimizer.state_dict(), "a": adaptation.state_dict()}
            torch.save(state, io.BytesIO())
            train(adaptation, optimizer)
        adaptation.finish()
        torch.save(adaptation.model.state_dict(), io.BytesIO())

    def test_looking_is_no_saving(self):
        adaptation, _ = trained(HALF)
        copy.deepcopy(adaptation.model.state_dict())
        copy.deepcopy(adaptation.model)(X)
        copy.deepcopy(adaptation)
        adaptation.model.eval()(X)
        adapted(HALF).merged()  # nothing was trained yet

    def test_files_hold_plain_metadata(self):
        adaptation, _ = trained(HALF)
        file = io.BytesIO()
        with pytest.warns(ctl.OmissionWarning):
            torch.save(adaptation.model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        Net().load_state_dict(loaded)
        assert loaded._metadata[""] == {"version": 1, "conservtl": {}}

    def test_an_adaptation_that_was_not_trained_or_failed_says_nothing(self, caught):
        adapted(HALF)
        failing = adapted(HALF)
        labels = torch.zeros(8, dtype=torch.long)
        with pytest.raises(ctl.TrainingDivergedError):
            ctl.fit(failing, (X * float("nan"), labels), training=ctl.Training(device="cpu", epochs=1))
        del failing
        gc.collect()
        assert caught() == []

    def test_a_compiled_model_stays_one_graph(self):
        adaptation = adapted(HALF)
        compiled = torch.compile(adaptation.model, backend="eager", fullgraph=True)
        train(adaptation, adaptation.optimizer(torch.optim.SGD, lr=0.1), 2, compiled)
        adaptation.finish()


class TestPhases:
    def test_one_that_was_never_started(self, caught):
        adaptation, optimizer = trained(ctl.LPFT(epochs=1))
        with pytest.warns(ctl.OmissionWarning, match=r"finish.* was called, but phase '.*' was never started"):
            adaptation.finish()
        del adaptation, optimizer
        gc.collect()
        assert caught() == []

    def test_all_started(self, caught):
        adaptation, optimizer = trained(ctl.LPFT(epochs=1))
        adaptation.start_phase(1)
        train(adaptation, optimizer)
        adaptation.finish()
        torch.save(adaptation.model, io.BytesIO())
        del adaptation, optimizer
        gc.collect()
        assert caught() == []


class TestSchedulerOverPhases:
    KEPT = "a scheduler made before start_phase.* sets the rates of the earlier phase again"

    def begun(self, make, scales=(0.5, 0.1)):
        adaptation = adapted(ctl.GradualUnfreezing(scales=scales))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        scheduler = make(adaptation, optimizer)
        train(adaptation, optimizer)
        scheduler.step()
        adaptation.start_phase(1)
        train(adaptation, optimizer)
        return adaptation, optimizer, scheduler

    @pytest.mark.parametrize("scales", [(0.5, 0.1), (0.1, 0.5)])
    def test_one_that_takes_the_scale_back(self, scales):
        adaptation, optimizer, scheduler = self.begun(
            lambda _, optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100), scales
        )
        scheduler.step()
        with pytest.warns(ctl.OmissionWarning, match=self.KEPT):
            train(adaptation, optimizer)
        scheduler.step()
        train(adaptation, optimizer)
        adaptation.finish()

    def test_a_new_one_or_the_adaptations_or_one_that_multiplies(self):
        for make in (
            lambda _, optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100),
            lambda _, optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
            lambda adaptation, _: adaptation.scheduler(lr_scheduler.LambdaLR, lambda step: 1 - step / 100),
        ):
            adaptation, optimizer, scheduler = self.begun(make)
            if isinstance(scheduler, lr_scheduler.LambdaLR):
                scheduler = make(adaptation, optimizer)
            for _ in range(3):
                scheduler.step()
                train(adaptation, optimizer)


class TestSchedulerThatMakesRatesEqual:
    MAKES = (
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9, cycle_momentum=False),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False),
    )

    @pytest.mark.parametrize("make", MAKES)
    def test_it_is_said_once(self, make):
        adaptation = adapted(ctl.DiscriminativeLR(decay=0.5))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        scheduler = make(optimizer)

        def three_steps():
            for _ in range(3):
                train(adaptation, optimizer)
                scheduler.step()

        with pytest.warns(ctl.OmissionWarning, match=r"rates of all groups equal .*adaptation\.scheduler") as caught:
            three_steps()
        assert len(caught) == 1

    @pytest.mark.parametrize("make", MAKES)
    def test_equal_by_the_plan_or_at_the_end(self, make):
        adaptation = adapted(ctl.L2SP())
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        scheduler = make(optimizer)
        train(adaptation, optimizer)
        scheduler.step()
        train(adaptation, optimizer)
        adaptation = adapted(ctl.DiscriminativeLR(decay=0.5))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 2, eta_min=1e-3)
        for _ in range(3):
            train(adaptation, optimizer)
            scheduler.step()


class TestAnotherOptimizer:
    MESSAGE = (
        r"AdamW has trained the adapted model for 3 steps.*: L2SP did not act\. Make it with adaptation\.optimizer"
    )

    def test_it_is_said_once(self):
        adaptation = adapted(ctl.L2SP(alpha=0.1))
        optimizer = torch.optim.AdamW(adaptation.model.parameters(), lr=0.1)
        train(adaptation, optimizer, 2)
        with pytest.warns(ctl.OmissionWarning, match=self.MESSAGE):
            train(adaptation, optimizer)
        train(adaptation, optimizer, 5)

    @pytest.mark.parametrize("made", ["copied", "compiled", "a model inside", "after our own"])
    def test_however_it_was_made(self, made):
        adaptation = adapted(ctl.L2SP(alpha=0.1))
        own = adaptation.optimizer(torch.optim.AdamW, lr=0.1)
        model = torch.compile(adaptation.model, backend="eager") if made == "compiled" else adaptation.model
        if made == "after our own":
            train(adaptation, own, 5)
        whole = nn.Sequential(nn.Linear(4, 4), model) if made == "a model inside" else model
        optimizer = copy.deepcopy(own) if made == "copied" else torch.optim.AdamW(whole.parameters(), lr=0.1)
        if made == "copied":
            optimizer.param_groups[0]["params"][:] = own.param_groups[0]["params"]
            optimizer.param_groups[1:] = []
        train(adaptation, optimizer, 2, whole)
        with pytest.warns(ctl.OmissionWarning, match=self.MESSAGE):
            train(adaptation, optimizer, 1, whole)

    def test_no_false_alarm(self):
        """Accumulation, evaluation, checkpointing, other models, two adaptations, copies, one optimizer in another."""
        first, second = adapted(ctl.L2SP(alpha=0.1), checkpointed=True), adapted(ctl.L2SP(alpha=0.2))
        optimizers = [one.optimizer(torch.optim.SGD, lr=0.01) for one in (first, second)]
        other = nn.Linear(4, 3)
        theirs = torch.optim.AdamW(other.parameters(), lr=0.1)
        plain = copy.deepcopy(first.model)
        baseline = torch.optim.AdamW(plain.parameters(), lr=0.1)
        for _ in range(5):
            for adaptation, optimizer in zip((first, second), optimizers, strict=True):
                train(adaptation, optimizer, accumulate=4)
                with torch.no_grad():
                    adaptation.model.eval()(X)
                adaptation.model.train()
            train(first, theirs, model=other)
            train(first, baseline, model=plain)
        again = ctl.adapt(first.model, copy.deepcopy(first.model), [ctl.L2SP(alpha=0.3)])
        train(again, again.optimizer(torch.optim.SGD, lr=0.01), 5)

    def test_a_plan_that_needs_no_optimizer_of_its_own(self):
        adaptation = adapted(HALF)
        train(adaptation, torch.optim.AdamW(adaptation.model.parameters(), lr=0.1), 5)
        adaptation.finish()

    def test_one_around_another(self):
        """Its inner optimizer steps in its own step."""

        class Outer(torch.optim.Optimizer):
            def __init__(self, params, lr):
                super().__init__(params, {"lr": lr})
                self.inner = torch.optim.SGD(self.param_groups, lr=lr)

            def step(self, closure=None):
                self.inner.step(closure)

        adaptation = adapted(ctl.L2SP(alpha=0.1))
        train(adaptation, adaptation.optimizer(Outer, lr=0.1), 5)


class TestPenaltyInTheLoss:
    def loss(self, adaptation, share=1.0):
        return adaptation.model(X).square().mean() + share * adaptation.penalty()

    @pytest.mark.parametrize("mode", ["coupled", "decoupled"])
    def test_beside_the_pull_it_is_refused(self, mode):
        adaptation, optimizer = trained(ctl.L2SP(alpha=0.1, mode=mode), steps=2)
        self.loss(adaptation, 0.5).backward()
        with pytest.raises(ctl.SpecError, match=r"the pull too: it would count twice\..*pull=False"):
            optimizer.step()

    def test_alone_or_only_looked_at(self):
        adaptation = adapted(ctl.L2SP(alpha=0.1))
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, pull=False)
        for _ in range(2):
            self.loss(adaptation).backward()
            optimizer.step()
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            torch.autograd.grad(adaptation.penalty(), [adaptation.model.body.weight])
            assert adaptation.penalty().item() > 0
            self.loss(adaptation, 0.0).backward()
            train(adaptation, optimizer)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
@pytest.mark.parametrize("strategies", [[], [ctl.L2SP(alpha=0.1)], [HALF]], ids=["plain", "pull", "back"])
def test_half_precision_afterwards_is_one_error(convert, strategies):
    """Before the first step and between steps; after training it is the user's to do."""
    for steps in (0, 2):
        adaptation, optimizer = trained(*strategies, steps=steps)
        getattr(adaptation.model, convert)()
        with pytest.raises(ctl.SpecError, match=r"is torch\.b?float16.*autocast"):
            optimizer.step()
    adaptation, _ = trained(*strategies)
    adaptation.finish()
    getattr(adaptation.model, convert)()
    adaptation.drift()
