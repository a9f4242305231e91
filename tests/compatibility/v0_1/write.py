"""Write the files of this folder. Only with conservtl 0.1.0 as it was on the day they were written, never again.

Made from commit 3630a0e ("One place says what is wrong with a kind; ..."):

    PYTHONPATH=<that checkout> OMP_NUM_THREADS=1 python write.py

Run twice it writes the same bytes, but for the seconds that ``fit`` took (in ``fit/``, nothing depends on them).
Later versions must read these files; they must not write them anew. What each file is:

- ``plans/KIND.json``: name of a case -> the network of ``world.py`` and the number of its classes, the strategies as
  JSON, the facts that were found out before training, and the plan that ``adapt`` drew up, as JSON.
- ``checkpoints/NAME-OPTIMIZER.pt``: a loop by hand (``world.train``) after half of its steps: the states of model,
  optimizer and adaptation, the strategies, and ``after``, the model's state when all steps are done.
  ``checkpoints/source.pt``: the source weights they all start from. All in float64, so that another CPU agrees.
- ``fit/NAME/``: what ``fit(out=..., keep_frozen_outputs=False)`` left when Ctrl-C was pressed, ``checkpoint.pt`` and
  ``history.jsonl``; ``after.pt`` has the strategies, the training, and the model's state and the history of a run that
  was not stopped.
- ``runs/NAME/``: of a run's folder ``model.safetensors``, ``spec.yaml`` and, where something was measured,
  ``measured.safetensors``; ``expected.safetensors`` has two inputs and the probabilities that the model gave.
- ``studies/``: ``compare.json``, ``sweep.json`` and ``tune.json`` of small studies, and the ``report.json`` and
  ``history.jsonl`` of a run.
- ``specs/``: the examples' specs and some written here; ``specs/resolved``: the same with every default written out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
import world
import yaml
from conservtl.experiments.compare import compare
from conservtl.experiments.setting import prepare
from conservtl.experiments.sweep import sweep
from conservtl.experiments.tune import tune
from conservtl.report.files import write_json
from safetensors.torch import save_file

import conservtl as ctl
from conservtl.experiments.run import run
from conservtl.experiments.spec import dump_spec, load_spec, parse_spec  # gone in later versions, and so is this script

FOLDER = Path(__file__).parent
EXAMPLES = Path(ctl.__file__).parents[1] / "examples"

PLANS: dict[str, dict[str, Any]] = {
    "none": {"plain": [], "other labels": ([], {"classes": 2})},
    "l2_sp": {
        "coupled": [ctl.L2SP()],
        "decoupled, on all": [ctl.L2SP(alpha=3, mode="decoupled", on="all")],
        "depth": [ctl.L2SP(alpha=0.5, depth=(1, 0.1))],
        "depth, other labels": ([ctl.L2SP(alpha=0.5, beta=0.2, depth=(0.1, 1))], {"classes": 2}),
        "annealed": [ctl.L2SP(anneal=ctl.Anneal(steps=6, start=1, end=0.25))],
        "annealed as RecAdam": [ctl.L2SP(mode="decoupled", anneal=ctl.Anneal(steps=9, shape="sigmoid", rate=0.2))],
        "anchors in bf16": [ctl.L2SP(anchors="bf16")],
        "anchors on the cpu": [ctl.L2SP(mode="decoupled", anchors="cpu")],
        "normalised": ([ctl.L2SP(alpha=50, normalize="per_parameter")], {"classes": 2}),
        "recurrent": ([ctl.L2SP(on="all")], {"network": "recurrent"}),
    },
    "fisher_sp": {
        "coupled": [ctl.FisherSP()],
        "decoupled, other labels": ([ctl.FisherSP(alpha=2, mode="decoupled", on="all")], {"classes": 2}),
        "true, drawn, clipped": [ctl.FisherSP(fisher="true", draws=2, floor=0.1, clip=5, normalize="none")],
        "on source data": [ctl.FisherSP(data="source", mode="decoupled")],
    },
    "l1_sp": {"default": [ctl.L1SP()], "on all": ([ctl.L1SP(alpha=0.3, beta=None, on="all")], {"classes": 2})},
    "group_lasso_sp": {"other labels": ([ctl.GroupLassoSP(alpha=0.2)], {"classes": 2})},
    "projection": {
        "fixed": [ctl.Projection()],
        "fixed, by row": [ctl.Projection(radius=0.5, relative=False, by="row", norm="mars", on="all")],
        "learned": [ctl.Projection(radius="learn", steps=20, rate=0.1)],
    },
    "selective_decay": {"default": [ctl.SelectiveDecay()], "on all": [ctl.SelectiveDecay(strength=1, on="all")]},
    "mixout": {
        "default": [ctl.Mixout()],
        "recurrent": ([ctl.Mixout(p=0.4, on="all", seed=5)], {"network": "recurrent"}),
    },
    "output_conservation": {
        "rho": [ctl.OutputConservation()],
        "weight, other labels": ([ctl.OutputConservation(weight=0.3, temperature=3)], {"classes": 2}),
    },
    "feature_conservation": {
        "delta": [ctl.FeatureConservation()],
        "attention": [ctl.FeatureConservation(attention=True, layers=2)],
        "ldifs": [ctl.FeatureConservation(metric="ldifs", alpha=0.1, layers=("first", "second"))],
    },
    "spectral_shrinkage": {
        "default": [ctl.SpectralShrinkage()],
        "a layer": [ctl.SpectralShrinkage(eta=0.1, k=2, layer="first")],
    },
    "lp_ft": {"default": [ctl.LPFT()], "epochs": ([ctl.LPFT(epochs=2, probe=3, fine_tuning=0.1)], {"classes": 2})},
    "auto_rgn": {"default": [ctl.AutoRGN()], "floor": [ctl.AutoRGN(every=3, floor=0.1)]},
    "surgical_fine_tuning": {
        "first": [ctl.SurgicalFineTuning()],
        "a position": ([ctl.SurgicalFineTuning(block=1, head=True)], {"classes": 2}),
        "a glob": [ctl.SurgicalFineTuning(block="s*", head=True)],
        "best, unknown": [ctl.SurgicalFineTuning(block="best", trial_epochs=2)],
        "best, known": (
            [ctl.SurgicalFineTuning(block="best", candidates=("stem*", "body*"))],
            {"facts": {"surgical_block": "body*"}},
        ),
    },
    "lhuc": {
        "default": [ctl.LHUC()],
        "a layer, not frozen": [ctl.LHUC(on=("first",), freeze=False)],
        "recurrent": ([ctl.LHUC()], {"network": "recurrent", "classes": 2}),
    },
    "input_transform": {
        "default": [ctl.InputTransform()],
        "last axis, no bias": ([ctl.InputTransform(dim=-1, bias=False, freeze=False)], {"network": "recurrent"}),
    },
    "norm_adaptation": {
        "mixed": [ctl.NormAdaptation()],
        "target, nothing trained": ([ctl.NormAdaptation(train="nothing", statistics="target")], {"classes": 2}),
        "source, head": [ctl.NormAdaptation(statistics="source", head=True)],
        "instance": [ctl.NormAdaptation(train="all", statistics="instance", prior=9)],
        "left out": ([ctl.NormAdaptation(train="all", required=False)], {"network": "recurrent"}),
    },
    "weight_interpolation": {
        "t": [ctl.WeightInterpolation(t=0.6, batch_norm="recompute")],
        "the best": [ctl.WeightInterpolation(t=None, points=5)],
    },
    "layer_transfer": {
        "input side": [ctl.LayerTransfer(side="input", layers=2)],
        "output side, rest fresh": [ctl.LayerTransfer(side="output", layers=0.5, rest="fresh", freeze=False)],
        "globs": ([ctl.LayerTransfer(layers=("stem*", "first"))], {"classes": 2}),
    },
    "discriminative_lr": {
        "decay": [ctl.DiscriminativeLR(decay=0.5)],
        "lowest, toward the input": [ctl.DiscriminativeLR(lr=0.01, lowest=0.001, toward="input")],
        "thirds": ([ctl.DiscriminativeLR(thirds=(0.1, 0.3, 1), decay_biases_and_norms=False)], {"classes": 2}),
        "groups": [ctl.DiscriminativeLR(groups={"stem*": 0.1, "head.bias": 2})],
        "source and fresh": ([ctl.DiscriminativeLR(source=1e-5, fresh=1e-3)], {"classes": 2}),
    },
    "gradual_unfreezing": {
        "head": [ctl.GradualUnfreezing(epochs=2, scales=(1, 0.5))],
        "layers, input first": [ctl.GradualUnfreezing(by="layer", epochs=0.1, at="input")],
        "written out": [
            ctl.GradualUnfreezing(phases=(ctl.Stage(train=("head",), epochs=3), ctl.Stage(train=None, scale=0.1)))
        ],
    },
    "feature_extraction": {
        "linear": [ctl.FeatureExtraction()],
        "svm": ([ctl.FeatureExtraction(classifier="svm")], {"classes": 2}),
        "logistic": [ctl.FeatureExtraction(classifier="logistic", C=2)],
        "ncm of two layers": [ctl.FeatureExtraction(classifier="ncm", layers=("body*", "second"))],
    },
    "several": {
        "pull, rates, unfreezing": (
            [ctl.L2SP(depth=(1, 0.5)), ctl.DiscriminativeLR(decay=0.5), ctl.GradualUnfreezing(by="layer")],
            {"classes": 2},
        ),
        "decoupled pull, instance statistics": [
            ctl.L2SP(mode="decoupled", alpha=15),
            ctl.NormAdaptation(train="all", statistics="instance", prior=5),
        ],
        "frozen input side, Fisher": [ctl.LayerTransfer(layers=1), ctl.FisherSP(), ctl.AutoRGN(every=2)],
        "terms and updates": [
            ctl.OutputConservation(weight=0.1),
            ctl.FeatureConservation(attention=True),
            ctl.Mixout(),
            ctl.Projection(),
            ctl.WeightInterpolation(t=None),
        ],
        "added twice": [ctl.InputTransform(), ctl.LHUC(), ctl.L2SP()],
        "recipe for a speaker": list(ctl.recipe("speaker").strategies),
        "recipe for vision": list(ctl.recipe("vision").strategies),
    },
}
"""Kind -> name -> strategies, and what differs from a conv network with the source's three classes."""

