"""Comparisons by a headline metric of either direction, against figures by hand."""

import pytest

from conservtl.experiments.studies.comparison import summarise
from conservtl.experiments.studies.judge import Judge
from conservtl.experiments.studies.variants import baseline_ids
from conservtl.tasks.headline import Headline

ACCURACY, WER = Judge(Headline()), Judge(Headline("wer", better="lower"))
ERROR = Judge(Headline("mae", better="lower", share=False))


@pytest.mark.parametrize(
    ("judge", "both", "name"),
    [(ACCURACY, 2 / (1 / 0.5 + 1 / 0.9), "harmonic mean"), (WER, 0.7, "mean"), (ERROR, 0.7, "mean")],
)
def test_one_score_for_both_domains(judge, both, name):
    assert judge.both(0.5, 0.9) == pytest.approx(both)
    assert judge.score({"target": 0.5, "source": None}) == 0.5
    assert judge.combination == name


@pytest.mark.parametrize(("judge", "gain"), [(ACCURACY, -0.2), (WER, 0.2), (ERROR, 0.2)])
def test_a_gain_is_positive_where_a_value_is_better(judge, gain):
    assert judge.gain(0.3, 0.5) == pytest.approx(gain)
    assert (judge.rank(0.3) > judge.rank(0.5)) is (gain > 0)


def test_the_constrained_score_counts_what_is_right():
    """Target errors from 40 % to 10 %, a source loss of 1 point of 3: 3/4 of the errors, two thirds of it."""
    expected = pytest.approx(0.75 * 2 / 3)
    assert ACCURACY.constrained([(0.6, 0.9, 0.95, 0.94)]) == expected
    assert WER.constrained([(0.4, 0.1, 0.05, 0.06)]) == expected
    assert ERROR.constrained([(0.4, 0.1, 0.05, 0.06)]) is None
    assert ACCURACY.constrained([]) is None


def a_spec(headline):
    class Problem:
        has_classes = False

    class Spec:
        problem = Problem()

        def model_dump(self, mode):
            return {}

    Problem.headline = headline
    return Spec()


def test_with_lower_better_the_lowest_error_wins():
    """Of two baselines the one with less error is the one to beat, and the gain over it is positive."""
    runs = [
        {
            "variant": variant,
            "target": "slow clock",
            "shots": 20,
            "seed": seed,
            "before": {"target": 0.5, "source": 0.1},
            "after": {"target": error + 0.001 * seed, "source": 0.1},
            "seconds": 1.0,
        }
        for seed in range(6)
        for variant, error in (("source as it is", 0.5), ("fine-tuning, low rate", 0.3), ("mine", 0.2))
    ]
    result = summarise(a_spec(ERROR.headline), runs)
    (table,) = result["tables"]
    assert (table["best_baseline"], table["best_baseline_id"]) == ("fine-tuning, low rate", "fine_tuning_low")
    rows = {row["id"]: row for row in table["rows"]}
    assert [row["role"] for row in rows.values()] == ["source", "baseline", "method"]
    assert rows["mine"]["difference"]["mean"] == pytest.approx(0.05)
    assert rows["mine"]["wins"]
    assert rows["source"]["difference"]["mean"] == pytest.approx(-0.1)
    (verdict,) = result["verdict"]
    assert verdict.startswith("At 20 shots mine beats the best baseline, fine-tuning, low rate: +0.05 (")
    assert verdict.endswith("in the mean of target and source.")


def test_every_baseline_has_an_id_of_its_own():
    ids = [identity for identity, _ in baseline_ids().values()]
    assert len(set(ids)) == len(ids) == 8
    assert [role for _, role in baseline_ids().values()].count("bound") == 1
