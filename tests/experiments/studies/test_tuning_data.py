"""A search on data without a source part, or without a second shot, is refused before its first trial."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

import conservtl as ctl
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.spec import parse_spec
from conservtl.experiments.studies.tuning import tune

pytest.importorskip("optuna")


@pytest.fixture
def marked(image_folder, tmp_path):
    """Images of two classes, four to train on and two to test on each; source weights, and no source images."""
    fields = {
        "task": "vision",
        "data": {"kind": "imagefolder", "root": image_folder("ab"), "shots": 4, "validation": 0.5,
                 "images": {"size": 8}, "augment": False},
        "source": {"weights": str(tmp_path / "source.safetensors"), "labels": ["a", "b"]},
    }  # fmt: skip
    (tmp_path / "source.safetensors").touch()
    model = prepare(parse_spec({**fields, "training": {"epochs": 1}})).model(2)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "source.safetensors"
    )
    return fields | {"training": {"epochs": 1, "lr": {"range": [1e-4, 1e-3]}}, "tune": {"trials": 1}}


@pytest.mark.parametrize("objective", ["harmonic", "both", None])
def test_without_source_data_only_the_target_can_be_judged(marked, tmp_path, objective):
    marked["tune"] |= {} if objective is None else {"objective": objective}
    for dry_run in (False, True):
        with pytest.raises(
            ctl.SpecError, match=rf"tune\.objective={objective or 'harmonic'} needs source data, .*to target"
        ):
            tune(marked, tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_the_target_alone(marked, tmp_path):
    marked["tune"] |= {"objective": "target"}
    result = tune(marked, tmp_path / "out")
    assert [trial["state"] for trial in result["trials"]] == ["complete"]
    assert result["trials"][0]["source"] is None


def test_no_class_has_a_second_example(marked, tmp_path):
    for file in (tmp_path / "images" / "train").glob("*/[123].png"):
        file.unlink()
    marked["data"]["shots"] = "all"
    marked["tune"] |= {"objective": "target"}
    with pytest.raises(ctl.SpecError, match="judged on a part of the shots, and no class has a second example"):
        tune(marked, tmp_path / "out")
