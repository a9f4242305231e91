"""Pages of metrics that are no accuracy: the same verdicts, in the metric's own name, unit and direction."""

import re

import pytest

from conservtl.report import write_compare, write_sweep, write_tune
from conservtl.report.pages.sweep_page import sweep_sentences
from conservtl.report.pages.tuning_page import tune_sentence
from conservtl.report.text.metrics import headline
from conservtl.report.text.variants import variants

WRITERS = {"compare": write_compare, "sweep": write_sweep, "tune": write_tune}


def texts(html):
    return re.findall(r"<text[^>]*>([^<]*)</text>", html)


def order(html):
    """First cells of the first table's rows."""
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    return re.findall(r"<tr[^>]*>\s*<td[^>]*>(?:<i[^>]*>.</i>)?([^<]*)", body)


@pytest.mark.parametrize("share", [True, False])
def test_a_comparison_in_errors_has_the_same_order(written, results, errors, share):
    accuracies = results["compare"](shots=(1, 5))
    result = errors(accuracies, share=share)
    assert order(written(write_compare, result)) == order(written(write_compare, accuracies))
    rows = variants(result["tables"][1], headline(result))
    assert max(rows, key=lambda row: row.rank).name == "joint training"
    assert [row.name for row in rows if row.best] == ["fine-tuning, interpolated"]


def test_a_comparison_names_its_metric_unit_and_direction(written, results, errors):
    html = written(write_compare, errors(results["compare"]()))
    assert {"source word error rate (%)", "target word error rate (%)"} <= set(texts(html))
    assert "accuracy" not in re.sub("<[^>]+>", "", html)
    assert "Word error rate (lower is better)." in html
    assert re.search(r"from scratch \(source 7\d\.\d %, target 6\d\.\d %\)", html)


def test_a_metric_without_bounds_has_no_per_cent(written, results, errors):
    for kind, writer in WRITERS.items():
        html = written(writer, errors(results[kind](), share=False))
        pictures = " ".join(texts(html))
        assert "%" not in pictures
        assert "accuracy" not in re.sub("<[^>]+>", "", html)
        assert "harmonic" not in re.sub("<pre>.*?</pre>|<[^>]+>", "", html, flags=re.DOTALL)


def test_a_sweep_in_errors_says_the_same(results, errors):
    result = results["sweep"]()
    side, holding, strength = sweep_sentences(errors(result))
    assert re.match(
        r"The output side transfers better: held, target word error rate is 31\.\d % against 5[45]\.\d % from", side
    )
    assert holding == sweep_sentences(result)[1]
    assert strength.startswith("Of the strengths of l2_sp, 1 has the best mean, 2.9 % (target 4.5 %, source 1.4 %)")


@pytest.mark.parametrize("objective", ["target", "both"])
def test_a_search_in_errors_finds_the_same_trial(results, errors, objective):
    result = results["tune"](objective, 30)
    number = re.compile(r"trial (\d+)\.|number (\d+) is the best")
    assert number.search(tune_sentence(errors(result)))[0] == number.search(tune_sentence(result))[0]


def test_the_best_so_far_falls_if_lower_is_better(written, results, errors):
    result = results["tune"]("target")
    best = min(100 * (1 - trial["target"]) for trial in result["trials"] if trial["target"] is not None)
    assert f"best so far {best:.1f}" in written(write_tune, errors(result))


def test_shots_without_classes(written, results):
    html = written(write_compare, results["compare"](shots=(1, 5)) | {"classes": False})
    assert "In numbers, 5 shots<" in html
    assert "shots a class" not in html
    assert "labelled examples (log scale)" in texts(html)
