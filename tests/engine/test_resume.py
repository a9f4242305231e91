"""An interrupted and resumed run equals an uninterrupted one, bit for bit on a CPU."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, TensorDataset

import conservtl as ctl
from conservtl.engine.checkpoint import Checkpoints

UNFREEZING = ctl.GradualUnfreezing(by="layer", scales=(1.0, 0.5))
SETTINGS = {"device": "cpu", "epochs": 4, "batch_size": 16, "lr": 0.01}


def noise(batch, generator):
    inputs, labels = batch
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator), labels


class Noisy(Dataset):
    """Dataset that draws from the global generators of torch and NumPy."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        shift = 0.1 * float(np.random.rand())  # noqa: NPY002
        return self.inputs[index] + 0.1 * torch.randn(3, 12) + shift, self.labels[index]


CASES = {
    "held": {},
    "augmented": {"augment": noise},
    "accumulated": {"training": {"accumulate": 3, "clip": 0.5}},
    "scheduled": {"training": {"schedule": "one_cycle", "optimizer": "sgd"}},
    "shuffled loader": {"data": lambda data: DataLoader(TensorDataset(*data), 16, shuffle=True)},
    "loader with a generator of its own": {
        "data": lambda data: DataLoader(
            TensorDataset(*data), 16, shuffle=True, generator=torch.Generator().manual_seed(5)
        )
    },
    "random dataset": {"data": lambda data: Noisy(*data)},
    "kept best": {"training": {"keep": "target", "patience": 3}},
    "kept on the path": {"training": {"keep": "path", "patience": 3}},
    "interpolated": {"strategies": [ctl.WeightInterpolation(t=None, points=4, batch_norm="recompute")]},
    "unfreezing": {"strategies": [UNFREEZING, ctl.L2SP(alpha=0.1)]},
    "frozen input side": {"strategies": [ctl.LayerTransfer(side="input", layers=1)]},
    "weighed by a Fisher": {"strategies": [ctl.FisherSP(alpha=1.0, fisher="true", draws=1)]},
    "features weighed by attention": {"strategies": [ctl.FeatureConservation(attention=True), ctl.SpectralShrinkage()]},
    "statistics held": {"training": {"batch_norm": "eval"}},
}


def _run(plain, data, case, **options):
    adaptation = plain(*case.get("strategies", ()))
    settings = {**SETTINGS, **case.get("training", {})}
    if "strategies" in case and UNFREEZING in case["strategies"]:
        settings["epochs"] = max(settings["epochs"], len(adaptation.plan.phases))
    made = case.get("data", lambda data: data)(data)
    result = ctl.fit(
        adaptation, made, {"target": data}, ctl.Training(**settings), augment=case.get("augment"), seed=3, **options
    )
    return adaptation, result


def _without_time(history):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in history]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at", [1, 6, 12], ids=["first batch", "within an epoch", "end of an epoch"])
def test_resume_equals_uninterrupted(plain, data, same, interrupting, tmp_path, name, at):
    """Weights, statistics, history and best score, wherever Ctrl-C was pressed."""
    whole, expected = _run(plain, data, CASES[name])
    with pytest.raises(KeyboardInterrupt):
        _run(plain, data, CASES[name], out=tmp_path, forward=interrupting(at))
    resumed, result = _run(plain, data, CASES[name], out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)
    assert _without_time(result.history) == _without_time(expected.history)
    assert (result.steps, result.best, result.after) == (expected.steps, expected.best, expected.after)


def test_interrupted_again_and_again(plain, data, same, interrupting, tmp_path):
    """A run that is interrupted every few batches ends with the same weights."""
    whole, _ = _run(plain, data, CASES["augmented"])
    stops = 0
    while True:
        try:
            resumed, _ = _run(plain, data, CASES["augmented"], out=tmp_path, resume=stops > 0, forward=interrupting(3))
        except KeyboardInterrupt:
            stops += 1
        else:
            break
    assert stops == 5
    assert same(resumed.model, whole.model)


@pytest.mark.parametrize("keep", ["target", "path"])
def test_a_finished_run_resumes_to_itself(plain, data, same, tmp_path, keep):
    """The checkpoint of a finished run restores its weights, the best ones if they are kept."""
    case = {"training": {"keep": keep, "lr": 0.1}}
    whole, expected = _run(plain, data, case, out=tmp_path)
    again, result = _run(plain, data, case, out=tmp_path, resume=True)
    assert same(again.model, whole.model)
    assert result.history == expected.history
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(expected.history)


def test_ctrl_c_during_evaluation_ends_the_run_after_it(plain, data, same, tmp_path):
    """Ctrl-C during an evaluation: the epoch is finished and saved, then the run stops."""

    def pressing(outputs, batch):
        signal.raise_signal(signal.SIGINT)
        return {}

    whole, _ = _run(plain, data, {})
    with pytest.raises(KeyboardInterrupt):
        _run(plain, data, {}, out=tmp_path, watch={"source": ctl.Holdout(data, metrics=pressing)})
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1
    resumed, _ = _run(plain, data, {}, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)


