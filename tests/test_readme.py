"""The blocks of code in README and docs run unchanged."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

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


@pytest.fixture(scope="module")
def own_loop(tmp_path_factory):
    """The first block of code: lines before and after the change, and what a user's script has before them."""
    (diff,) = blocks(README, "diff")
    before, after = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +")
    )
    path = tmp_path_factory.mktemp("source") / "source.pt"
    torch.manual_seed(0)
    batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(5)]

    def network(classes):
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, classes))

    torch.save(network(3).state_dict(), path)

    def run(code):
        torch.manual_seed(1)
        given = {"torch": torch, "network": network, "batches": batches, "cross_entropy": cross_entropy}
        exec(compile(code.replace("source.pt", str(path)), "README.md", "exec"), given)
        return given

    return diff, before, after, run, torch.load(path)


def test_the_first_code_changes_three_lines_of_a_loop(own_loop):
    diff, before, _, _, _ = own_loop
    assert README.index("```diff") < README.index("```sh")
    assert sum(line.startswith("+") for line in diff.splitlines()) == 3
    assert "conservtl" not in before
    assert "ctl" not in before


def test_both_sides_of_that_change_run_and_the_second_has_rates_and_the_pull(own_loop):
    """Against AdamW by hand: the pull 0.1 (w - w0) in the gradient of weights, no decay, 0.8 of the rate below."""
    _, before, after, run, start = own_loop
    plain = run(before)["model"].state_dict()
    adapted = run(after)["model"].state_dict()
    given = run("model = network(classes=3)")
    model = given["model"]
    model.load_state_dict(start)
    groups = [
        {"params": [model[0].weight], "lr": 8e-4, "weight_decay": 0.0},
        {"params": [model[0].bias], "lr": 8e-4, "weight_decay": 0.0},
        {"params": [model[2].weight], "lr": 1e-3, "weight_decay": 0.0},
        {"params": [model[2].bias], "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for inputs, labels in given["batches"]:
        cross_entropy(model(inputs), labels).backward()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.grad.add_(parameter.detach() - start[name], alpha=0.1)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(adapted[name], tensor)
        assert not torch.allclose(adapted[name], plain[name])


def test_the_badges_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = re.findall(r"!\[([^]]*)\]\(([^)]*)\)", README.splitlines()[2])
    (workflow, url), (pythons, _), (licence, _) = badges
    assert (ROOT / ".github" / "workflows" / f"{workflow}.yml").is_file()
    assert url == f"../../actions/workflows/{workflow}.yml/badge.svg"
    versions = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert pythons == f"Python {versions[0]} to {versions[-1]}"
    assert licence == project["license"]
    for text, address in badges[1:]:
        shown = re.search(r"badge/\w+-(.*)-blue$", address)[1].replace("--", "-").replace("_", " ")
        assert text.removeprefix("Python ") == shown


def test_the_readme_says_whether_a_release_can_be_installed():
    """It promises no package on an index while the changelog says that there is none."""
    released = "(unreleased)" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert ("Until the first release" in README) != released


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


def test_the_first_command_adapts_to_the_voice(python, tmp_path):
    pytest.importorskip("espeakng_loader")
    line = next(line for block in blocks(README, "sh") for line in block.splitlines() if "conservtl run" in line)
    words = shlex.split(line.partition("&& conservtl ")[2])
    words[words.index("--out") + 1] = str(tmp_path / "out")
    done = python("-m", "conservtl.cli", *words, "--set", f"source.cache={tmp_path}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["target"]["accuracy"] < 0.6
    assert after["target"]["accuracy"] > 0.95
    assert after["source"]["accuracy"] > 0.9


def test_the_plan_is_shown_as_it_prints(python):
    done = python("-m", "conservtl.cli", "plan", "examples/vision/spec.yaml")
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
