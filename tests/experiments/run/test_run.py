"""A run writes what later work relies on, and measures what it says it measures."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import conservtl as ctl
from conservtl.data import Examples, spread
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import load_spec, parse_spec
from conservtl.tasks.speech import Speech


@pytest.fixture
def done(speech_fields, tmp_path):
    out = tmp_path / "out"
    return run(parse_spec(speech_fields), out), out, parse_spec(speech_fields)


def test_a_run_leaves_a_folder_with_everything(done):
    report, out, spec = done
    assert {p.name for p in out.iterdir()} >= {
        "report.json",
        "report.html",
        "model.safetensors",
        "spec.yaml",
        "history.jsonl",
    }
    stored = json.loads((out / "report.json").read_text())
    assert stored.keys() >= {"before", "after", "drift", "plan", "spec", "environment", "seconds"}
    for when in ("before", "after"):
        for domain in ("target", "source"):
            assert 0 <= stored[when][domain]["accuracy"] <= 1
    assert stored["agreement"]["before"] == {"agreement": 1.0, "kl": 0.0}
    assert load_spec(out / "spec.yaml") == spec
    assert len((out / "history.jsonl").read_text().splitlines()) == spec.training.epochs
    assert list(stored["drift"]) == list(ctl.Plan(**stored["plan"]).layers)
    assert all(value > 0 for value in stored["drift"].values())
    assert report["sentence"] in (out / "report.html").read_text()


def test_the_numbers_are_those_of_the_saved_model(done):
    report, out, spec = done
    domains = prepare(spec).domains
    adapted = ctl.load_adapted(out)
    right = adapted.probabilities(domains.target_test.inputs).argmax(-1) == domains.target_test.labels
    assert report["after"]["target"]["accuracy"] == pytest.approx(right.float().mean().item())


def test_answers_turned_by_the_adaptation_make_up_the_difference(done):
    report, *_ = done
    for domain, size in (("target", "target_test"), ("source", "source_test")):
        turned, (before, after) = report["turned"][domain], (report[when][domain] for when in ("before", "after"))
        assert turned["of"] == report["examples"][size]
        difference = (turned["better"] - turned["worse"]) / turned["of"]
        assert difference == pytest.approx(after["accuracy"] - before["accuracy"], abs=1e-6)


def test_the_saved_model_predicts_files_with_its_labels(done, humming):
    _, out, _ = done
    adapted = ctl.load_adapted(out)
    assert adapted.labels == ("0", "1", "2")
    found = adapted.predict([humming / "0_cleo_0.wav", humming / "2_anna_3.wav"])
    assert [f.file.name for f in found] == ["0_cleo_0.wav", "2_anna_3.wav"]
    assert all(f.label in adapted.labels and 1 / 3 <= f.probability <= 1 for f in found)
    with pytest.raises(ctl.DataError, match="nowhere"):
        adapted.predict(["nowhere.wav"])


def test_the_same_spec_gives_the_same_model_and_finds_the_source_in_the_cache(done, tmp_path):
    _, out, spec = done
    again = run(spec, tmp_path / "again")
    assert again["transfer"]["source"] == "cached"
    first, second = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_data_or_training_is_another_cached_source(untrained):
    first = obtain_source(prepare(parse_spec(untrained)))
    other = {**untrained, "data": {**untrained["data"], "target": "ben"}}
    assert (first.origin, obtain_source(prepare(parse_spec(other))).origin) == ("trained", "trained")
    assert obtain_source(prepare(parse_spec(untrained))).origin == "cached"


def test_the_test_part_selects_nothing(speech_fields, tmp_path):
    """Other test labels change the report, never the model."""
    spec = parse_spec({**speech_fields, "training": {"device": "cpu", "epochs": 3, "lr": 1e-3, "keep": "last"}})
    run(spec, tmp_path / "a")
    watched = parse_spec({**speech_fields, "training": {"device": "cpu", "epochs": 3, "lr": 1e-3, "evaluate_every": 3}})
    run(watched, tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_path_goes_from_what_it_was_to_what_it_became(done):
    """With labels shared its ends are the source model and the adapted one, on the same test parts."""
    report, out, _ = done
    path = report["path"]
    assert [entry["t"] for entry in path] == [number / 10 for number in range(11)]
    for entry, when in ((path[0], "before"), (path[-1], "after")):
        for domain in ("target", "source"):
            assert entry[domain] == pytest.approx(report[when][domain], abs=1e-5)
    assert [entry["kept"] for entry in path] == [False] * 10 + [True]
    assert report["path_examples"].keys() == {"target", "source"}
    assert "From the starting to the trained weights" in (out / "report.html").read_text()


def test_weights_taken_back_are_those_saved_measured_and_marked(done, speech_fields, tmp_path):
    _, out, _ = done
    strategies = [*speech_fields["strategies"], {"kind": "wise_ft", "t": 0.5}]
    report = run(parse_spec({**speech_fields, "strategies": strategies}), tmp_path / "back")
    (kept,) = (entry for entry in report["path"] if entry["kept"])
    assert kept["t"] == 0.5
    assert kept["target"] == pytest.approx(report["after"]["target"], abs=1e-5)
    assert report["finished"] == {"weight_interpolation": {"t": 0.5}}
    trained, found = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "back"))
    source = obtain_source(prepare(parse_spec(speech_fields))).model.state_dict()
    for name, tensor in ctl.interpolate(source, trained, 0.5).items():
        assert torch.equal(found[name], tensor)


def test_the_best_of_the_path_is_chosen_on_shots_and_source_data(speech_fields, tmp_path):
    fields = {**speech_fields, "training": {"device": "cpu", "epochs": 2, "lr": 1e-3, "keep": "path"}}
    with pytest.raises(ctl.SpecError, match=r"data\.validation"):
        run(parse_spec(fields), tmp_path / "out")
    fields["data"] = {**fields["data"], "shots": 4, "validation": 0.5}
    report = run(parse_spec(fields), tmp_path / "out")
    chosen = report["finished"]["path"]
    assert all(point.keys() == {"t", "target", "source"} for point in chosen["points"])
    assert [entry["t"] for entry in report["path"] if entry["kept"]] == [chosen["t"]]


def test_large_test_parts_are_thinned_for_the_path():
    data = Examples(torch.arange(10.0), torch.arange(10), tuple("abcdefghij"))
    assert spread(data, 4).labels.tolist() == [0, 2, 5, 7]
    assert spread(data, 10) is spread(data, None) is data
    pairs = TensorDataset(torch.arange(10.0), torch.arange(10))
    assert [int(label) for _, label in spread(pairs, 5)] == [0, 2, 4, 6, 8]


def test_keeping_the_best_needs_a_validation_part(speech_fields, tmp_path):
    fields = {**speech_fields, "training": {"device": "cpu", "epochs": 2, "keep": "target"}}
    with pytest.raises(ctl.SpecError, match=r"data\.validation"):
        run(parse_spec(fields), tmp_path / "out")
    fields["data"] = {**fields["data"], "shots": 4, "validation": 0.5}
    assert run(parse_spec(fields), tmp_path / "out")["after"]["target"]["accuracy"] >= 0


def test_the_bar_writes_the_headline_metric_as_its_task_does(speech_fields):
    setting = prepare(parse_spec(speech_fields))
    assert setting.show_metric("accuracy", 0.873) == "accuracy 87.3 %"
    assert setting.show_metric("wer", 0.873) == "wer 0.873"


@pytest.mark.parametrize(
    ("fields", "subject", "them"),
    [
        ({"training": {"device": "cpu", "epochs": 2, "keep": "target"}}, r"training\.keep=target chooses", "it"),
        ({"training": {"device": "cpu", "epochs": 2, "patience": 1}}, r"training\.patience=1 chooses", "it"),
        (
            {
                "training": {"device": "cpu", "epochs": 2, "keep": "path", "patience": 1},
                "strategies": [{"kind": "lhuc"}],
            },
            r"training\.keep=path and training\.patience=1 choose",
            "them",
        ),
        ({"strategies": [{"kind": "weight_interpolation", "t": None}]}, "WeightInterpolation chooses", "it"),
    ],
)
def test_shots_too_few_to_split_are_named(speech_fields, tmp_path, fields, subject, them):
    """One of one shot must stay to train on."""
    data = {**speech_fields["data"], "shots": 1, "validation": 0.25}
    leaves = rf"^{subject} by a validation set, but data\.validation=0\.25 of 1 shot leaves none\. .* {them} out\.$"
    with pytest.raises(ctl.SpecError, match=leaves):
        run(parse_spec({**speech_fields, "data": data, **fields}), tmp_path / "out")


def test_without_source_data_agreement_stands_in(done, speech_fields, tmp_path):
    _, out, _ = done
    fields = {**speech_fields, "source": {"data": None, "weights": str(out / "model.safetensors")}}
    report = run(parse_spec(fields), tmp_path / "blind")
    assert report["before"]["source"] is None
    assert report["after"]["source"] is None
    assert 0 <= report["agreement"]["after"]["agreement"] <= 1
    assert "agreement" in report["sentence"]


def test_neither_weights_nor_source_data_is_refused(speech_fields, tmp_path):
    with pytest.raises(ctl.SpecError, match=r"source\.weights"):
        run(parse_spec({**speech_fields, "source": {"data": None}}), tmp_path / "out")


def test_weights_of_another_model_are_refused(done, speech_fields, tmp_path):
    _, out, _ = done
    weights = load_file(out / "model.safetensors")
    path = tmp_path / "cut.pt"
    torch.save({name: tensor for name, tensor in weights.items() if "blocks.1" not in name}, path)
    with pytest.raises(ctl.SourceError, match=r"has no tensor 'blocks\.1\."):
        run(parse_spec({**speech_fields, "source": {"weights": str(path)}}), tmp_path / "out")


def test_weights_under_other_names(done, speech_fields, tmp_path):
    """Source section's key, prefix and rename; the plan and the report say so, and the error what would fit."""
    _, out, _ = done
    plain = load_file(out / "model.safetensors")
    path = tmp_path / "wrapped.pt"
    ema = {f"encoder.{name}".replace(".weight", ".w"): tensor for name, tensor in plain.items()}
    torch.save({"state_dict": {}, "ema": {**ema, "projector": torch.zeros(7)}, "epoch": 3}, path)
    source = {"weights": str(path), "key": "ema", "prefix": "encoder", "rename": {r"\bw$": "weight"}}
    spec = parse_spec({**speech_fields, "source": source})
    read = obtain_source(prepare(spec))
    assert all(torch.equal(read.model.state_dict()[name], tensor) for name, tensor in plain.items())
    text = str(plan_of(spec))
    for note in (
        "took the entry 'ema'",
        "removed the prefix 'encoder', left out 1 tensor without it",
        r"renamed '\\bw$' to 'weight'",
    ):
        assert f"source  {note}" in text
    report = run(spec, tmp_path / "out")
    assert "took the entry 'ema'" in report["transfer"]["notes"]
    without = {**speech_fields, "source": {"weights": str(path), "key": "ema"}}
    with pytest.raises(ctl.SourceError, match=r"With prefix='encoder\.'"):
        run(parse_spec(without), tmp_path / "out")
    with pytest.raises(ctl.SpecError, match=r"source\.prefix says how to read source\.weights, which is null"):
        run(parse_spec({**speech_fields, "source": {"prefix": "encoder"}}), tmp_path / "out")