def test_ctrl_c_is_the_callers_again_afterwards(plain, data, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    _run(plain, data, {}, out=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_setting_is_refused(plain, data, tmp_path):
    """A checkpoint resumes with its own settings only; the message names the first that differs."""
    _run(plain, data, {}, out=tmp_path)
    with pytest.raises(ctl.SpecError, match=r"training\.lr=0\.01, but now it is 0\.02"):
        _run(plain, data, {"training": {"lr": 0.02}}, out=tmp_path, resume=True)


def test_another_plan_is_refused(plain, data, tmp_path):
    _run(plain, data, {}, out=tmp_path)
    with pytest.raises(ctl.PlanError, match="another plan"):
        _run(plain, data, {"strategies": [ctl.L2SP(alpha=0.1)]}, out=tmp_path, resume=True)


def test_a_setting_that_an_older_version_did_not_have_is_its_default(plain, data, same, interrupting, tmp_path):
    whole, _ = _run(plain, data, {})
    with pytest.raises(KeyboardInterrupt):
        _run(plain, data, {}, out=tmp_path, forward=interrupting(6))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del checkpoint["settings"]["select"], checkpoint["processes"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    resumed, _ = _run(plain, data, {}, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)
    with pytest.raises(ctl.SpecError, match=r"training\.select=None, but now it is .*accuracy"):
        _run(plain, data, {"training": {"select": "accuracy"}}, out=tmp_path, resume=True)


def test_the_scalers_state_is_restored(plain, data, same, interrupting, tmp_path):
    """In fp16: the scale grows every third step, and continues to grow from its saved value."""

    def accelerator():
        found = Accelerator(cpu=True)
        found.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return found

    ends = {"whole": accelerator(), "stopped": accelerator(), "resumed": accelerator()}
    whole, _ = _run(plain, data, {}, accelerator=ends["whole"])
    with pytest.raises(KeyboardInterrupt):
        _run(plain, data, {}, out=tmp_path, forward=interrupting(7), accelerator=ends["stopped"])
    resumed, _ = _run(plain, data, {}, out=tmp_path, resume=True, accelerator=ends["resumed"])
    assert same(resumed.model, whole.model)
    states = {name: end.scaler.state_dict() for name, end in ends.items()}
    assert states["stopped"]["scale"] == 8 * 2**2
    assert states["whole"]["scale"] == 8 * 2**5
    assert states["resumed"] == states["whole"]


def test_a_write_that_fails_leaves_the_old_checkpoint(plain, data, same, monkeypatch, interrupting, tmp_path):
    """No partial file is left, neither as the checkpoint nor beside it."""
    whole, _ = _run(plain, data, {})
    with pytest.raises(KeyboardInterrupt):
        _run(plain, data, {}, out=tmp_path, forward=interrupting(6))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def torn(content, path):
        path.write_bytes(b"PK half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("conservtl.engine.checkpoint.torch.save", torn)
        with pytest.raises(OSError, match="No space left"):
            _run(plain, data, {}, out=tmp_path, resume=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after.keys() == before.keys()
    resumed, _ = _run(plain, data, {}, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)


def test_no_checkpoint(plain, data, tmp_path):
    with pytest.raises(ctl.SpecError, match="there is no checkpoint in"):
        _run(plain, data, {}, out=tmp_path, resume=True)
    with pytest.raises(ctl.SpecError, match="out, which is None"):
        _run(plain, data, {}, resume=True)


def test_a_torn_checkpoint_is_named(plain, data, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ctl.SpecError, match=r"checkpoint\.pt cannot be read"):
        _run(plain, data, {}, out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    plain, data, same, interrupting, tmp_path, damage, recwarn
):
    """Its run ends as an undisturbed one does."""
    whole, _ = _run(plain, data, {})
    for at in (6, 3):  # the second stop is in another step
        with pytest.raises(KeyboardInterrupt):
            _run(plain, data, {}, out=tmp_path, forward=interrupting(at), resume=at == 3)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    damaged = {"flipped bit": bytes(content), "cut short": bytes(content[:-100]), "empty": b""}
    if damage == "missing":  # killed between two renames
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    resumed, _ = _run(plain, data, {}, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (damage != "missing")
    assert all("checkpoint.pt cannot be read" in text and "checkpoint.previous.pt" in text for text in told)
    assert not (tmp_path / "checkpoint.previous.pt").exists()  # the run has ended


def test_no_flipped_bit_of_an_archives_directory_escapes(tmp_path):
    """Each file gives its content or a named error, whatever zipfile, zlib and torch raise for it."""
    store, content = Checkpoints(tmp_path), {"weights": torch.arange(6.0), "step": 3}
    store.save(lambda: content)
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    refused = 0
    for bit in range(8 * good.index(b"PK\x01\x02"), 8 * len(good), 3):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            loaded = store.load()
        except ctl.SpecError:
            refused += 1
        else:
            assert torch.equal(loaded["weights"], content["weights"])
            assert loaded["step"] == 3
    assert refused > 100


def test_sigterm_ends_after_the_step_with_a_checkpoint(plain, data, same, tmp_path):
    """The first SIGTERM is recorded, a second one would act at once; the caller's handler is restored."""
    handler = signal.getsignal(signal.SIGTERM)
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += model.training
        if calls == 6 and model.training:
            signal.raise_signal(signal.SIGTERM)
        return model(batch[0])

    whole, _ = _run(plain, data, {})
    with pytest.raises(SystemExit) as stopped:
        _run(plain, data, {}, out=tmp_path, forward=forward)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed, _ = _run(plain, data, {}, out=tmp_path, resume=True)
    assert same(resumed.model, whole.model)


def test_seeds_make_runs_repeatable(plain, data, same):
    """The same seed gives the same weights, whatever was drawn before; another seed gives others."""
    first, _ = _run(plain, data, CASES["random dataset"])
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    second, _ = _run(plain, data, CASES["random dataset"])
    assert same(first.model, second.model)
    other = plain()
    ctl.fit(other, data, training=ctl.Training(**SETTINGS), seed=4)
    assert not same(first.model, other.model)
