"""A recommendation is a spec that runs, with what was measured and what was left out."""

import pytest
import torch
import yaml

import conservtl as ctl
from conservtl.experiments.advice.lr_range_test import RangeTest
from conservtl.experiments.advice.recommendation import _rate
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import load_spec, parse_spec

pytest.importorskip("sklearn")


@pytest.fixture
def digits_fields(sources):
    pytest.importorskip("torchvision")
    return {
        "task": "vision",
        "model": {"name": "cifar_resnet20"},
        "source": {
            "training": {"device": "cpu", "epochs": 1, "lr": 3e-3, "evaluate_every": 9},
            "cache": str(sources),
        },
        "data": {"kind": "digits", "shots": 2},
        "strategies": [{"kind": "l2_sp"}],
        "training": {"device": "cpu", "epochs": 2},
    }


def test_the_spec_runs_and_keeps_what_was_not_asked_about(speech_fields, tmp_path):
    found = ctl.recommend(speech_fields)
    given = parse_spec(speech_fields)
    assert (found.spec.data, found.spec.model, found.spec.source, found.spec.seed) == (
        given.data,
        given.model,
        given.source,
        given.seed,
    )
    assert 1e-5 <= found.spec.training.lr <= 1e-3
    found.write(tmp_path / "recommended.yaml")
    written = (tmp_path / "recommended.yaml").read_text()
    assert written.startswith("# side: ")
    assert load_spec(tmp_path / "recommended.yaml") == found.spec
    short = found.spec.model_copy(update={"training": found.spec.training.model_copy(update={"epochs": 2})})
    assert run(short, tmp_path / "out")["after"]["target"]["accuracy"] >= 0


def test_another_speaker_keeps_the_output_side(speech_fields):
    found = ctl.recommend(speech_fields, range_test=False)
    assert found.evidence.shift == "speaker"
    assert any("output side is kept" in choice.reason for choice in found.choices)
    assert "A-distance" in str(found)
    assert found.range_test is None


def test_new_labels_with_little_data_are_told_apart_by_frozen_features(digits_fields, tmp_path):
    """The body is untouched: what the source knew is exactly what it knew."""
    found = ctl.recommend(digits_fields)
    assert [one.kind for one in found.spec.strategies] == ["feature_extraction"]
    assert set(found.spec.strategies[0].layers) <= set(found.evidence.layers)
    report = run(found.spec, tmp_path / "out")
    assert report["before"]["source"] == report["after"]["source"]


def test_without_source_data_the_norms_say_how_far_and_what_is_left_out_is_named(speech_fields, tmp_path):
    source = obtain_source(prepare(parse_spec(speech_fields)))
    torch.save(source.model.state_dict(), tmp_path / "weights.pt")
    labels = ["0", "1", "2"]
    bare = {**speech_fields, "source": {"weights": str(tmp_path / "weights.pt"), "data": None, "labels": labels}}
    bare["data"] = {**speech_fields["data"], "shots": 7}
    found = ctl.recommend(bare, range_test=False)
    assert found.evidence.distance is None
    assert found.evidence.statistics is not None
    assert any("no source data" in text for text in found.evidence.left_out)
    assert "left out" in str(found)


def test_no_test_recording_is_looked_at(speech_fields, monkeypatch):
    """With other recordings in the test parts the recommendation is the same to the last digit."""
    import sys
    from dataclasses import replace

    from conservtl.experiments.advice import recommendation as _  # noqa: F401

    module = sys.modules["conservtl.experiments.advice.recommendation"]
    plain = ctl.recommend(speech_fields, range_test=False)

    def spoiled(spec):
        setting, source = whole(spec)
        domains = setting.domains
        broken = replace(domains.target_test, inputs=torch.full_like(domains.target_test.inputs, torch.nan))
        return replace(setting, domains=replace(domains, target_test=broken, source_test=None)), source

    whole = module.prepare_source
    monkeypatch.setattr(module, "prepare_source", spoiled)
    assert ctl.recommend(speech_fields, range_test=False).numbers == plain.numbers


def test_one_class_is_refused_before_anything_is_measured(speech_fields, monkeypatch):
    import sys
    from dataclasses import replace

    module = sys.modules["conservtl.experiments.advice.recommendation"]

    def single(spec):
        setting, source = whole(spec)
        return replace(setting, domains=replace(setting.domains, labels=("0",))), source

    whole = module.prepare_source
    monkeypatch.setattr(module, "prepare_source", single)
    with pytest.raises(ctl.DataError, match="one class"):
        ctl.recommend(speech_fields)


def test_more_shots_than_recordings_are_refused(speech_fields):
    speech_fields["data"] = {**speech_fields["data"], "shots": 80}
    with pytest.raises(ctl.DataError, match="shots"):
        ctl.recommend(speech_fields)


def test_numbers_are_those_of_json(speech_fields):
    assert yaml.safe_load(yaml.safe_dump(ctl.recommend(speech_fields, range_test=False).numbers["log_me"]))


@pytest.mark.parametrize(
    ("suggested", "rate", "said"),
    [
        # sqrt(5e-4 * 2e-4), and the same with the bounds 1e-3 and 1e-5
        (2e-4, 3.2e-4, "a tenth of that is 2.0e-04. The geometric mean of 2.0e-04 and"),
        (
            2.3e-3,
            7.1e-4,
            "a tenth of that is 2.3e-03. Usual rates end at 1.0e-03, which replaces it. The geometric mean",
        ),
        (1e-6, 7.1e-5, "a tenth of that is 1.0e-06. Usual rates begin at 1.0e-05, which replaces it. The geometric"),
    ],
)
def test_each_number_of_the_rate_follows_from_the_one_before(suggested, rate, said):
    text = _rate(rate, 5e-4, RangeTest((), (), (), suggested, suggested, diverged=False))
    assert text.startswith(f"The loss of the range test is lowest at {10 * suggested:.1e}, and {said}")
    assert text.endswith(f"the task's usual rate, 5.0e-04, is {rate:.1e}.")