UNFREEZING = ctl.GradualUnfreezing(by="layer", scales=(1.0, 0.5))
CHECKPOINTS: dict[str, Sequence[ctl.Strategy]] = {
    "l2_sp": [ctl.L2SP(alpha=0.5)],
    "l2_sp_annealed": [ctl.L2SP(alpha=2, mode="decoupled", anneal=ctl.Anneal(steps=6))],
    "fisher_sp": [ctl.FisherSP(alpha=0.5)],
    "mixout": [ctl.Mixout(p=0.5)],
    "auto_rgn": [ctl.AutoRGN(every=3)],
    "l1_sp": [ctl.L1SP(alpha=0.05)],
    "instance_statistics": [ctl.NormAdaptation(train="all", statistics="instance")],
    "lhuc": [ctl.LHUC(freeze=False)],
    "gradual_unfreezing": [UNFREEZING, ctl.DiscriminativeLR(decay=0.5)],
    "attention": [ctl.FeatureConservation(attention=True, alpha=0.5)],
}
"""Of a loop by hand, with AdamW."""
WITH_SGD = ("l2_sp", "l2_sp_annealed", "mixout", "auto_rgn", "l1_sp", "gradual_unfreezing")
"""Those with SGD, too."""

FITS: dict[str, Sequence[ctl.Strategy]] = {
    "l2_sp_unfreezing": [ctl.L2SP(alpha=0.5), UNFREEZING],
    "instance_statistics": [ctl.NormAdaptation(train="all", statistics="instance"), ctl.L2SP(mode="decoupled")],
}
TRAINING = ctl.Training(epochs=4, batch_size=16, lr=0.01, schedule="cosine", device="cpu")