DIGITS = {
    "task": "vision",
    "data": {"kind": "digits", "shots": 2},
    "training": {"device": "cpu", "epochs": 1, "lr": 1e-3, "evaluate_every": 5},
}


def test_changed_labels_make_the_head_fresh_and_keep_the_sources_head_aside(tmp_path, sources):
    source = {"training": {"device": "cpu", "epochs": 1, "lr": 3e-3, "evaluate_every": 9}, "cache": str(sources)}
    spec = parse_spec({**DIGITS, "source": source, "strategies": [{"kind": "feature_extraction"}]})
    report = run(spec, tmp_path / "out")
    plan = ctl.Plan(**report["plan"])
    assert {row.layer for row in plan.rows if row.origin == "fresh"} == {"linear"}
    assert report["agreement"] is None
    assert "New parameters keep their trained values" in (tmp_path / "out" / "report.html").read_text()
    # The body is frozen, so under its own head the source model must be exactly what it was.
    assert all(entry["source"] == report["path"][0]["source"] for entry in report["path"])
    assert report["after"]["source"] == report["before"]["source"]
    assert set(report["drift"].values()) == {0.0}


def test_output_side_transfer_between_label_lists_is_refused():
    spec = parse_spec({**DIGITS, "strategies": [{"kind": "layer_transfer", "side": "output", "layers": 2}]})
    with pytest.raises(ctl.SourceError, match=r"'linear'.*labels differ"):
        plan_of(spec)


