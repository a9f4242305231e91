"""The blocks of code in README and docs run unchanged."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_loop_in_the_readme_runs(capsys):
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "fresh" in out
    assert "× 0.8" in out


def test_the_code_in_the_docs_runs():
    (code,) = blocks((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "python")
    namespace = {}
    exec(compile(code, "docs/methods.md", "exec"), namespace)
    assert list(namespace["frontier"])[::10] == [0.0, 1.0]
    assert namespace["weights"].keys() == namespace["mean"].keys()


def test_the_docs_name_every_strategy():
    import conservtl as ctl

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") + README
    names = [n for n in ctl.__all__ if isinstance(getattr(ctl, n), type) and issubclass(getattr(ctl, n), ctl.Strategy)]
    assert [name for name in names if f"`{name}" not in text and name != "Strategy"] == []


def test_the_architecture_names_files_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    paths = [name for name in re.findall(r"`([\w/.-]+)`", text) if name.endswith((".py", "/", ".md"))]
    assert links
    assert len(paths) > 40
    places = (ROOT, ROOT / "conservtl", *(ROOT / "conservtl").iterdir())
    assert [name for name in [*links, *paths] if not any((place / name).exists() for place in places)] == []


def test_the_architecture_shows_the_import_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = project["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    chain = " > ".join(layers).replace("conservtl.", "")
    assert f"`{chain}`" in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_result_stands_within_the_first_30_lines():
    assert "target accuracy" in "\n".join(README.splitlines()[:30])


def test_the_two_commands_install_and_do_what_they_say():
    commands = [line for block in blocks(README, "sh") for line in block.splitlines() if "pip install" in line]
    assert len(commands) == 2
    assert "conservtl run examples/speech/spec.yaml" in commands[0]
    assert "&& pytest" in commands[1]


def test_the_first_command_adapts_to_the_voice(tmp_path):
    pytest.importorskip("espeakng_loader")
    line = next(line for block in blocks(README, "sh") for line in block.splitlines() if "conservtl run" in line)
    words = shlex.split(line.partition("&& conservtl ")[2])
    words[words.index("--out") + 1] = str(tmp_path / "out")
    command = [sys.executable, "-m", "conservtl.cli", *words, "--set", f"source.cache={tmp_path}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=600)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["target"]["accuracy"] < 0.6
    assert after["target"]["accuracy"] > 0.95
    assert after["source"]["accuracy"] > 0.9


def test_the_plan_is_shown_as_it_prints():
    command = [sys.executable, "-m", "conservtl.cli", "plan", "examples/vision/spec.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_every_command_of_ours_names_a_spec_and_fields_that_exist(document):
    from conservtl.experiments.spec.fields import with_values
    from conservtl.experiments.spec.search_space import ranges_of
    from conservtl.experiments.spec.spec import load_spec, parse_spec, read_content
    from conservtl.plugins import import_modules

    lines = [line for block in blocks(document.read_text(), "sh") for line in block.splitlines()]
    ours = [shlex.split(line) for line in lines if line.startswith("conservtl ")]
    assert ours or document == ROOT / "README.md"
    for _, verb, *words in ours:
        assert verb in {"plan", "run", "predict", "schema", "recommend", "lr-find", "compare", "sweep", "tune"}
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        import_modules(str(ROOT / words[i + 1]) for i, word in enumerate(words) if word == "--import")
        if verb == "tune":
            content = read_content(ROOT / words[0], overrides)
            parse_spec(with_values(content, {name: mark.first() for name, mark in ranges_of(content).items()}))
        elif verb not in ("predict", "schema"):
            load_spec(ROOT / words[0], overrides)
