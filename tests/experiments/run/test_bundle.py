"""What strategies added to a model is saved with it: in its weights, or put there again when it is loaded."""

import copy
import importlib
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import conservtl as ctl
from conservtl.experiments.run.bundle import load_adapted, save_bundle
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec
from conservtl.runtime.source_model import SourceHead
from conservtl.storage.tensor_files import save_tensors
from conservtl.testing.weights import random_weights

LHUC = {"kind": "lhuc"}
TRANSFORM = {"kind": "input_transform"}


def saved(fields, folder, strategies):
    """An adaptation as training leaves it, its inputs, and what its folder gives back."""
    setting = prepare(
        parse_spec({**fields, "strategies": strategies, "training": {"device": "cpu", "epochs": 3, "lr": 0.1}})
    )
    adaptation = setting.adaptation(obtain_source(setting).model)
    ctl.fit(adaptation, setting.domains.shots, training=setting.spec.training)
    (folder / "spec.yaml").write_text("")
    save_bundle(folder, adaptation, setting)
    return adaptation, setting.domains.target_test.inputs, load_adapted(folder).model


@pytest.mark.parametrize(
    ("strategies", "left"),
    [
        ([LHUC], set()),
        ([{"kind": "lora", "rank": 2}, {"kind": "l2_sp"}], set()),
        ([{**TRANSFORM, "bias": False}], set()),
        ([TRANSFORM], {"input_transform.weight", "input_transform.bias"}),
        ([TRANSFORM, LHUC], {"input_transform.weight", "input_transform.bias"}),
    ],
)
@torch.no_grad()
def test_a_loaded_model_computes_what_the_adapted_one_did(speech_fields, tmp_path, strategies, left):
    with torch.enable_grad():
        adaptation, inputs, model = saved(speech_fields, tmp_path, strategies)
    source = prepare(parse_spec(speech_fields))
    start = source.adaptation(obtain_source(source).model).model.eval()
    expected = adaptation.model.eval()(inputs)
    assert not torch.allclose(start(inputs), expected, atol=1e-2)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) - set(start.state_dict()) == left
        assert ("extended" in json.loads(file.metadata()["conservtl"])) is bool(left)
    with pytest.raises(
        ctl.SpecError, match="decoding is for tasks that write texts; the model is of the task 'speech'"
    ):
        load_adapted(tmp_path, decoding={"kind": "greedy"})


OWN = """
from typing import Literal
from conservtl.methods.input_transform.strategy import InputTransform

class OwnTransform(InputTransform):
    kind: Literal["own_transform"] = "own_transform"
"""


def test_a_model_extended_by_code_of_ones_own_names_what_to_import(speech_fields, tmp_path, monkeypatch):
    (tmp_path / "own_transform.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget():
        ctl.Strategy.named.pop("own_transform", None)
        sys.modules.pop("own_transform", None)

    try:
        importlib.import_module("own_transform")
        adaptation, inputs, model = saved(speech_fields, tmp_path, [{"kind": "own_transform"}])
        forget()
        with pytest.raises(ctl.SourceError, match=r"code in own_transform, which is not imported.*--import own_tra"):
            load_adapted(tmp_path)
        importlib.import_module("own_transform")
        again = load_adapted(tmp_path).model
    finally:
        forget()
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))
        torch.testing.assert_close(again(inputs), adaptation.model.eval()(inputs), rtol=1e-4, atol=1e-4)


def test_a_run_that_trains_nothing_leaves_a_folder_with_everything(speech_fields, tmp_path):
    """Statistics of the target alone: no step, one line of history, a report, and a model that has them."""
    strategies = [{"kind": "norm_adaptation", "train": "nothing", "statistics": "target"}]
    report = run(parse_spec({**speech_fields, "strategies": strategies}), tmp_path / "out")
    assert len((tmp_path / "out" / "history.jsonl").read_text().splitlines()) == 1
    assert set(report["drift"].values()) == {0.0}
    assert report["before"] != report["after"]
    assert (tmp_path / "out" / "report.html").is_file()
    setting = prepare(parse_spec(speech_fields))
    source = obtain_source(setting).model.state_dict()
    now = load_adapted(tmp_path / "out").model.state_dict()
    assert {name.rpartition(".")[2] for name in now if not torch.equal(now[name], source[name])} == {
        "running_mean",
        "running_var",
    }


