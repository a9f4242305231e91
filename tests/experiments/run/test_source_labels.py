"""Examples of the source are numbered by the labels of its model's outputs, or the run is refused before training."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import conservtl as ctl
from conservtl.data import Domains, Examples, length_of, renumber
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_labels import check_shots
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec
from conservtl.experiments.studies.trial import _training_data
from conservtl.tasks.vision import ImageSettings, Vision
from conservtl.tasks.vision.parts import ImagePart, LazyImages
from conservtl.tasks.vision.preprocessing import VisionPreprocessing

DIGITS = {"task": "vision", "data": {"kind": "digits", "shots": 2}, "training": {"epochs": 1, "evaluate_every": 5}}


def with_source(fields: dict, **source: Any) -> Any:
    return parse_spec({**fields, "source": {**fields["source"], **source}})


def digit_in_name(name: str) -> str:
    return Path(name).name.removeprefix("digit_").split("_")[0]


@pytest.mark.parametrize("task", ["speech", "vision"])
def test_the_sources_accuracy_is_that_of_its_labels_by_name(task, request, tmp_path):
    """Reference: the label in each example's name against the name of the largest output."""
    if task == "speech":
        fields, order = request.getfixturevalue("speech_fields"), ("2", "0", "1")
    else:
        training = {"epochs": 3, "lr": 3e-3, "evaluate_every": 99}
        fields, order = {**DIGITS, "source": {"training": training, "cache": str(tmp_path)}}, ("4", "0", "3", "1", "2")
    spec = with_source(fields, labels=order)
    report = run(spec, tmp_path / "out")
    setting = prepare(spec)
    source, test = obtain_source(setting), setting.domains.source_test
    assert source.origin == "cached"
    with torch.no_grad():
        answers = [order[place] for place in source.model(test.inputs).argmax(-1).tolist()]
    truth = [digit_in_name(name) for name in test.names]
    right = sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)
    assert right > 0.6
    assert report["before"]["source"]["accuracy"] == pytest.approx(right)
    assert report["per_class"]["source"]["labels"] == list(order)
    train = setting.domains.source_train
    assert [order[number] for number in train.labels.tolist()] == [digit_in_name(name) for name in train.names]


def test_weights_with_labels_in_another_order_are_scored_by_them(speech_fields, tmp_path):
    """A model trained in the usual order, its outputs then permuted, scores as before under the permuted list."""
    setting = prepare(parse_spec(speech_fields))
    source, order = obtain_source(setting).model, [2, 0, 1]
    test = setting.domains.source_test
    with torch.no_grad():
        right = float((source(test.inputs).argmax(-1) == test.labels).float().mean())
    state = dict(source.state_dict())
    state |= {name: tensor[order] for name, tensor in state.items() if name.startswith("head")}
    assert any(name.startswith("head") for name in state)
    torch.save(state, tmp_path / "source.pt")
    given = {"weights": str(tmp_path / "source.pt"), "labels": ["2", "0", "1"]}
    assert run(with_source(speech_fields, **given), tmp_path / "out")["before"]["source"]["accuracy"] == right


def test_weights_may_know_labels_that_the_source_data_does_not_have(speech_fields, tmp_path):
    wide = prepare(parse_spec(speech_fields)).model(3)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    fields = {**speech_fields, "data": {**speech_fields["data"], "words": ["0", "2"]}}
    given = {"weights": str(tmp_path / "wide.pt"), "labels": ["0", "1", "2"]}
    setting = prepare(with_source(fields, **given))
    assert set(setting.domains.source_train.labels.tolist()) == {0, 2}
    assert set(setting.domains.shots.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1", "x"], r"source\.labels must list every label of the source's data.*without '2'"),
        (["0", "1"], r"source\.labels must list every label.*received '0', '1', without '2'"),
        (["0", "1", "2", "3"], r"source\.labels must be labels of the source's data.*received '3'.*has '0', '1', '2'"),
        (["0", "1", "2", "1"], r"source\.labels: each label must be listed once; received '1' twice"),
    ],
)
def test_labels_that_the_data_contradicts_are_refused(speech_fields, labels, message):
    with pytest.raises(ctl.SpecError, match=message):
        prepare(with_source(speech_fields, labels=labels))


@pytest.mark.parametrize("data", ["auto", None])
@pytest.mark.parametrize(("outputs", "labels"), [(4, None), (2, None), (3, ["0", "1", "2", "3"])])
def test_another_number_of_outputs_than_labels_is_refused(speech_fields, tmp_path, data, outputs, labels):
    torch.save(prepare(parse_spec(speech_fields)).model(outputs).state_dict(), tmp_path / "source.pt")
    spec = with_source(speech_fields, weights=str(tmp_path / "source.pt"), labels=labels, data=data)
    message = rf"source\.weights 'source\.pt'.*has {outputs}, and there are {len(labels or '012')} labels.*source\.lab"
    for refused in (plan_of, lambda spec: run(spec, tmp_path / "out")):
        with pytest.raises(ctl.SourceError, match=message):
            refused(spec)
    assert not (tmp_path / "out").exists()


