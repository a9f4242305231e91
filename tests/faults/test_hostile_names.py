"""Names from outside show as text: in pages, pictures, JSON and on a terminal; a page loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from conservtl.cli._tables import rich_table
from conservtl.experiments.results import Comparison
from conservtl.report import write_compare, write_html, write_json, write_range_test, write_sweep, write_tune
from conservtl.report.figures.canvas import shorten

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

EVIL = (
    "<script>alert(1)</script>",
    "</svg><img src=x onerror=alert(2)>",
    "\"><iframe src='https://evil.example'>",
    "--><style>*{display:none}</style><!--",
    "$\\frac{1}{0}$ \\1 \\g<0> {{ 7*7 }} {% x %}",
    "two\nlines\x1b[2J\u202etxt & &lt;b&gt;",
)
LOADS = {
    "script",
    "img",
    "iframe",
    "link",
    "object",
    "embed",
    "base",
    "form",
    "image",
    "video",
    "audio",
    "foreignobject",
}


class Page(HTMLParser):
    """The elements and the text of a page; what could load or run something is refused."""

    def __init__(self, page):
        super().__init__()
        self.text = []
        self.tags = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in LOADS, tag
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src", "action", "data", "poster"):
                assert value.startswith("#"), (tag, name, value)
            if name == "style" or "url(" in (value or ""):
                assert not re.search(r"url\((?!#)|expression|@import", value), value

    def handle_data(self, data):
        self.text.append(data)

    def shows(self, name):
        """Return whether a name stands in the page as text, whatever its spaces and breaks."""
        bare = [re.sub(r"[\s\u200b]", "", text) for text in ("".join(self.text), name)]
        return bare[1] in bare[0]


def a_report():
    classes = list(EVIL)
    values = [0.1 * place for place in range(len(classes))]
    per_class = {"labels": classes, "before": values, "after": values[::-1], "counts": [5] * len(classes)}
    return {
        "target": EVIL[0],
        "shots": 5,
        "example": EVIL[1],
        "classes": True,
        "before": {"target": {"accuracy": 0.2}, "source": {"accuracy": 0.9}},
        "after": {"target": {"accuracy": 0.8}, "source": {"accuracy": 0.8}},
        "per_class": {"target": per_class, "source": per_class},
        "drift": dict.fromkeys(EVIL, 0.1),
        "seconds": {"adapt": 3.0},
        "environment": {EVIL[2]: EVIL[3]},
        "skipped": {"count": 200, "files": [{"file": name, "reason": EVIL[0]} for name in EVIL]},
        "spec": {name: [name] for name in EVIL},
    }


def test_a_run_s_page_shows_names_as_text(tmp_path):
    write_html(a_report(), [], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("style") == 1
    assert page.tags.count("svg") == 2
    for name in EVIL[:2]:
        assert page.shows(name)
    assert page.shows("200")
    assert page.shows("'two\\nlines\\x1b[2J\\u202etxt & &lt;b&gt;'")


@pytest.mark.parametrize("name", EVIL)
def test_the_description_of_a_picture_holds_any_name(tmp_path, name):
    write_html(a_report() | {"drift": {name: 0.5}}, [], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    Page(html)
    assert f"1 layer; {escape(name)} moved most" in html


@pytest.fixture(scope="module")
def studies():
    """The functions of the reports' tests that make results."""
    path = Path(__file__).parents[1] / "report" / "conftest.py"
    definition = importlib.util.spec_from_file_location("report_results", path)
    module = importlib.util.module_from_spec(definition)
    definition.loader.exec_module(module)
    return module


def evil_values(value):
    """Return a result with hostile text wherever a person's text may stand."""
    if isinstance(value, dict):
        return {key: {EVIL[0]: EVIL[1]} if key == "spec" else evil_values(each) for key, each in value.items()}
    return [evil_values(each) for each in value] if isinstance(value, list) else value


def test_a_comparison_s_page_shows_names_as_text(tmp_path, studies):
    own = dict.fromkeys(EVIL, (0.96, 0.98))
    result = evil_values(studies.a_comparison(shots=(1, 5), own=own, targets=EVIL)) | {"left_out": [EVIL[2]]}
    write_compare(result, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert all(page.shows(name) for name in EVIL)


def test_a_sweep_s_page_shows_names_as_text(tmp_path, studies):
    write_sweep(evil_values(studies.a_sweep(layers=EVIL)), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.shows(EVIL[0])


def test_a_search_s_page_shows_names_as_text(tmp_path, studies):
    fields = {name: {"choices": list(EVIL)} for name in EVIL}
    result = evil_values(studies.a_search(fields=fields))
    for trial in result["trials"]:
        trial["why"] = EVIL[1] if trial["why"] else None
    write_tune(result, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert all(page.shows(name) for name in EVIL[:2])


def test_a_range_test_s_page_shows_names_as_text(tmp_path):
    result = {
        "rates": [10 ** (-6 + place / 10) for place in range(30)],
        "losses": [2 - place / 20 for place in range(30)],
        "smoothed": [2 - place / 20 for place in range(30)],
        "suggestion": 1e-4,
        "steepest": 1e-4,
        "diverged": None,
        "spec": dict.fromkeys(EVIL, EVIL[0]),
    }
    write_range_test(result, tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).shows(EVIL[0])


def test_a_report_s_json_holds_names_as_they_are(tmp_path):
    write_json(a_report(), tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["drift"].keys() == set(EVIL)


def test_names_in_pictures_stay_on_their_line():
    assert shorten("two\nlines\u202e", 40) == r"'two\nlines\u202e'"
    assert shorten("größe", 40) == "größe"


def test_a_comparison_on_a_terminal_shows_brackets_as_text(studies):
    """Rich takes [/b] for the end of a style that was never begun."""
    out = io.StringIO()
    result = studies.a_comparison(own={"a[/b] [red]c": (0.9, 0.9)}) | {"classes": True}
    Console(file=out, width=200).print(rich_table(Comparison(result).table()))
    assert "a[/b] [red]c" in out.getvalue()


def test_an_answer_is_one_line_of_three_columns():
    from conservtl.tasks.base import Prediction

    line = str(Prediction(Path("two\nlines\t\x1b[2J.wav"), "a\tb", 0.5))
    assert line == r"'two\nlines\t\x1b[2J.wav'" + "\t" + r"'a\tb'" + "\t0.500"
    assert str(Prediction(Path("größe 7.wav"), "é", 0.5)) == "größe 7.wav\té\t0.500"