@torch.no_grad()
def test_an_adapted_body_is_measured_on_the_source_with_what_was_added_to_it():
    """Under the source's own head, where the target has other labels."""
    source = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    ctl.adapt(model, random_weights(source, 0), [ctl.LHUC()], fresh={"2": "other labels"})
    model[0].lhuc.fill_(1.0)
    x = torch.randn(6, 3)
    body = copy.deepcopy(source)
    body.load_state_dict({**random_weights(source, 0), **{k: v for k, v in source.state_dict().items() if k[0] == "2"}})
    expected = body[2](2 * torch.tensor(1.0).sigmoid() * body[0](x).relu())
    with SourceHead(source, "2").replacing(model) as replaced:
        assert torch.allclose(replaced(x), expected, atol=1e-6)
    assert model[2].weight.shape == (2, 4)


class TestPredictionInBatches:
    """Files are read and predicted a few at a time: memory is bounded by the batch, not by the folder."""

    class Reading:
        def __init__(self):
            self.reads = []

        def read(self, files):
            self.reads.append(len(files))
            return torch.tensor([[float(file.stem)] for file in files])

    class Naming:
        def answer(self, model, batch):
            return model(batch[0])

        def predictions(self, outputs, labels, files):
            from conservtl.tasks.base import Prediction

            return [Prediction(file, f"{row.item():g}") for file, row in zip(files, outputs, strict=True)]

    @pytest.mark.parametrize(("size", "reads"), [(None, [32] * 62 + [16]), (700, [700, 700, 600]), (5000, [2000])])
    def test_a_folder_of_two_thousand(self, tmp_path, size, reads):
        from conservtl.experiments.run.bundle import Adapted

        files = [tmp_path / f"{number}.wav" for number in range(2000)]
        for file in files:
            file.touch()
        reading = self.Reading()
        adapted = Adapted(torch.nn.Linear(1, 1), ("a",), reading, self.Naming())
        torch.nn.init.ones_(adapted.model.weight)
        torch.nn.init.zeros_(adapted.model.bias)
        found = adapted.predict(files) if size is None else adapted.predict(files, batch_size=size)
        assert reading.reads == reads
        assert [(one.file, one.label) for one in found] == [(file, str(n)) for n, file in enumerate(files)]

    def test_a_size_below_one(self, tmp_path):
        from conservtl.experiments.run.bundle import Adapted

        with pytest.raises(ctl.SpecError, match="batch_size must be at least 1; received 0"):
            Adapted(torch.nn.Linear(1, 1), ("a",), self.Reading(), self.Naming()).predict([__file__], batch_size=0)


class TestOtherFolders:
    def test_without_a_model(self, tmp_path):
        with pytest.raises(ctl.SourceError, match=r"there is no model in .*Give the folder that"):
            load_adapted(tmp_path)

    def test_with_weights_of_another_origin(self, tmp_path):
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(ctl.SourceError, match="was not written by a run: it carries no labels"):
            load_adapted(tmp_path)

    def test_a_model_of_ones_own_is_handed_in_for_such_folders_alone(self, tmp_path):
        saved = ctl.save(ctl.adapt(nn.Linear(3, 2), nn.Linear(3, 2)), tmp_path / "own", ["a", "b"])
        with pytest.raises(ctl.SpecError, match="decoding is for tasks that write texts"):
            load_adapted(saved, nn.Linear(3, 2), decoding={"kind": "greedy"})
        header = {"task": "speech", "labels": ["a"], "model": {}, "preprocessing": {}}
        save_tensors({"w": torch.ones(2)}, tmp_path / "model.safetensors", header)
        with pytest.raises(ctl.SpecError, match="was written by a run, which knows its network; received Linear"):
            load_adapted(tmp_path, nn.Linear(3, 2))
