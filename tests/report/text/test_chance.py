"""Answers that became better and worse: the sign test by hand, and what is said of it."""

import pytest

from conservtl.report.text.chance import Turned, turned_notes
from conservtl.report.text.metrics import headline, pair
from conservtl.report.text.summary import sentence, verdict
from conservtl.report.text.tables import metric_table


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (1, 9, 2 * (1 + 10) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_the_sign_test(better, worse, p):
    assert Turned(better, worse, 100).p == pytest.approx(p)
    assert Turned(better, worse, 100).within_chance == (p > 0.05)


def a_report(better, worse, of=10):
    after = 0.5 + (better - worse) / of
    return {
        "target": "theo",
        "example": "recording",
        "before": {"target": {"accuracy": 0.5}, "source": {"accuracy": 0.9}},
        "after": {"target": {"accuracy": after}, "source": {"accuracy": 0.8}},
        "turned": {
            "target": {"better": better, "worse": worse, "of": of},
            "source": {"better": 0, "worse": 1, "of": 10},
        },
        "metric": {"key": "accuracy", "name": "accuracy", "better": "higher", "share": True},
    }


@pytest.mark.parametrize(("better", "worse", "word"), [(1, 0, "none"), (0, 2, "2")])
def test_a_change_within_chance_is_no_verdict(better, worse, word):
    report = a_report(better, worse)
    assert headline(report).verdict(pair(report, "target", "accuracy")) != "same"
    assert verdict(report) == "same"
    assert f"within chance: of 10 recordings {better} became better and {word} worse)" in sentence(report)
    assert "source kept 80.0 % of 90.0 % (−10.0 points, within chance)" in sentence(report)
    assert [row.cells[-1].text for row in metric_table(report).rows] == ["within chance"] * 2
    assert turned_notes(report)[1] == (
        "Source: of 10 recordings 0 became better and 1 worse: within chance (sign test, p = 1)."
    )


def test_a_change_beyond_chance_is_judged():
    report = a_report(40, 1, of=100)
    assert verdict(report) == "better"
    assert "chance" not in sentence(report).partition(";")[0]
    assert turned_notes(report)[0].startswith(
        "Target: of 100 recordings 40 became better and 1 worse: more than chance"
    )


def test_reports_of_before_have_no_such_numbers():
    report = a_report(1, 0)
    del report["turned"]
    assert verdict(report) == "better"
    assert turned_notes(report) == []