FEATURES = {"n_mels": 8, "hop": 0.05, "window": 0.06, "length": 0.5}
SPEECH = {
    "task": "speech",
    "model": {"name": "tc_resnet8", "args": {"width": 0.2}},
    "data": {"kind": "folder", "root": "humming", "target": "cleo", "shots": 2, "features": FEATURES},
    "source": {"training": {"epochs": 3, "lr": 3e-3, "evaluate_every": 100}, "cache": "cache"},
    "training": {"epochs": 3, "lr": 3e-3},
}
DIGITS = {
    "task": "vision",
    "model": {
        "name": "timm/vit_tiny_patch16_224",
        "args": {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "mlp_ratio": 2},
    },
    "data": {"kind": "digits", "shots": 2, "images": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}},
    "source": {"training": {"epochs": 1, "lr": 3e-3, "evaluate_every": 9}, "cache": "cache"},
    "training": {"epochs": 2, "lr": 3e-3, "evaluate_every": 5},
}
DEEP = {"name": "DeepSpeech", "args": {"n_hidden": 8, "dropout": 0.0}}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {**SPEECH, "strategies": [{"kind": "l2_sp", "mode": "decoupled"}]},
    "lhuc": {**SPEECH, "model": DEEP, "strategies": [{"kind": "lhuc", "freeze": False}, {"kind": "l2_sp"}]},
    "input_transform": {**SPEECH, "strategies": [{"kind": "input_transform"}, {"kind": "lhuc"}]},
    "instance_statistics": {**SPEECH, "strategies": {"recipe": "speaker"}},
    "fisher": {**SPEECH, "strategies": [{"kind": "ewc", "alpha": 0.5}]},
    "digits": {**DIGITS, "strategies": [{"kind": "layer_transfer", "layers": 1}, {"kind": "l2_sp"}]},
}
"""A few seconds in all: three speakers who hum three words, and scikit-learn's digits."""

