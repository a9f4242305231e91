"""Weights of an earlier run bring labels, preprocessing and added parts: adopted, or refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import conservtl as ctl
from conservtl.experiments.run.runner import run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec
from conservtl.source.run_header import read_header


@pytest.fixture
def first(speech_fields, tmp_path):
    """The folder of a run, and its report."""
    return tmp_path / "first", run(parse_spec(speech_fields), tmp_path / "first")


def after(fields, folder, **source):
    """The spec of a run that starts from the folder's model."""
    return {**fields, "source": {"weights": str(folder), **source}}


def with_header(folder, **fields):
    """Rewrite parts of the header of a saved model."""
    path = folder / "model.safetensors"
    header = {**read_header(path), **fields}
    save_file(load_file(path), path, {"conservtl": json.dumps(header)})


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_run_goes_on_from_a_folder_or_its_file(first, speech_fields, tmp_path, name):
    """Its starting scores are the final ones of the run before."""
    folder, report = first
    again = run(parse_spec(after(speech_fields, folder / name)), tmp_path / "second")
    assert again["before"] == report["after"]
    assert any("labels 0, 1, 2" in note for note in again["plan"]["notes"])


def test_labels_of_the_run_number_the_examples(first, speech_fields, tmp_path):
    """The saved outputs permuted with their labels: scored as before, and rows are copied by label."""
    folder, report = first
    path, order = folder / "model.safetensors", [2, 0, 1]
    header, tensors = read_header(path), load_file(path)
    tensors |= {name: tensor[order].contiguous() for name, tensor in tensors.items() if name.startswith("head")}
    save_file(tensors, path, {"conservtl": json.dumps({**header, "labels": ["2", "0", "1"]})})
    again = run(parse_spec(after(speech_fields, folder)), tmp_path / "second")
    assert again["before"]["source"]["accuracy"] == pytest.approx(report["after"]["source"]["accuracy"])
    assert ctl.Plan(**again["plan"])["head.weight"].source_rows == (1, 2, 0)
    assert again["before"]["target"] == pytest.approx(report["after"]["target"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"features": {"sample_rate": 16000}}},
            r"data\.features\.sample_rate was 8000 in that run and is 16000 here",
        ),
        (
            {"data": {"features": {"normalise": "mean", "range_db": 50.0}}},
            r"range_db was 40\.0 in that run and is 50\.0 here; data\.features\.normalise was mean_variance",
        ),
        ({"source": {"labels": ["0", "2", "1"]}}, r"labels '0', '1', '2', and source\.labels has '0', '2', '1'"),
        ({"model": {"args": {"width": 2.0}}}, r"model\.args\.width was nothing in that run and is 2\.0 here"),
        ({"model": {"name": "tc_resnet14"}}, r"model\.name was tc_resnet8 in that run and is tc_resnet14 here"),
    ],
)
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_what_contradicts_the_run_is_refused_with_both_values(first, speech_fields, tmp_path, change, message, name):
    fields = after(speech_fields, first[0] / name)
    for section, values in change.items():
        fields[section] = {**fields.get(section, {}), **values}
    with pytest.raises(ctl.SourceError, match=message):
        run(parse_spec(fields), tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_data_with_labels_that_the_run_did_not_know_is_refused(first, speech_fields):
    with_header(first[0], labels=["0", "1", "z"])
    onward = after(speech_fields, first[0])
    message = r"labels of the run that saved .*received '0', '1', 'z', without '2'. Leave .* \(source\.data: null\)"
    with pytest.raises(ctl.SpecError, match=message):
        prepare(parse_spec(onward))
    assert prepare(parse_spec(after(speech_fields, first[0], data=None))).domains.source_labels == ("0", "1", "z")


def test_weights_of_another_task_are_refused(first, speech_fields):
    with_header(first[0], task="vision")
    with pytest.raises(ctl.SourceError, match=r"of task 'vision', and the spec has 'speech'"):
        prepare(parse_spec(after(speech_fields, first[0])))


def test_image_settings_are_adopted_or_refused(tmp_path, sources):
    data = {"kind": "digits", "shots": 2}
    training = {"epochs": 1, "evaluate_every": 9}
    fields = {"task": "vision", "data": data, "training": training}
    settings = {"size": 16, "mean": [0.1, 0.1, 0.1], "std": [0.2, 0.2, 0.2]}
    source = {"training": {"epochs": 1, "lr": 1e-3}, "cache": str(sources)}
    run(parse_spec({**fields, "data": {**data, "images": settings}, "source": source}), tmp_path / "first")
    onward = after(fields, tmp_path / "first", data=None)
    images = prepare(parse_spec(onward)).domains.preprocessing.images
    assert (images.size, images.mean, images.std) == (16, (0.1, 0.1, 0.1), (0.2, 0.2, 0.2))
    for name, other in (("size", 20), ("mean", [0.5, 0.1, 0.1])):
        with pytest.raises(ctl.SourceError, match=rf"data\.images\.{name} was .* in that run and is"):
            prepare(parse_spec({**onward, "data": {**data, "images": {**settings, name: other}}}))


@pytest.mark.parametrize("strategies", [[{"kind": "input_transform"}], [{"kind": "lhuc"}, {"kind": "input_transform"}]])
def test_parts_that_a_run_added_are_part_of_the_source(speech_fields, tmp_path, strategies):
    """Reference: the outputs of the loaded model, for source model, starting point, adapted and saved again."""
    fields = {**speech_fields, "strategies": strategies, "training": {"epochs": 3, "lr": 0.1}}
    report = run(parse_spec(fields), tmp_path / "first")
    onward = {**after(speech_fields, tmp_path / "first"), "strategies": [{"kind": "l2_sp"}]}
    setting = prepare(parse_spec(onward))
    inputs = setting.domains.target_test.inputs
    source = obtain_source(setting)
    adaptation = setting.adaptation(source.with_notes())
    loaded = ctl.load_adapted(tmp_path / "first").model
    assert loaded.input_transform.weight.any()
    with torch.no_grad():
        for model in (source.model, adaptation.model.eval()):
            assert torch.allclose(model(inputs), loaded(inputs), atol=1e-5)
    assert adaptation.plan["input_transform.weight"].origin == "source"
    again = run(parse_spec(onward), tmp_path / "second")
    assert again["before"]["target"]["accuracy"] == report["after"]["target"]["accuracy"]
    saved = ctl.load_adapted(tmp_path / "second")
    right = saved.probabilities(inputs).argmax(-1) == setting.domains.target_test.labels
    assert again["after"]["target"]["accuracy"] == pytest.approx(right.float().mean().item())
    with pytest.raises(ctl.SpecError, match="has an input transform already"):
        run(parse_spec({**onward, "strategies": [{"kind": "input_transform"}]}), tmp_path / "third")


def test_in_python_a_folder_brings_what_was_added(speech_fields, tmp_path):
    fields = {**speech_fields, "strategies": [{"kind": "input_transform"}], "training": {"epochs": 3, "lr": 0.1}}
    run(parse_spec(fields), tmp_path / "first")
    setting = prepare(parse_spec(speech_fields))
    inputs = setting.domains.target_test.inputs
    loaded = ctl.load_adapted(tmp_path / "first").model
    for source in (tmp_path / "first", tmp_path / "first" / "model.safetensors"):
        model = setting.model(3)
        adaptation = ctl.adapt(model, source, example=setting.example)
        with torch.no_grad():
            assert torch.allclose(model.eval()(inputs), loaded(inputs), atol=1e-5)
        assert any("features" in note and "'sample_rate': 8000" in note for note in adaptation.plan.notes)
    model = setting.model(3)
    with pytest.raises(ctl.SelectorError):
        ctl.adapt(model, tmp_path / "first", example=setting.example, fresh=["no such layer"])
    assert not hasattr(model, "input_transform")


@pytest.mark.parametrize("layers", [["stem"], ["stem", "blocks.1"]])  # of the second as many features as the own head
def test_a_head_that_is_fed_from_layers_is_kept(speech_fields, tmp_path, layers):
    """Reference: the outputs of the loaded model, for a spec and in Python, with and without an example."""
    probe = [{"kind": "feature_extraction", "layers": layers}]
    report = run(parse_spec({**speech_fields, "strategies": probe}), tmp_path / "first")
    onward = parse_spec(after(speech_fields, tmp_path / "first"))
    setting = prepare(onward)
    inputs = setting.domains.target_test.inputs
    loaded = ctl.load_adapted(tmp_path / "first").model
    with torch.no_grad():
        outputs = loaded(inputs)
        found = [setting.adaptation(obtain_source(setting).with_notes())]
        found += [ctl.adapt(setting.model(3), tmp_path / "first", example=x) for x in (setting.example, None)]
        found += [ctl.adapt(ctl.load_adapted(tmp_path / "first").model, tmp_path / "first")]
        for adaptation in found:
            assert not adaptation.plan.fresh
            assert torch.allclose(adaptation.model.eval()(inputs), outputs, atol=1e-5)
    again = run(onward, tmp_path / "second")
    assert again["before"]["target"] == pytest.approx(report["after"]["target"])
    assert ctl.load_adapted(tmp_path / "second").model.head.layers == tuple(layers)


def test_in_python_labels_of_the_run_are_refused_in_another_order(first, speech_fields, tmp_path):
    """Given by hand, mixed or averaged with a model whose outputs have another order."""
    setting = prepare(parse_spec(speech_fields))
    with pytest.raises(ctl.SourceError, match=r"with the labels 0, 1, 2, and labels gives the source 2, 0, 1\."):
        ctl.adapt(setting.model(3), first[0], example=setting.example, labels=(["0", "1", "2"], ["2", "0", "1"]))
    adaptation = ctl.adapt(setting.model(3), first[0], example=setting.example, labels=((2, 0, 1), (0, 1, 2)))
    assert adaptation.plan["head.weight"].source_rows == (2, 0, 1)
    other = tmp_path / "other"
    shutil.copytree(first[0], other)
    assert ctl.soup([first[0], other])
    with_header(other, labels=["1", "0", "2"])
    for mixed in (lambda: ctl.soup([first[0], other]), lambda: ctl.interpolate(first[0], other, 0.5)):
        with pytest.raises(ctl.SourceError, match=r"same labels in one order.*has 0, 1, 2, and .* 1, 0, 2"):
            mixed()
    assert ctl.interpolate(first[0], other, 0.5, fresh=["head.*"])


def test_shares_of_instance_statistics_are_kept_or_refused(speech_fields, tmp_path):
    def mixing(prior):
        return [{"kind": "norm_adaptation", "train": "all", "statistics": "instance", "prior": prior}]

    run(parse_spec({**speech_fields, "strategies": mixing(4)}), tmp_path / "first")
    onward = after(speech_fields, tmp_path / "first")
    setting = prepare(parse_spec(speech_fields))
    message = r"of share 0\.2, padding leave_out \(prior 4\), and NormAdaptation has share 0\.1"
    with pytest.raises(ctl.SourceError, match=message):
        run(parse_spec({**onward, "strategies": mixing(9)}), tmp_path / "second")
    with pytest.raises(ctl.SourceError, match=message):
        ctl.adapt(setting.model(3), tmp_path / "first", mixing(9))
    loaded = ctl.load_adapted(tmp_path / "first").model
    inputs, labels = setting.domains.target_test.inputs, setting.domains.target_test.labels
    with torch.no_grad():
        outputs = loaded(inputs)
        right = (outputs.argmax(-1) == labels).float().mean().item()
    for strategies in (mixing(4), []):
        again = run(parse_spec({**onward, "strategies": strategies}), tmp_path / "second")
        assert again["before"]["target"]["accuracy"] == pytest.approx(right)
        adaptation = ctl.adapt(setting.model(3), tmp_path / "first", strategies)
        adaptation.replan(found="something")
        assert adaptation.plan.extensions[0].share == pytest.approx(0.2)
        with torch.no_grad():
            assert torch.equal(adaptation.model.eval()(inputs), outputs)


def test_fields_that_the_run_did_not_know_yet_have_their_defaults(first, speech_fields):
    """Saved before ``model.head`` could be named; naming it changes no weight."""
    folder, _ = first
    with_header(folder, model={"name": "tc_resnet8", "args": {}})
    assert obtain_source(prepare(parse_spec(after(speech_fields, folder)))).run is not None
    named = {**after(speech_fields, folder), "model": {"head": ["head"]}}
    assert obtain_source(prepare(parse_spec(named))).run is not None