def test_planning_trains_nothing(untrained, tmp_path):
    plan = plan_of(parse_spec(untrained))
    assert plan.totals()["fresh"] == 0
    assert not (tmp_path / "cache").exists()


def test_the_head_of_a_spec(speech_fields):
    """Named in the model section; a name that is not in the model is refused."""
    fields = {**speech_fields, "strategies": [{"kind": "lp_ft"}], "model": {"head": ["stem*"]}}
    setting = prepare(parse_spec(fields))
    model = setting.model(len(setting.domains.labels))
    assert setting.head(model)
    assert all(name.startswith("stem") for name in setting.head(model))
    plan = setting.adaptation(model).plan
    assert set(plan.phases[0].frozen) == {row.name for row in plan.rows} - set(setting.head(model))
    setting = prepare(parse_spec({**fields, "model": {"head": ["haed"]}}))
    with pytest.raises(ctl.SelectorError, match=r"head: 'haed'.*'head'"):
        setting.adaptation(model)


def test_agreement_is_the_kl_divergence_from_the_source():
    source = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log()
    adapted = torch.tensor([[0.6, 0.4], [0.4, 0.6]]).log()
    by_hand = [0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.8 / 0.4), 0.5 * math.log(0.5 / 0.4 * 0.5 / 0.6)]
    task = Speech()
    assert task.agreement(adapted, source)["kl"] == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert task.agreement(adapted[:1], source[:1])["agreement"] == 0.0


