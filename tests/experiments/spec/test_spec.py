"""Specs: read, overridden, validated, with messages that name the field and the fix."""

import json
import re
from pathlib import Path

import pytest
import yaml

from conservtl import SpecError
from conservtl.experiments.spec.sections import SourceSection
from conservtl.experiments.spec.spec import dump_spec, load_spec, parse_spec, schema, with_variant

EXAMPLES = Path(__file__).parents[3] / "examples"
SPECS = sorted(path for name in ("speech", "vision") for path in (EXAMPLES / name).glob("*.yaml"))
FOLDER = {"task": "speech", "data": {"kind": "folder", "root": "somewhere", "target": "theo"}}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_there_are_shipped_specs():
    assert {path.name for path in SPECS} >= {"spec.yaml", "fsdd.yaml", "cifar10c.yaml"}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_spec_is_valid_and_round_trips(path, tmp_path):
    root = ["data.root=somewhere"] if "root" in (yaml.safe_load(path.read_text())["data"]) else []
    spec = load_spec(path, root)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_spec(spec))
    assert load_spec(again) == spec
    as_json = tmp_path / "resolved.json"
    as_json.write_text(spec.model_dump_json())
    assert load_spec(as_json) == spec


def test_overrides_are_read_as_yaml_and_merged_before_validation(tmp_path):
    path = written(tmp_path, {**FOLDER, "strategies": [{"kind": "l2_sp", "alpha": 0.5}]})
    spec = load_spec(path, ["data.shots=1", "strategies.0.alpha=2", "data.words=[a, b]", "training.clip=null"])
    assert (spec.data.shots, spec.strategies[0].alpha, spec.data.words) == (1, 2.0, ("a", "b"))
    assert spec.training.clip is None


def test_switching_a_kind_drops_the_files_other_keys_of_that_section(tmp_path):
    spec = load_spec(written(tmp_path, FOLDER), ["data.shots=2", "data.kind=espeak"])
    assert (spec.data.kind, spec.data.shots) == ("espeak", 2)


def test_the_environment_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("precision", "fp16")
    monkeypatch.setenv("TRAINING__PRECISION", "fp16")
    assert load_spec(written(tmp_path, FOLDER)).training.precision == "auto"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {**FOLDER["data"], "shotz": 3}}, r"data\.shotz: there is no such field\. Did you mean 'shots'"),
        ({"trainng": {}}, r"trainng: there is no such field\. Did you mean 'training'"),
        ({"data": {**FOLDER["data"], "shots": 0}}, r"data\.shots: .*greater than or equal to 1.*received 0"),
        ({"strategies": [{"kind": "l2_sp", "alpha": -1}]}, r"strategies\.0\.alpha: .*received -1"),
        ({"strategies": [{"kind": "l3_sp"}]}, r"strategies\.0: .*l3_sp"),
        ({"task": "smell"}, "smell"),
        ({"data": {"kind": "folder", "root": "x"}}, r"data\.target: Field required"),
        ({"seed": -1}, r"seed: .*received -1"),
    ],
)
def test_a_wrong_field_is_named_with_the_rule_and_what_was_received(fields, message):
    with pytest.raises(SpecError, match=message):
        parse_spec({**FOLDER, **fields})


@pytest.mark.parametrize("text", ["data.shots", "=3", "data.target.name=1", "strategies.4.alpha=1", "a=[1"])
def test_an_override_that_cannot_be_meant_is_refused(tmp_path, text):
    path = written(tmp_path, {**FOLDER, "strategies": [{"kind": "l2_sp"}]})
    with pytest.raises(SpecError, match="--set"):
        load_spec(path, [text])


@pytest.mark.parametrize("fields", [{"strategies.0.aplha": 3}, {"strategies.4.alpha": 3}, {"trainin": 3}])
def test_a_wrong_field_of_a_variant_is_named_with_variant_and_file(tmp_path, fields):
    variants = {"good": {"seed": 1}, "a": fields}
    compared = {**FOLDER, "strategies": [{"kind": "l2_sp"}], "compare": {"variants": variants}}
    with pytest.raises(SpecError, match=rf"spec\.yaml:\n  compare\.variants\.a: {re.escape(*fields)}: there is no"):
        load_spec(written(tmp_path, compared))
    spec = parse_spec(compared)
    with pytest.raises(SpecError, match=rf"^compare\.variants\.a: {re.escape(*fields)}: there is no"):
        with_variant(spec, "a", fields)


@pytest.mark.parametrize("content", ["task: [", "- a list", ""])
def test_a_file_that_is_no_spec_is_refused(tmp_path, content):
    path = tmp_path / "spec.yaml"
    path.write_text(content)
    with pytest.raises(SpecError, match=r"spec\.yaml"):
        load_spec(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        load_spec(tmp_path / "nowhere.yaml")


def test_the_schema_describes_every_field_for_an_editor():
    found = json.loads(schema())
    bare = [
        f"{name}.{field}"
        for name, definition in found["$defs"].items()
        for field, content in definition.get("properties", {}).items()
        if field not in ("kind", "task") and not {"description", "$ref"} & content.keys()
    ]
    assert not bare


@pytest.mark.parametrize("weights", ["a/b.pt", "timm:resnet18.a1_in1k", "https://a.org/b.pt", None])
def test_source_weights_survive_json(weights):
    section = SourceSection(weights=weights)
    assert SourceSection.model_validate_json(section.model_dump_json()) == section
