"""Files that version 0.1.0 wrote are read by this one, and mean the same. ``v0_1/write.py`` says what each is."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import conservtl as ctl
from conservtl.experiments.spec.spec import dump_spec, load_spec
from conservtl.experiments.studies.variants import baseline_ids
from conservtl.report import write_compare, write_html, write_sweep, write_tune
from conservtl.report.text.variants import variants

FOLDER = Path(__file__).parent / "v0_1"
PLANS = [(path.stem, name) for path in sorted(FOLDER.glob("plans/*.json")) for name in json.loads(path.read_text())]
CHECKPOINTS = sorted(path.stem for path in FOLDER.glob("checkpoints/*-*.pt"))
FITS = sorted(path.name for path in FOLDER.glob("fit/*"))
RUNS = sorted(path.name for path in FOLDER.glob("runs/*"))
SPECS = sorted(path.name for path in FOLDER.glob("specs/*.yaml"))


def _world() -> Any:
    spec = importlib.util.spec_from_file_location("world_of_v0_1", FOLDER / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _world()


def read(name: str) -> Any:
    return torch.load(FOLDER / name, weights_only=True)


def small(strategies: list[dict[str, Any]], shift: float = 0.0) -> ctl.Adaptation:
    """What the checkpoints are of, adapted anew from the source that was saved, or from one with other values."""
    model, example = world.network("small", 3)
    source = {name: tensor + shift if shift else tensor for name, tensor in read("checkpoints/source.pt").items()}
    return ctl.adapt(model, source, strategies, example=example)


def resumed(name: str, shift: float = 0.0) -> tuple[ctl.Adaptation, dict[str, Any]]:
    """A loop by hand that went on from a checkpoint to its end, and what the file says of it."""
    found = read(f"checkpoints/{name}.pt")
    adaptation = small(found["strategies"], shift)
    adaptation.model.load_state_dict(found["model"])
    adaptation.load_state_dict(found["adaptation"])
    assert adaptation.phase == found["adaptation"]["phase"]
    cls, options = world.OPTIMIZERS[name.rpartition("-")[2]]
    optimizer = adaptation.optimizer(cls, **options)
    optimizer.load_state_dict(found["optimizer"])
    world.train(adaptation, optimizer, world.batches()[world.HALF :], first=world.HALF)
    return adaptation, found


def assert_same(found: Any, expected: Any) -> None:
    """Hold two state dicts to the same names and values."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


CHANGED = {"fused": (False, "auto")}
"""Field -> a default that was, and the one that is; on a CPU both mean the same."""


