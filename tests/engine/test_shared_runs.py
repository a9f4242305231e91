"""Runs shared by 2 and 3 processes (gloo), replicated and sharded, give what one process gives.

One group of processes for each number of them makes all runs, as starting processes is what takes time.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import conservtl as ctl
from conservtl.methods.registry import builtin_strategies

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

TOGETHER = 6  # examples a step of all processes
STEPS = 24


class Block(nn.Module):
    """A residual block, the unit of sharding."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.one, self.two = norm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.two(torch.tanh(self.one(self.norm(x))))


def network(seed=0, norm=nn.LayerNorm):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), Block(norm), Block(norm), nn.Linear(8, 3))


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


class Rows(Dataset):
    """The same examples, read one by one."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, row):
        return self.inputs[row], self.labels[row]


TRAIN, VALID = data(37, 1), data(29, 2)  # neither divides by 2, 3 or 6

STRATEGIES = {
    "none": [],
    "l2_sp": [ctl.L2SP(alpha=0.5, beta=0.1)],
    "l2_sp, decoupled": [ctl.L2SP(alpha=0.5, mode="decoupled")],
    "l2_sp, on the CPU": [ctl.L2SP(alpha=0.5, anchors="cpu")],
    "layer_transfer": [ctl.LayerTransfer(side="input", layers=2)],
    "discriminative_lr": [ctl.DiscriminativeLR(decay=0.7)],
    "gradual_unfreezing": [ctl.GradualUnfreezing(by="layer"), ctl.L2SP()],
    "feature_extraction": [ctl.FeatureExtraction()],
    "feature_extraction, ncm": [ctl.FeatureExtraction(classifier="ncm")],
    "fisher_sp": [ctl.FisherSP(alpha=0.5)],
    "l1_sp": [ctl.L1SP(alpha=0.05)],
    "group_lasso_sp": [ctl.GroupLassoSP(alpha=0.05)],
    "projection": [ctl.Projection(radius=0.1)],
    "selective_decay": [ctl.SelectiveDecay(strength=2.0)],
    "auto_rgn": [ctl.AutoRGN()],
    "mixout": [ctl.Mixout(p=0.5)],
    "lhuc": [ctl.LHUC()],
    "lora": [ctl.LoRA(rank=2)],
    "lora, pulled": [ctl.LoRA(rank=2), ctl.L2SP(alpha=0.5)],
    "input_transform": [ctl.InputTransform()],
    "norm_adaptation": [ctl.NormAdaptation()],
    "output_conservation": [ctl.OutputConservation()],
    "feature_conservation": [ctl.FeatureConservation()],
    "spectral_shrinkage": [ctl.SpectralShrinkage(eta=0.1)],
    "entropy_minimisation": [ctl.EntropyMinimisation()],
    "lp_ft": [ctl.LPFT()],
    "surgical_fine_tuning": [ctl.SurgicalFineTuning(block="best")],
    "weight_interpolation": [ctl.WeightInterpolation(), ctl.L2SP(alpha=0.5)],
}
OPTIONS = {
    "clipped, accumulated": {"clip": 0.3, "accumulate": 2},
    "averaged": {"ema": 0.9},
    "selected": {"keep": "target", "lr": 0.1},
    "path": {"keep": "path", "lr": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 0.003},
}
REFUSED = {
    "spectral_shrinkage": "acts on all examples of a batch together",
    "entropy_minimisation": "acts on all examples of a batch together",
    "mixout": "acts on whole tensors",
    "lora, pulled": "acts on whole tensors",
}
BOTH = ("spectral_shrinkage", "entropy_minimisation")  # refused however the model is shared
ONLY_TWO = {
    *OPTIONS,
    "dataset",
    "l2_sp, decoupled",
    "l2_sp, on the CPU",
    "feature_extraction, ncm",
    "lora, pulled",
    "lp_ft",
}
ONLY_TWO |= {"resumed"}
CASES = [*STRATEGIES, *OPTIONS, "dataset"]


def run(case, world=1, how="auto", **options):
    """Train; return the weights, the history, and the model's state after it."""
    norm = nn.BatchNorm1d if case == "norm_adaptation" else nn.LayerNorm
    model = network(0, norm)
    strategies = STRATEGIES.get(case, [ctl.L2SP(alpha=0.5)])
    adaptation = ctl.adapt(model, network(1, norm), copy.deepcopy(strategies), fresh=["3"])
    fields = {"epochs": 4, "optimizer": "sgd", "lr": 0.05, "device": "cpu", "distributed": how, "evaluate_every": 2}
    fields |= OPTIONS.get(case, {})
    training = ctl.Training(batch_size=TOGETHER // world, evaluate_batch_size=5, **fields)
    train = Rows(*TRAIN) if case == "dataset" else TRAIN
    result = ctl.fit(adaptation, train, {"target": VALID}, training, seed=3, **options)
    state = {name: tensor.clone() for name, tensor in adaptation.model.state_dict().items()}
    return state, [*result.history], result.best, adaptation.drift(), [type(one).__name__ for one in model.modules()]


def interrupted(world, how, folder):
    """Stop after two epochs, and return the result of going on."""

    def tell(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    try:
        run("adamw", world, how, out=folder, tell=tell)
    except KeyboardInterrupt:
        if dist.get_rank() == 0:
            shutil.copy(folder / "checkpoint.pt", folder / "stopped.pt")
        dist.barrier()
    return run("adamw", world, how, out=folder, resume=True)


def in_process(rank, world, folder):
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in names.items()} | {"ACCELERATE_USE_CPU": "true"}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {}

    def keep(case, call, *args):
        try:
            found[case] = call(*args)
        except ctl.SpecError as error:
            found[case] = str(error)
        except Exception:  # noqa: BLE001 - told by the test of this case
            found[case] = traceback.format_exc()

    for how in ("ddp", "fsdp2"):
        for case in CASES:
            if world > 2 and case in ONLY_TWO:
                continue
            keep((how, case), run, case, world, how)
        if world == 2:
            keep((how, "resumed"), interrupted, world, how, folder / how)
        alone = folder / f"alone-{how}"
        if rank == 0:  # one process's checkpoint, copied so that it is not changed
            shutil.copytree(folder.parent / "alone", alone)
        dist.barrier()
        keep((how, "from one"), lambda: run("adamw", 1, how, out=alone, resume=True))  # noqa: B023 - called at once
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives in each case, and a folder with its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    found = {case: run(case) for case in CASES}
    found["resumed"] = found["from one"] = found["adamw"]

    def tell(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("adamw", out=folder / "alone", tell=tell)
    return folder, found


@pytest.fixture(scope="module")
def groups(side_by_side, alone):
    """Return a function of the number of processes that returns their folder, and what each of them gives."""

    @functools.cache  # tests in random order ask for one and the other
    def run_all(world):
        folder = alone[0] / str(world)
        folder.mkdir()
        side_by_side(in_process, (world, folder), world)
        return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run_all


def test_each_strategy_is_here():
    kinds = {strategy.kind for strategies in STRATEGIES.values() for strategy in strategies}
    assert kinds == {cls.model_fields["kind"].default for cls in builtin_strategies().values()}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for case in (*CASES, "resumed", "from one") for world in ((2,) if case in ONLY_TWO else (2, 3))],
)
def test_many_processes_give_what_one_gives(groups, alone, world, how, case):
    """Weights after 24 steps, losses, metrics and the score, in each process."""
    parts = groups(world)[1]
    if case in REFUSED and (how == "fsdp2" or case in BOTH):
        for found in parts:
            assert REFUSED[case] in found[how, case]
        return
    weights, history, best, drift, modules = alone[1][case]
    for found in parts:
        assert not isinstance(found[how, case], str), found[how, case]
        state, lines, score, moved, classes = found[how, case]
        assert classes == modules  # no wrapper is left
        assert state.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)
        assert moved == pytest.approx(drift, abs=1e-5)
        assert score == pytest.approx(best, abs=1e-6)
        assert len(lines) == len(history)
        for line, expected in zip(lines, history, strict=True):
            assert line["step"] == expected["step"]
            assert line.get("loss") == pytest.approx(expected.get("loss"), abs=1e-5)
            assert ("target" in line) == ("target" in expected)
            if "target" in line:
                assert line["target"] == pytest.approx(expected["target"], abs=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_one_process_resumes_what_many_began(groups, alone, how):
    """It keeps the batch of all of them together, and so the steps."""
    folder, _ = groups(2)
    (folder / how / "checkpoint.pt").write_bytes((folder / how / "stopped.pt").read_bytes())
    model = network()
    adaptation = ctl.adapt(model, network(1), [ctl.L2SP(alpha=0.5)], fresh=["3"])
    fields = {"epochs": 4, "optimizer": "adamw", "lr": 0.003, "device": "cpu", "evaluate_every": 2}
    training = ctl.Training(batch_size=TOGETHER // 2, evaluate_batch_size=5, **fields)
    result = ctl.fit(adaptation, TRAIN, {"target": VALID}, training, seed=3, out=folder / how, resume=True)
    weights, history, *_ = alone[1]["adamw"]
    assert [line["step"] for line in result.history] == [line["step"] for line in history]
    for name, tensor in weights.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-5)