STUDIED = {
    **SPEECH,
    "source": {"training": {"epochs": 20, "lr": 1e-2, "evaluate_every": 100}, "cache": "cache"},
    "strategies": [{"kind": "l2_sp", "mode": "decoupled"}],
    "training": {"epochs": 10, "lr": 1e-2},
}
STUDIES: dict[str, dict[str, Any]] = {
    "compare": {
        **STUDIED,
        "compare": {
            "targets": ["ben", "cleo"],
            "seeds": 1,
            "shots": [1, 2],
            "baselines": ["source as it is", "linear probe", "fine-tuning, low rate", "joint training"],
            "variants": {"pulled": {}, "pulled hard": {"strategies.0.alpha": 100.0}},
        },
    },
    "sweep": {
        **STUDIED,
        "sweep": {"targets": ["cleo"], "seeds": 1, "layers": [0, 2], "strengths": [1.0, 10.0], "controls": False},
    },
    "tune": {
        **STUDIED,
        "data": {**SPEECH["data"], "validation": 0.5},
        "training": {"epochs": 5, "lr": {"range": [1e-4, 1e-2], "log": True}},
        "tune": {"trials": 3},
    },
}
"""Of studies on the same speakers: what each varies."""

WRITTEN: dict[str, dict[str, Any]] = {
    "aliases": {
        "task": "speech",
        "data": {"kind": "espeak"},
        "strategies": [
            {"kind": "l2sp", "alpha": 0.5},
            {"kind": "bss", "k": 2},
            {"kind": "delta", "layers": ["stem"]},
            {"kind": "ewc", "alpha": 2},
            {"kind": "kld"},
            {"kind": "spd"},
            {"kind": "ldifs"},
            {"kind": "lwf", "temperature": 3},
            {"kind": "wise_ft", "t": 0.5},
        ],
    },
    "recipe": {
        "task": "speech",
        "data": {"kind": "folder", "root": "somewhere", "target": "theo", "augment": {"noise": 0}},
        "strategies": {"recipe": "speaker"},
        "training": {"epochs": 7},
    },
    "many": {
        "task": "vision",
        "data": {"kind": "imagefolder", "root": "images", "corruption": {"name": "contrast", "severity": 2}},
        "source": {"weights": "weights.pt", "data": None, "labels": ["cat", "dog"]},
        "strategies": [{"kind": "l2_sp"}, {"kind": "weight_interpolation", "t": None}],
        "layers": ["conv1*", "layer1*", "linear*"],
        "seed": 4,
        "compare": {"shots": [1, 5], "variants": {"strong": {"strategies.0.alpha": 30}}, "targets": ["contrast"]},
        "sweep": {"layers": [0, 1], "sides": ["input"], "strategy": {"kind": "l2_sp"}, "strengths": [0, 1]},
        "tune": {"trials": 3, "objective": "both", "prune": False},
    },
    "commands": {
        "task": "speech",
        "data": {"kind": "speechcommands", "root": "commands", "target": "0a7c2a8d", "words": ["yes", "no"]},
        "strategies": [{"kind": "gradual_unfreezing", "phases": [{"train": ["head"], "epochs": 2}, {"scale": 0.5}]}],
        "training": {"optimizer": "sgd", "clip": 1, "keep": "last", "weight_decay": 0.1},
    },
}


