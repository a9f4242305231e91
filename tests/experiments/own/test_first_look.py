"""What a study finds out before its first run: how the source is read, labels, the metric that it is judged by."""

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.own.first_look import headline, labels_for, read_given


@pytest.mark.parametrize("option", ["key", "prefix", "rename"])
def test_a_model_that_is_its_own_source_is_not_read_by_names(option):
    with pytest.raises(
        ctl.SpecError, match="key, prefix and rename say how to read a source; the model itself is none"
    ):
        read_given(nn.Linear(1, 1), ctl.itself(missing=[]), {option: "x"})


def test_given_labels_are_text():
    assert labels_for((("a", 1), ["b"]), None, None, classes=True, own_head=True) == (("a", "1"), ("b",))


@pytest.mark.parametrize(
    ("own_head", "classes", "labels"),
    [
        (False, True, (("0", "1", "2"), ("0", "1", "2"))),
        (True, True, (("0", "1", "2"), ("source 0", "source 1"))),
        (True, False, (("0",), ("source 0",))),
    ],
)
def test_labels_are_the_numbers_of_outputs(own_head, classes, labels):
    outputs, theirs = torch.zeros(4, 3), torch.zeros(4, 2)
    assert labels_for(None, outputs, theirs, classes=classes, own_head=own_head) == labels


@pytest.mark.parametrize(
    ("select", "metrics", "name"),
    [(None, {"accuracy": 1, "f1": 1}, "accuracy"), ("loss", {"accuracy": 1}, "loss"), (None, {}, "loss")],
)
def test_the_metric_that_runs_are_judged_by(select, metrics, name):
    training = None if select is None else ctl.Training(select=select)
    assert headline(training, metrics).metric == name


def test_one_of_several_metrics_must_be_named():
    with pytest.raises(ctl.SpecError, match=r"of the metrics, f1, f2, it must be known which one"):
        headline(None, {"f1": 1, "f2": 1})
