"""Objects in notebooks: complete in themselves, escaped, without colours that need a light page."""

import re

import pytest
import torch
from torch import nn

import conservtl as ctl
from conservtl.experiments.results import Comparison, Sweep
from conservtl.report import RunReport
from conservtl.report.text.html_table import Cell, HtmlTable, TableRow

HOSTILE = "<script>alert(1)</script>"


def checked(html):
    """HTML of a notebook that needs nothing from outside and keeps a dark page readable."""
    assert not re.search(r"<(script|link|style|img)\b|url\((?!#)|https?://(?!www\.w3\.org)", html)
    for card in re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL):
        html = html.replace(card, "")  # a figure brings a light card of its own
    assert "<svg" not in html
    assert set(re.findall(r"(?<![\w-])(?:color|background):([^;\"]+)", html)) <= {"inherit", "transparent"}
    return html


def adapted():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return ctl.adapt(model, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), [ctl.LayerTransfer(layers=1)])


def test_a_plan_and_an_adaptation_show_the_table_that_they_print():
    adaptation = adapted()
    html = checked(adaptation._repr_html_())
    assert "Adaptation of Sequential" in html
    assert adaptation.plan._repr_html_() in adaptation._repr_html_()
    rows = re.findall(r"<tr.*?</tr>", html)
    text = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert text[0] == ["layer", "parameters", "origin", "state", "rate", "pull", "decay"]
    assert text[1][:4] == ["0", "20", "source", "frozen"]
    assert text[2][:4] == ["2", "10", "fresh", "trained"]
    assert "opacity" in rows[1]
    assert "bold" in rows[2]
    assert "30 parameters: 10 trained" in html


def test_a_result_of_fit_shows_its_epochs():
    data = torch.randn(12, 4), torch.arange(12) % 2
    training = ctl.Training(epochs=30, device="cpu", keep="target")
    result = ctl.fit(adapted(), data, {"target": data}, training, seed=0)
    printed = str(result).splitlines()
    assert printed[0].startswith("30 steps in")
    assert printed[1].split() == ["epoch", "phase", "loss", "target", "loss", "target", "accuracy"]
    assert printed[-2].split()[:2] == ["30", "all"]
    html = checked(result._repr_html_())
    epochs = [int(epoch) for epoch in re.findall(r"<tr[^>]*><td[^>]*>(\d+)</td>", html)]
    assert len(epochs) == 12  # all are evaluated, and many
    assert (epochs[0], epochs[-1]) == (1, 30)
    assert "18 epochs are left out here" in html
    assert f"{result.history[-1]['target']['accuracy']:.4g}" in html
    assert "target accuracy" in html


def test_names_from_outside_are_text():
    table = HtmlTable(HOSTILE, HOSTILE, [HOSTILE, "b"], [TableRow([Cell(HOSTILE, HOSTILE), Cell("1")])])
    html = checked(table._repr_html_())
    assert HOSTILE not in html
    assert html.count("&lt;script&gt;") == 5
    assert str(table).count(HOSTILE) == 5


def test_a_run_shows_metrics_and_figures():
    pytest.importorskip("matplotlib")
    report = RunReport(
        {
            "target": HOSTILE,
            "before": {"target": {"accuracy": 0.5}, "source": {"accuracy": 0.9}},
            "after": {"target": {"accuracy": 0.75}, "source": {"accuracy": 0.8}},
            "drift": {HOSTILE: 0.1, "b": 0.2},
        },
        [{"epoch": 1, "loss": 1.0, "target": {"accuracy": 0.75}}],
    )
    html = report._repr_html_()
    assert "<svg" in html
    assert HOSTILE not in html
    assert "75.0 %" in checked(html)
    assert report == dict(report)


@pytest.mark.parametrize("kind", [Comparison, Sweep])
def test_studies_show_tables_and_figures(kind, results):
    pytest.importorskip("matplotlib")
    result = kind(results["compare" if kind is Comparison else "sweep"]())
    html = result._repr_html_()
    assert html.count("<svg") == len(result.figures())
    assert result.figure().svg == result.figures()[0].svg
    assert result.table().header[1] in checked(html).replace("&#x27;", "'")
    assert str(result.table()) in str(result)
