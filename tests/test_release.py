"""Files that a release and its readers need: citation, workflows, templates, badges."""

import re
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

import conservtl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def content(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def events(workflow):
    return workflow[True]  # YAML 1.1 reads the key `on` as a boolean


def test_the_citation_is_valid_and_of_this_version():
    """The required keys of the Citation File Format 1.2.0, and those that this file may have of its optional ones."""
    citation = content(ROOT / "CITATION.cff")
    required = {"cff-version", "message", "title", "authors"}
    optional = {"abstract", "type", "version", "license", "keywords", "references", "date-released", "doi"}
    optional |= {"identifiers", "repository-code", "url"}
    assert required <= citation.keys() <= required | optional
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"] == PROJECT["name"]
    assert str(citation["version"]) == PROJECT["version"] == conservtl.__version__
    assert citation["license"] == PROJECT["license"]
    assert isinstance(citation.get("date-released", date(2026, 1, 1)), date)
    assert all(isinstance(word, str) for word in citation["keywords"])
    for work in [citation, *citation["references"]]:
        assert all(person.keys() in ({"name"}, {"family-names", "given-names"}) for person in work["authors"])
        assert {"authors", "title", "type"} <= work.keys()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_for_issues_is_one_that_can_be_filled_in(path):
    form = content(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert len({part["id"] for part in fields}) == len(fields) > 2
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_there_is_a_form_for_each_kind_of_issue():
    assert [path.stem for path in FORMS] == ["bug", "feature", "method"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_whole_and_may_do_little(path):
    """Every step runs something, every need is a job, and nothing may write to the repository."""
    workflow = content(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 40
        assert set([job.get("needs", [])] if isinstance(job.get("needs"), str) else []) <= workflow["jobs"].keys()
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_tests_run_on_every_python_that_the_package_names():
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    for name in ("ci", "release"):
        jobs = content(ROOT / ".github" / "workflows" / f"{name}.yml")["jobs"]
        assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS


def test_nothing_is_published_that_was_not_tested():
    """A tag builds, both kinds are tested in fresh environments, and the same files are published without a token."""
    workflow = content(ROOT / ".github" / "workflows" / "release.yml")
    jobs = workflow["jobs"]
    assert events(workflow) == {"push": {"tags": ["v*"]}}
    assert jobs["test"]["needs"] == "build"
    assert jobs["test"]["strategy"]["matrix"]["kind"] == ["whl", "tar.gz"]
    assert jobs["publish"]["needs"] == "test"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    commands = [step["run"] for step in jobs["test"]["steps"] if "run" in step]
    folders = re.findall(r"tests/\w+", "\n".join(commands))
    assert folders
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_checks_of_ci_are_those_of_the_script():
    jobs = content(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "bash .ci/run" in commands
    assert "mkdocs build --strict" in commands
    assert "pip-audit" in commands
    assert "bandit --quiet --configfile pyproject.toml --recursive conservtl" in script