def as_json(strategies: Sequence[ctl.Strategy]) -> list[dict[str, Any]]:
    """As a spec would hold them."""
    return [one.model_dump(mode="json") for one in strategies]


def write_plans(folder: Path) -> None:
    """A file a kind, one case a line."""
    folder.mkdir()
    for kind, cases in PLANS.items():
        lines = []
        for name, given in cases.items():
            strategies, differing = given if isinstance(given, tuple) else (given, {})
            case = {"network": "conv", "classes": 3, "facts": {}, **differing}
            model, example = world.network(case["network"], case["classes"])
            adaptation = ctl.adapt(model, world.source(case["network"]), strategies, example=example)
            if case["facts"]:
                adaptation.decide(**case["facts"])
            case |= {"strategies": as_json(strategies), "plan": adaptation.plan.model_dump(mode="json")}
            lines.append(f"{json.dumps(name)}: {json.dumps(case, separators=(',', ':'))}")
        (folder / f"{kind}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def small(strategies: Sequence[ctl.Strategy]) -> ctl.Adaptation:
    """What is trained."""
    model, example = world.network("small", 3)
    return ctl.adapt(model, world.source("small"), strategies, example=example)


def write_checkpoints(folder: Path) -> None:
    """Half-way through a loop by hand."""
    folder.mkdir()
    torch.save(world.source("small"), folder / "source.pt")
    batches = world.batches()
    for name, strategies in CHECKPOINTS.items():
        for kind in ("adamw", "sgd") if name in WITH_SGD else ("adamw",):
            cls, options = world.OPTIMIZERS[kind]
            adaptation = small(strategies)
            if adaptation.outstanding():
                adaptation.measure(batches)
            optimizer = adaptation.optimizer(cls, **options)
            world.train(adaptation, optimizer, batches[: world.HALF])
            content = {
                "strategies": as_json(strategies),
                "model": {name: tensor.clone() for name, tensor in adaptation.model.state_dict().items()},
                "adaptation": adaptation.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(content, folder / f"{name}-{kind}.pt")  # before training goes on in the same tensors
            world.train(adaptation, optimizer, batches[world.HALF :], first=world.HALF)
            content = torch.load(folder / f"{name}-{kind}.pt", weights_only=True)
            torch.save({**content, "after": adaptation.model.state_dict()}, folder / f"{name}-{kind}.pt")


def write_fits(folder: Path) -> None:
    """What Ctrl-C leaves of ``fit``, and what it would have come to."""
    data = world.data()
    for name, strategies in FITS.items():
        training = TRAINING.model_copy(update={"keep": "last" if UNFREEZING in strategies else "target"})
        options = {"valid": {"target": data}, "training": training, "seed": world.SEED, "keep_frozen_outputs": False}
        adaptation = small(strategies)
        result = ctl.fit(adaptation, data, **options)
        world.interrupting.calls = 0
        try:
            ctl.fit(small(strategies), data, forward=world.interrupting, out=folder / name, **options)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it was not interrupted")
        after = {
            "strategies": as_json(strategies),
            "training": training.model_dump(mode="json"),
            "model": adaptation.model.state_dict(),
            "history": [dict(line) for line in result.history],
        }
        torch.save(after, folder / name / "after.pt")


def hum(root: Path) -> None:
    """Three speakers who hum three words at their own pitch, as in tests/conftest.py."""
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(4000) / 8000
    for speaker, pitch in {"anna": 1.0, "ben": 0.9, "cleo": 1.25}.items():
        for number in range(3):
            for take in range(8):
                tone = torch.sin(2 * math.pi * 300 * 2**number * pitch * seconds * (1 + 0.01 * take))
                noise = 0.05 * torch.randn(4000, generator=generator)
                soundfile.write(root / f"{number}_{speaker}_{take}.wav", (0.3 * tone + noise).numpy(), 8000)


def write_runs(folder: Path) -> None:
    """Runs in a folder that is thrown away, so that the paths in their specs are relative."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        hum(Path("humming"))
        for name, fields in RUNS.items():
            spec = parse_spec(fields)
            if name == "instance_statistics":
                spec = spec.model_copy(update={"training": spec.training.model_copy(update={"epochs": 5})})
            run(spec, name)
            inputs = prepare(spec).domains.target_test
            inputs = inputs.inputs[:2] if hasattr(inputs, "inputs") else torch.stack([inputs[i][0] for i in range(2)])
            (folder / name).mkdir(parents=True)
            for file in ("model.safetensors", "measured.safetensors", "spec.yaml"):
                if (Path(name) / file).is_file():
                    shutil.copy(Path(name) / file, folder / name / file)
            expected = {"inputs": inputs.clone(), "probabilities": ctl.load(name).probabilities(inputs)}
            save_file(expected, folder / name / "expected.safetensors")
            (folder / name / "expected.safetensors").chmod(0o644)
        os.chdir(FOLDER)


def write_studies(folder: Path) -> None:
    """A comparison, a sweep and a search, small enough for seconds, as the command line writes them."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        hum(Path("humming"))
        folder.mkdir(parents=True)
        for name, study in {"compare": compare, "sweep": sweep}.items():
            write_json(study(parse_spec(STUDIES[name]), name), folder / f"{name}.json")
        write_json(tune(STUDIES["tune"], "tune"), folder / "tune.json")
        run(parse_spec(STUDIED), "run")
        for file in ("report.json", "history.jsonl"):
            shutil.copy(Path("run") / file, folder / file)
        os.chdir(FOLDER)


def write_specs(folder: Path) -> None:
    """As people write them, and with every default written out."""
    (folder / "resolved").mkdir(parents=True)
    for path in sorted(EXAMPLES.glob("*/*.yaml")):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    for name, fields in WRITTEN.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    for path in sorted(folder.glob("*.yaml")):
        (folder / "resolved" / path.name).write_text(dump_spec(load_spec(path)), encoding="utf-8")


def main() -> None:
    """Write everything anew."""
    if ctl.__version__ != "0.1.0" or "pull" not in ctl.Row.model_fields:
        raise SystemExit("These files are those of conservtl 0.1.0: later versions read them and never write them.")
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    writers: Mapping[str, Any] = {
        "plans": write_plans,
        "checkpoints": write_checkpoints,
        "fit": write_fits,
        "runs": write_runs,
        "studies": write_studies,
        "specs": write_specs,
    }
    for name, write in writers.items():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        write(FOLDER / name)


if __name__ == "__main__":
    main()
