"""Outputs, batches and hooks that a step cannot use, each refused or passed over by itself."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.engine.execution import ThreadTimer
from conservtl.engine.schedule import total_steps
from conservtl.plan.term import View
from conservtl.runtime.layer_features import tensor_of
from conservtl.runtime.omissions import Endings, ExportHook
from conservtl.runtime.source_model import CommonLabels
from conservtl.runtime.task_loss import read_task_loss
from conservtl.source.by_label import _normalised_together
from conservtl.source.downloads import _shown
from conservtl.source.entries import _holds_weights
from conservtl.spec_model import FrozenModel, check_describable


@pytest.mark.parametrize("output", ["text", (), {"out": torch.ones(1)}])
def test_a_layer_without_a_tensor_has_nothing_to_compare(output):
    with pytest.raises(ctl.SpecError, match=rf"layer 'a' returns a {type(output).__name__}, no tensor to compare"):
        tensor_of(output, "a")
    assert tensor_of((torch.ones(2), output), "a").tolist() == [1, 1]


def test_outputs_without_an_axis_of_the_labels():
    labels = CommonLabels((1, None, 0))
    with pytest.raises(ctl.SpecError, match=r"one axis of 3 labels.*received shape \(4, 5\), and \(4, 5\) of the"):
        labels.of(torch.zeros(4, 5), torch.zeros(4, 5), None)


def test_ignored_labels_stand_at_the_outputs_positions():
    view = View(torch.zeros(4, 3, 5), {}, task=SimpleNamespace(counted=torch.ones(4, 6, dtype=torch.bool)))
    with pytest.raises(ctl.SpecError, match=r"must be at the outputs' positions, \(4, 5\); received \(4, 6\)"):
        view.counted(view.outputs, 1)


def test_a_loss_without_a_graph_says_nothing_of_the_outputs():
    found = read_task_loss(torch.tensor(1.0), torch.zeros(2, 3), None)
    assert (found.form, found.why) == (None, "the loss is not computed from the outputs")


def test_outputs_that_nothing_computed():
    """They are a parameter: the loss is theirs all the same."""
    logits = nn.Parameter(torch.zeros(4, 3))
    found = read_task_loss(nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long)), logits, None)
    assert (found.form, found.axis) == ("softmax", 1)


def test_hooks_for_exports_are_pickled_without_their_adaptation():
    assert pickle.loads(pickle.dumps(ExportHook(None)))._endings is None


@pytest.mark.parametrize(("steps", "total"), [(5, 15), (None, None)])
def test_the_number_of_steps(steps, total):
    training = ctl.Training(epochs=3, accumulate=2, schedule="cosine")
    if total is None:
        with pytest.raises(ctl.SpecError, match="needs the number of steps"):
            total_steps(training, steps)
    else:
        assert total_steps(training, steps) == total


def test_a_phase_is_begun_once():
    threads = torch.get_num_threads()
    timer = ThreadTimer({0: 1}, 2)
    try:
        timer.begin(0)
        timer._seconds = "measured"
        timer.begin(0)
        assert timer._seconds == "measured"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(None, "of unknown size"), (512, "512 bytes"), (2_500, "2.5 kB"), (3_100_000, "3.1 MB"), (4 * 10**9, "4.0 GB")],
)
def test_sizes_in_words(size, shown):
    assert _shown(size) == shown


@pytest.mark.parametrize(
    ("value", "holds"),
    [
        ({"state_dict": {}}, False),
        ({"state_dict": {"w": torch.ones(1)}}, True),
        ({"best": torch.tensor(1.0)}, False),
        ({"w": torch.ones(1)}, True),
        ({1: torch.ones(1)}, False),
        ({"w": 1}, False),
        (1, False),
    ],
)
def test_what_holds_named_weights(value, holds):
    assert _holds_weights(value) is holds


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_norms_through_which_rows_depend_on_each_other():
    modules = {"a": nn.utils.weight_norm(nn.Linear(2, 2), dim=None), "b": nn.utils.weight_norm(nn.Linear(2, 2))}
    assert _normalised_together(modules, "a.weight_v") == "a weight norm"
    assert _normalised_together(modules, "b.weight_v") is None


def test_a_class_whose_types_are_not_there_yet_is_not_judged():
    class Incomplete(FrozenModel):
        field: Nowhere = None  # noqa: F821

    check_describable(Incomplete)


def test_a_signature_is_the_classs_alone():
    class Small(FrozenModel):
        field: int = 1

    with pytest.raises(AttributeError, match="__signature__"):
        Small().__signature__  # noqa: B018


def test_endings_without_a_plan_have_nothing_to_warn_of():
    endings = Endings.__new__(Endings)
    vars(endings).update(_plan=None, _steps=1, _told=False)
    endings.deleted()


def test_a_measurement_needs_batches():
    adaptation = ctl.adapt(nn.Linear(2, 2), nn.Linear(2, 2), [ctl.FisherSP()])
    with pytest.raises(ctl.DataError, match="there are no batches to measure on"):
        adaptation.measure([])