def assert_keeps(now: Any, then: Any, where: str = "") -> None:
    """Hold what is read to every value that was written; it may have more fields."""
    if isinstance(then, dict):
        assert isinstance(now, dict), where
        for key, value in then.items():
            assert key in now, f"{where}.{key}"
            if (value, now[key]) == CHANGED.get(key):
                continue
            assert_keeps(now[key], value, f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for place, (a, b) in enumerate(zip(now, then, strict=True)):
            assert_keeps(a, b, f"{where}.{place}")
    else:
        assert now == then, where


def test_every_file_is_here():
    """Nothing was lost on the way: an empty folder would pass every test below."""
    assert (len(PLANS), len(CHECKPOINTS), len(FITS), len(RUNS), len(SPECS)) == (76, 16, 2, 6, 10)
    classes = [found for name in ctl.__all__ if isinstance(found := getattr(ctl, name), type)]
    kinds = {one.model_fields["kind"].default for one in classes if issubclass(one, ctl.Strategy)}
    assert kinds >= {kind for kind, _ in PLANS} - {"none", "several"}


@pytest.mark.parametrize(("kind", "name"), PLANS, ids=lambda part: part.replace(" ", "_"))
def test_an_old_plan_is_the_plan_of_today(kind, name):
    """The plan read from the file equals the one that the same strategies draw up now."""
    case = json.loads((FOLDER / "plans" / f"{kind}.json").read_text())[name]
    model, example = world.network(case["network"], case["classes"])
    adaptation = ctl.adapt(model, world.source(case["network"]), case["strategies"], example=example)
    if case["facts"]:
        adaptation.replan(**case["facts"])
    assert ctl.Plan(**_with_reasons_of_today(case["plan"], adaptation.plan)) == adaptation.plan


def _with_reasons_of_today(plan: dict[str, Any], today: ctl.Plan) -> dict[str, Any]:
    """The plan of a file, with the one text about fresh parameters that is worded otherwise now."""
    for row in plan["rows"]:
        if row["reason"] == "not asked for":
            row["reason"] = today[row["name"]].reason
            assert row["reason"].startswith("declared fresh by ")
        if (choice := today[row["name"]].chosen.get("weight_decay")) and "weight_decay" not in row["chosen"]:
            # decay_biases_and_norms was the default, and is a choice that the plan shows now.
            assert choice.by == "DiscriminativeLR"
            assert row["kind"] != "weight"
            assert row["weight_decay"]
            row["chosen"]["weight_decay"] = choice.model_dump()
    return plan


@pytest.mark.parametrize(("kind", "name"), PLANS, ids=lambda part: part.replace(" ", "_"))
def test_an_old_plan_is_itself_after_json(kind, name):
    """Writing the plan again and reading that loses nothing."""
    plan = ctl.Plan(**json.loads((FOLDER / "plans" / f"{kind}.json").read_text())[name]["plan"])
    assert ctl.Plan(**json.loads(plan.model_dump_json())) == plan
    assert str(plan)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_goes_on_from_an_old_checkpoint(name):
    """A loop by hand that resumes reaches the weights that version 0.1.0 reached."""
    adaptation, found = resumed(name)
    assert any(not torch.equal(found["model"][key], value) for key, value in found["after"].items())
    assert_same(adaptation.model.state_dict(), found["after"])


@pytest.mark.parametrize("name", ["l2_sp-adamw", "l2_sp_annealed-sgd", "fisher_sp-adamw", "l1_sp-sgd", "mixout-sgd"])
def test_anchors_come_from_an_old_checkpoint(name):
    """The saved anchors hold the weights, not those of the source that is given now."""
    adaptation, found = resumed(name, shift=0.5)
    assert_same(adaptation.model.state_dict(), found["after"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_anew_reaches_the_old_weights(name):
    """The same loop from its first step makes the same checkpoint and ends at the same weights.

    AdamW's weight decay acted on biases and norms by default then, and is asked for now.
    """
    found = read(f"checkpoints/{name}.pt")
    decayed = [{"kind": "discriminative_lr", "decay": 1.0, "decay_biases_and_norms": True}]
    rates = any(strategy["kind"] == "discriminative_lr" for strategy in found["strategies"])  # its default asks for it
    adaptation = small([*found["strategies"], *(decayed if name.endswith("adamw") and not rates else [])])
    batches = world.batches()
    if adaptation.outstanding():
        adaptation.measure(batches)
    cls, options = world.OPTIMIZERS[name.rpartition("-")[2]]
    optimizer = adaptation.optimizer(cls, **options)
    world.train(adaptation, optimizer, batches[: world.HALF])
    assert_same({key: value.clone() for key, value in adaptation.model.state_dict().items()}, found["model"])
    world.train(adaptation, optimizer, batches[world.HALF :], first=world.HALF)
    assert_same(adaptation.model.state_dict(), found["after"])


@pytest.mark.parametrize("name", FITS)
def test_fit_resumes_an_old_run(name, tmp_path):
    """It ends at the weights and the history of the run that was not interrupted."""
    expected = read(f"fit/{name}/after.pt")
    for file in ("checkpoint.pt", "history.jsonl"):
        shutil.copy(FOLDER / "fit" / name / file, tmp_path / file)
    begun = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert 0 < len(begun) < len(expected["history"])
    adaptation = small(expected["strategies"])
    data = world.data()
    result = ctl.fit(
        adaptation,
        data,
        {"target": data},
        ctl.Training(**expected["training"]),
        seed=world.SEED,
        keep_frozen_outputs=False,
        out=tmp_path,
        resume=True,
    )
    assert_same(adaptation.model.state_dict(), expected["model"])
    assert len(result.history) == len(expected["history"])
    for now, then in zip(result.history, expected["history"], strict=True):
        for key in set(then) - {"seconds", "target", "valid"}:
            assert now[key] == (pytest.approx(then[key], rel=1e-5) if isinstance(then[key], float) else then[key])
        assert now["valid"]["target"] == pytest.approx(then["valid"]["target"], rel=1e-5)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][: len(begun)] == begun


def _needs(name: str) -> None:
    for module in ("timm", "torchvision") if name == "digits" else ("torchaudio", "soundfile"):
        pytest.importorskip(module)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_model_predicts_as_it_did(name):
    """A run's folder is loaded and gives the probabilities that version 0.1.0 gave."""
    _needs(name)
    folder = FOLDER / "runs" / name
    expected = load_file(folder / "expected.safetensors")
    adapted = ctl.load_adapted(folder)
    torch.testing.assert_close(
        adapted.probabilities(expected["inputs"]), expected["probabilities"], rtol=1e-4, atol=1e-5
    )
    assert len(adapted.labels) == expected["probabilities"].shape[1]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_model_is_a_source(name):
    """All that its file of weights holds is copied, what was added to the model included."""
    _needs(name)
    path = FOLDER / "runs" / name / "model.safetensors"
    adaptation = ctl.adapt(ctl.load_adapted(path).model, path, [ctl.L2SP()], example=_inputs(name))
    weights = {key for key in load_file(path) if not key.endswith("num_batches_tracked")}
    assert set(adaptation.transfer.copied) >= weights


def _inputs(name: str) -> torch.Tensor:
    return load_file(FOLDER / "runs" / name / "expected.safetensors")["inputs"]


def test_old_headers_are_of_three_kinds():
    """Among the models are one with amplitudes left in, one with a transform, and one that mixes statistics."""
    kept = {name: set(load_file(FOLDER / "runs" / name / "model.safetensors")) for name in RUNS}
    assert any(key.endswith(".lhuc") for key in kept["lhuc"])
    assert "input_transform.weight" in kept["input_transform"]
    content = (FOLDER / "runs" / "instance_statistics" / "model.safetensors").read_bytes()
    assert b"instance_statistics" in content


def test_an_old_fisher_weighs_a_pull_again():
    """What a run measured is taken by an adaptation of its model."""
    _needs("fisher")
    folder = FOLDER / "runs" / "fisher"
    model = ctl.load_adapted(folder).model
    adaptation = ctl.adapt(model, folder / "model.safetensors", [ctl.FisherSP(alpha=1)], example=_inputs("fisher"))
    found = {key.partition("/")[2]: tensor for key, tensor in load_file(folder / "measured.safetensors").items()}
    adaptation.use_measured("fisher", found)
    assert not adaptation.outstanding()
    with torch.no_grad():
        model.head.weight.add_(0.5)
    assert adaptation.penalty().item() == pytest.approx(0.5 * 0.25 * found["head.weight"].sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_an_old_spec_means_what_it_meant(name):
    """Every field that version 0.1.0 wrote out, defaults and recipes included, has its value still."""
    then = yaml.safe_load((FOLDER / "specs" / "resolved" / name).read_text())
    assert_keeps(load_spec(FOLDER / "specs" / name).model_dump(mode="json"), then)


WRITTEN_OUT = [*(f"specs/resolved/{name}" for name in SPECS), *(f"runs/{name}/spec.yaml" for name in RUNS)]


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_spec_written_out_is_read_and_keeps_every_field(name, tmp_path):
    """It loads, has all that the file has, and is itself when it is written and read again."""
    spec = load_spec(FOLDER / name)
    assert_keeps(yaml.safe_load(dump_spec(spec)), yaml.safe_load((FOLDER / name).read_text()))
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "spec.yaml") == spec


def study(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "studies" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "write", "shown"),
    [
        ("compare", write_compare, ["fine-tuning, low rate", "the best baseline", "uses source data: an upper bound"]),
        ("sweep", write_sweep, ["AnB"]),
        ("tune", write_tune, ["training.lr"]),
    ],
)
def test_an_old_study_is_shown(name, write, shown, tmp_path):
    write(study(name), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert [text for text in shown if text not in page] == []


def test_an_old_report_is_shown(tmp_path):
    history = [json.loads(line) for line in (FOLDER / "studies" / "history.jsonl").read_text().splitlines()]
    report = study("report")
    write_html(report, history, tmp_path / "page.html")
    assert report["sentence"] in (tmp_path / "page.html").read_text()


def test_variants_without_an_id_have_the_role_of_their_label():
    """Today's comparison gives each baseline the same role."""
    for table in study("compare")["tables"]:
        rows = variants(table)
        today = {label: role for label, (_, role) in baseline_ids().items()}
        assert [row.role for row in rows] == [today.get(row.name, "method") for row in rows]
        assert {row.role for row in rows} == {"source", "baseline", "bound", "method"}
        assert [row.name for row in rows if row.best] == ["fine-tuning, low rate"]
