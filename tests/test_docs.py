"""The pages of docs/: examples run and show the messages that they show, and the site builds without a warning."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import conservtl as ctl
from conservtl.experiments.spec.spec import parse_spec
from conservtl.methods import builtin_strategies

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site():
    """The scripts that make pages, by name."""
    before = set(sys.modules)
    sys.path.insert(0, str(DOCS / "site"))
    yield importlib.import_module
    sys.path.remove(str(DOCS / "site"))
    for name in set(sys.modules) - before:
        if str(DOCS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore::conservtl.OmissionWarning")
def test_messages_are_those_that_the_page_shows():
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```pycon\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(code, {}, "errors", "docs/errors.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert runner.tries > 10
    assert runner.failures == 0


@pytest.mark.parametrize(
    ("page", "shown"), [("first-run.md", "fresh"), ("studies.md", "fine-tuning, low rate"), ("tasks.md", "squared")]
)
def test_the_code_of_a_page_runs(capsys, page, shown):
    pytest.importorskip("scipy")
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for code in blocks:
        exec(compile(code, f"docs/{page}", "exec"), names)
    assert shown in capsys.readouterr().out


def test_other_inputs_in_a_plain_loop():
    """The plan of the loop holds the term, and the model moves by the loss of the batch and that on others."""
    text = (DOCS / "trainers" / "plain-loops.md").read_text()
    (code,) = [one for one in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "others" in one]
    names = {}
    exec(compile(code, "docs/trainers/plain-loops.md", "exec"), names)
    assert any(drift > 0 for drift in names["adaptation"].drift().values())


def test_the_sections_of_studies_are_those_of_a_spec():
    pytest.importorskip("sklearn")
    text = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "studies.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    fields = yaml.safe_load((ROOT / "examples" / "vision" / "spec.yaml").read_text()) | yaml.safe_load(text)
    spec = parse_spec(fields)
    assert list(spec.compare.variants) == ["spec", "strong", "no pull"]
    assert spec.sweep.strengths == (0.1, 1, 10)
    assert spec.tune.objective == "harmonic"


@pytest.mark.parametrize("name", builtin_strategies())
def test_a_method_has_a_page_with_all_its_fields(site, name):
    pytest.importorskip("latex2mathml")
    pytest.importorskip("griffe")
    page = site("method_pages").method_page(getattr(ctl, name))
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [heading for heading in headings if heading != "Raises"] == [
        "Cost", "Fields", "Measured", "Example", "Reference",
    ]  # fmt: skip
    fields = [field for field in getattr(ctl, name).model_fields if field != "kind"]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == fields
    assert ".. math" not in page
    assert ":math:" not in page
    assert "``" not in page.replace("```", "")


def test_a_method_that_was_measured_shows_its_row_of_the_benchmark(site):
    pytest.importorskip("griffe")
    page = site("method_pages").method_page(ctl.LPFT)
    row = next(line for line in (DOCS / "methods.md").read_text().splitlines() if line.startswith("| LPFT |"))
    assert row in page
    assert page.count("<svg") == 3


def test_links_lead_to_pages_or_to_the_repository(site):
    with_links = site("links").with_links
    text = (
        "[a](../benchmarks/results/x.md#part) [b](../.ci/run) [c](https://x.org) ![d](pictures/d.svg)\n```\n[e](f)\n```"
    )
    pages = {"benchmarks/results/x.md": "results/x.md", "docs/pictures/d.svg": "pictures/d.svg"}
    found = with_links(text, "docs/a.md", "methods/a.md", pages, "https://example.org/repo")
    assert found == (
        "[a](../results/x.md#part) [b](https://example.org/repo/blob/main/.ci/run) [c](https://x.org) "
        "![d](../pictures/d.svg)\n```\n[e](f)\n```"
    )
    assert "] b " not in with_links(text, "docs/a.md", "methods/a.md", pages, "")
    assert " b " in with_links(text, "docs/a.md", "methods/a.md", pages, "")


def test_the_table_of_choices_is_that_of_the_rules(site):
    """Ten classes of five examples are little data; an SVM is then fitted to frozen features if labels are new."""
    pytest.importorskip("scipy")
    rows = site("advice_table").advice_table().splitlines()[2:]
    assert len(rows) == 3 * 3 * 2
    assert all("(" in row for row in rows)
    assert "FeatureExtraction(classifier='svm'" in next(row for row in rows if row.startswith("| new labels | little"))
    assert "decay=0.9" in next(row for row in rows if "speaker | much | far" in row)


@pytest.mark.parametrize("page", ["choosing.md", "errors.md"])
def test_tables_in_the_pages_are_those_that_the_code_decides(site, page):
    """``python docs/site/tables.py`` writes them anew."""
    pytest.importorskip("scipy")
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert site("tables").filled(text) == text
    assert "\n| " in text


def test_formulas_are_drawn_without_a_script(site):
    pytest.importorskip("latex2mathml")
    formulas = pytest.importorskip("griffe") and site("formulas")
    text = formulas.markdown_of("a\n\n    .. math:: x^2\n              + 1\n\nwith :math:`x` and ``y``.")
    assert text == "a\n\n    $$\n    x^2 + 1\n    $$\n\nwith $x$ and `y`."
    html = formulas.with_mathml('<p>b <span class="arithmatex">\\(x &lt; 1\\)</span></p>')
    assert html.startswith("<p>b <math")
    assert "&lt;" in html or "&#x0003C;" in html


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pages = {str(path.parent.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("index.html")}
    kinds = {f"methods/{cls.model_fields['kind'].default}" for cls in builtin_strategies().values()}
    trainers = {f"trainers/{path.stem}" for path in (DOCS / "trainers").glob("*.md")}
    assert kinds | trainers | {".", "trainers", "idea", "choosing", "errors", "peers", "api/functions"} <= pages
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert home.index("language-diff") < home.index("language-sh")
    every = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!localhost)[^"]*"', every)