def test_accuracy_by_class_counts_each_class_on_its_own():
    labels = torch.tensor([0, 0, 1])
    before, after = torch.eye(3)[[0, 1, 1]], torch.eye(3)[[0, 0, 0]]
    found = Speech().per_class(
        [before[:1], before[1:]], [after[:1], after[1:]], [labels[:1], labels[1:]], ["a", "b", "c"]
    )
    assert found["before"] == [0.5, 1.0, None]
    assert found["after"] == [1.0, 0.0, None]
    assert (found["labels"], found["counts"]) == (["a", "b", "c"], [2, 1, 0])
    assert Speech().metrics(before, (None, labels))["accuracy"] == pytest.approx(2 / 3)
    assert Speech().errors([before[:1], before[1:]], [labels[:1], labels[1:]], []) == [0, 1, 0]


def test_a_new_run_does_not_leave_an_earlier_ones_results_beside_its_own(done, speech_fields):
    _, out, _ = done
    (out / "notes.txt").write_text("mine")
    diverging = {
        **speech_fields,
        "strategies": [],
        "training": {"device": "cpu", "epochs": 9, "lr": 1e30, "optimizer": "sgd"},
    }
    with pytest.raises(ctl.TrainingDivergedError):
        run(parse_spec(diverging), out)
    assert not {"report.json", "report.html", "model.safetensors"} & {p.name for p in out.iterdir()}
    assert (out / "notes.txt").read_text() == "mine"


def test_out_must_be_a_folder(speech_fields, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ctl.SpecError, match="is a file"):
        run(parse_spec(speech_fields), tmp_path / "file")


def test_one_file_predicts_as_well_as_a_list(done, humming):
    _, out, _ = done
    assert ctl.load_adapted(out).predict(humming / "0_cleo_0.wav") == ctl.load_adapted(out).predict(
        [humming / "0_cleo_0.wav"]
    )


def test_a_fresh_head_is_not_the_one_the_source_began_with(speech_fields):
    """The source's body was trained under its own initial head: under that one a fresh head would know the answers."""
    setting = prepare(parse_spec(speech_fields | {"strategies": [{"kind": "feature_extraction"}]}))
    first = setting.model(len(setting.domains.source_labels))
    source = obtain_source(setting).model
    fresh = setting.adaptation(source).model
    for other in (first, source):
        assert not torch.equal(fresh.state_dict()["head.weight"], other.state_dict()["head.weight"])


def test_tensorboard_on_request(speech_fields, tmp_path):
    run(parse_spec(speech_fields), tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()
    pytest.importorskip("tensorboard")
    run(parse_spec(speech_fields), tmp_path / "with", tensorboard=True)
    assert list((tmp_path / "with" / "tensorboard").glob("events.out.*"))


def test_weights_of_a_vision_transformer_for_another_image_size(tmp_path):
    """Positions are resampled as timm resamples them when it loads weights, and the plan says so."""
    timm = pytest.importorskip("timm")
    from PIL import Image
    from timm.models.vision_transformer import checkpoint_filter_fn

    for number, (part, label) in enumerate((p, c) for p in ("train", "test") for c in ("cat", "dog")):
        for i in range(4):
            file = tmp_path / "images" / part / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (60 * number, 30 * i, 9)).save(file)
    given = timm.create_model("test_vit", num_classes=2).state_dict()
    torch.save({"state_dict": given}, tmp_path / "weights.pt")
    data = {"kind": "imagefolder", "root": str(tmp_path / "images"), "shots": 2, "images": {"size": 64}}
    source = {"weights": str(tmp_path / "weights.pt"), "data": None, "labels": ["cat", "dog"]}
    spec = parse_spec({"task": "vision", "model": {"name": "timm/test_vit"}, "data": data, "source": source})
    read = obtain_source(prepare(spec))
    expected = checkpoint_filter_fn(dict(given), timm.create_model("test_vit", num_classes=2, img_size=64))
    torch.testing.assert_close(read.model.state_dict(), expected)
    assert "source  resampled pos_embed from 10×10 to 4×4 positions with timm.layers" in str(plan_of(spec))


def test_the_plan_says_which_recordings_are_left_out(speech_fields, humming, tmp_path):
    folder = tmp_path / "recordings"
    shutil.copytree(humming, folder)
    (folder / "a cleo 1.wav").write_bytes((folder / next(humming.glob("*cleo_1.wav")).name).read_bytes())
    speech_fields["data"]["root"] = str(folder)
    plan = plan_of(parse_spec(speech_fields))
    (line,) = (line for line in str(plan).splitlines() if line.startswith("data  1 of "))
    assert line.endswith("audio files does not match data.pattern and is left out (1 .wav), such as a cleo 1.wav")
