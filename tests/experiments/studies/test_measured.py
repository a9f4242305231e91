"""What a run measured before training is saved with it, and can be used again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import conservtl as ctl
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec


def test_a_fisher_on_source_data(speech_fields, tmp_path):
    """Measured on what the source model was trained on, kept beside the model, taken again without data."""
    spec = parse_spec({**speech_fields, "strategies": [{"kind": "ewc", "data": "source"}]})
    run(spec, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "measured.safetensors")
    found = {name.removeprefix("fisher/"): tensor for name, tensor in saved.items()}
    setting = prepare(spec)
    source = obtain_source(setting)
    expected, again = setting.adaptation(source.model), setting.adaptation(source.model)
    train = setting.domains.source_train
    expected.measure([(train.inputs, train.labels)], on="source")
    for name, tensor in expected.measured["fisher"].items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    again.use_measured("fisher", found)
    again.optimizer(torch.optim.SGD, lr=0.1)


def test_nothing_measured_nothing_written(speech_fields, tmp_path):
    """Nor is an earlier run's left lying."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "measured.safetensors").write_bytes(b"old")
    run(parse_spec(speech_fields), tmp_path / "out")
    assert not (tmp_path / "out" / "measured.safetensors").exists()


def test_without_source_data(speech_fields, tmp_path):
    run(parse_spec(speech_fields), tmp_path / "first")
    fields = {**speech_fields, "source": {"weights": str(tmp_path / "first" / "model.safetensors"), "data": None}}
    fields["strategies"] = [{"kind": "fisher_sp", "data": "source"}]
    with pytest.raises(ctl.SpecError, match=r"FisherSP is measured on source data .* Pass source=data"):
        run(parse_spec(fields), tmp_path / "second")