def test_a_model_with_outputs_of_its_own_number_is_refused_before_training(speech_fields, tmp_path):
    from conservtl.tasks.speech import Speech

    class Wide(Speech):
        name: ClassVar[str] = "speech_of_a_fixed_number"

        def build(self, model, preprocessing, outputs):
            return super().build(model, preprocessing, 7)

    with pytest.raises(ctl.SpecError, match=r"TCResNet must have an output for each of 3 labels; it has 7\."):
        run(parse_spec({**speech_fields, "task": Wide.name}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_examples_numbered_beyond_the_labels_are_refused(speech_fields):
    from conservtl.tasks.speech import Speech

    class Shifted(Speech):
        name: ClassVar[str] = "speech_numbered_from_one"

        def load(self, data, model, *, seed, source):
            domains = super().load(data, model, seed=seed, source=source)
            shots = domains.shots
            from dataclasses import replace

            return replace(domains, shots=Examples(shots.inputs, shots.labels + 1, shots.names))

    with pytest.raises(ctl.DataError, match=r"shots: the labels must be positions in a list of 3 labels.*received 3"):
        prepare(parse_spec({**speech_fields, "task": Shifted.name}))


def held(kind: str, count: int) -> Any:
    inputs, labels = torch.zeros(count, 3), torch.zeros(count, 1)
    if kind == "examples":
        return Examples(inputs, labels, tuple("abcdef"[:count]))
    return {"inputs": inputs, "labels": labels} if kind == "dictionary" else TensorDataset(inputs, labels)


@pytest.mark.parametrize("kind", ["examples", "dictionary", "dataset"])
@pytest.mark.parametrize("has_classes", [True, False])
@pytest.mark.parametrize("empty", ["shots", "validation", "target_test", "source_train", "source_test"])
def test_an_empty_set_is_refused_by_name(kind, has_classes, empty):
    task: Any = SimpleNamespace(name="pitch", has_classes=has_classes)
    names = ("shots", "validation", "target_test", "source_train", "source_test")
    sets = {name: held(kind, 2) for name in names}
    whole = Domains(labels=("a",), source_labels=("a",), preprocessing=None, **sets)
    check_shots(task, whole)
    check_shots(task, replace(whole, validation=None, source_train=None, source_test=None))
    with pytest.raises(ctl.DataError, match=rf"task 'pitch': {empty} must hold examples; received none\."):
        check_shots(task, replace(whole, **{empty: held(kind, 0)}))


def test_a_dictionary_without_entries_is_empty():
    assert length_of({}) == 0


def test_joint_training_numbers_the_sources_examples_by_the_targets_labels(speech_fields):
    setting = prepare(with_source(speech_fields, labels=("2", "0", "1")))
    data = _training_data("joint", setting)
    assert [str(number) for number in data.labels.tolist()] == [digit_in_name(name) for name in data.names]


def test_renumbering_reaches_every_form_of_data():
    """Labels below 0 mark what has no class."""
    labels, numbers, new = torch.tensor([0, 2, 1, 0, -100]), [1, 2, 0], [1, 0, 2, 1, -100]
    inputs = torch.arange(5.0)
    names = tuple("abcde")
    examples = renumber(Examples(inputs, labels, names), numbers)
    assert (examples.labels.tolist(), examples.names) == (new, names)
    table = {"x": inputs, "labels": labels}
    assert renumber(table, numbers)["labels"].tolist() == new
    assert table["labels"].tolist() == labels.tolist()
    pairs = renumber([(x, y) for x, y in zip(inputs, labels.tolist(), strict=True)], numbers)
    assert [pairs[place][1] for place in range(len(pairs))] == new
    rows = renumber([{"x": x, "labels": y} for x, y in zip(inputs, labels, strict=True)], numbers)
    assert [int(rows[place]["labels"]) for place in range(5)] == new
    settings = VisionPreprocessing(images=ImageSettings(size=4))
    lazy = LazyImages(ImagePart(tuple("abc"), (0, 2, 1), ("x", "y", "z"), (0, 1, 2), _image), settings, None)
    images = copy.deepcopy(renumber(lazy, numbers))
    assert (images.labels.tolist(), images.names, len(images)) == ([1, 0, 2], ("x", "y", "z"), 3)
    assert [int(images[place][1]) for place in range(3)] == [1, 0, 2]
    with pytest.raises(ctl.DataError, match=r"must be whole numbers.*float"):
        renumber(Examples(inputs, inputs, names), numbers)
    assert Vision().renumbered(examples, [0, 1, 2]).labels.tolist() == new


def _image(_: int) -> Any:
    return pytest.importorskip("PIL.Image").new("RGB", (4, 4))


def test_a_model_that_answers_with_an_object_is_counted_too():
    """Dropout and norms of the checked model stay as they are."""
    from conservtl.experiments.run.source_labels import check_outputs

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 4))
    before = copy.deepcopy(model.state_dict())
    check_outputs(Vision(), model, torch.randn(2, 3), 4)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ctl.SpecError, match="each of 5 labels; it has 4"):
        check_outputs(Vision(), model, torch.randn(2, 3), 5)
