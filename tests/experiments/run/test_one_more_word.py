"""A target with labels of its own beside the source's: one head knows both, in both tasks and in studies."""

import json

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import parse_spec
from conservtl.experiments.studies.comparison import compare
from conservtl.experiments.studies.layer_sweep import sweep
from conservtl.experiments.studies.trial import _training_data
from conservtl.report import write_compare, write_sweep


@pytest.fixture
def one_more(humming, sources, tmp_path):
    """A spec whose target says a word more than the other speakers, which sorts before theirs."""
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path / "recordings"
    root.mkdir()
    for file in humming.iterdir():
        (root / file.name).symlink_to(file)
    generator = torch.Generator().manual_seed(3)
    for take in range(8):
        soundfile.write(root / f"00_cleo_{take}.wav", (0.3 * torch.randn(4000, generator=generator)).numpy(), 8000)
    return {
        "task": "speech",
        "data": {"kind": "folder", "root": str(root), "target": "cleo", "shots": 3, "validation": 0.3}
        | {"follow_links": True},
        "source": {"training": {"epochs": 12, "lr": 3e-3, "evaluate_every": 100}, "cache": str(sources)},
        "strategies": [{"kind": "l2_sp", "on": "all", "alpha": 1.0}],
        "training": {"epochs": 8, "lr": 3e-3},
    }


def test_one_head_answers_for_the_source_and_for_the_new_word(one_more, tmp_path):
    """Reference: the saved model's answers by name, on both test parts."""
    report = run(parse_spec(one_more), tmp_path / "out")
    plan = ctl.Plan(**report["plan"])
    assert plan["head.weight"].source_rows == (0, None, 1, 2)
    assert report["rows_by_label"] == ["head: 3 of 4"]
    adapted = ctl.load_adapted(tmp_path / "out")
    assert adapted.labels == ("0", "00", "1", "2")
    domains = prepare(parse_spec(one_more)).domains
    for name, labels, part in (
        ("target", domains.labels, domains.target_test),
        ("source", domains.source_labels, domains.source_test),
    ):
        answers = [adapted.labels[place] for place in adapted.probabilities(part.inputs).argmax(1).tolist()]
        right = [answer == labels[number] for answer, number in zip(answers, part.labels.tolist(), strict=True)]
        assert report["after"][name]["accuracy"] == pytest.approx(sum(right) / len(right))
        assert report["per_class"][name]["labels"] == list(labels)
    source = obtain_source(prepare(parse_spec(one_more))).model
    with torch.no_grad():
        right = source(domains.source_test.inputs).argmax(1) == domains.source_test.labels
    assert report["before"]["source"]["accuracy"] == pytest.approx(right.float().mean().item())
    assert report["agreement"]["before"]["agreement"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "rows copied by label, head: 3 of 4" in page
    again = {**one_more, "source": {"weights": str(tmp_path / "out"), "data": None}}
    second = run(parse_spec(again), tmp_path / "second")  # all four labels are the source's now
    assert second["before"]["target"]["accuracy"] == pytest.approx(report["after"]["target"]["accuracy"])
    assert not second["rows_by_label"]


def test_agreement_is_of_the_labels_that_both_know(one_more, tmp_path):
    """Reference: the largest of the three outputs in common, of the source model and of the adapted one."""
    report = run(parse_spec(one_more), tmp_path / "out")
    setting = prepare(parse_spec(one_more))
    source, adapted = obtain_source(setting).model, ctl.load_adapted(tmp_path / "out").model
    inputs = setting.domains.target_test.inputs
    with torch.no_grad():
        same = source(inputs).argmax(1) == adapted(inputs)[:, [0, 2, 3]].argmax(1)
    assert report["agreement"]["after"]["agreement"] == pytest.approx(same.float().mean().item())


def test_the_plan_says_it_and_fresh_turns_it_off(one_more):
    plan = plan_of(parse_spec(one_more))
    assert "rows copied by label  head: 3 of 4" in str(plan)
    assert "labels new: 00" in str(plan)
    for fresh in ("head", ["head"], ["head.*"]):
        plan = plan_of(parse_spec({**one_more, "fresh": fresh}))
        assert plan["head.weight"].origin == "fresh"
        assert "rows copied" not in str(plan)
    with pytest.raises(ctl.SelectorError, match="no_such"):
        plan_of(parse_spec({**one_more, "fresh": "no_such"}))


def test_a_fresh_head_is_scored_on_the_source_as_a_copied_one_is(one_more, tmp_path):
    """Both answer with outputs of their own; before training the source model is scored."""
    copied = run(parse_spec(one_more), tmp_path / "copied")
    fresh = run(parse_spec({**one_more, "fresh": "head"}), tmp_path / "fresh")
    assert fresh["before"]["source"] == copied["before"]["source"]
    adapted = ctl.load_adapted(tmp_path / "fresh")
    domains = prepare(parse_spec(one_more)).domains
    answers = adapted.probabilities(domains.source_test.inputs).argmax(1)
    right = answers == torch.tensor([0, 2, 3])[domains.source_test.labels]
    assert fresh["after"]["source"]["accuracy"] == pytest.approx(right.float().mean().item())
    assert fresh["agreement"] is None


def test_weights_that_know_more_labels_than_the_target(one_more, tmp_path):
    """Of four labels two are kept; the source's own head answers for all four."""
    run(parse_spec(one_more), tmp_path / "first")
    data = {**one_more["data"], "words": ["0", "2"]}
    fields = {**one_more, "data": data, "source": {"weights": str(tmp_path / "first")}}
    report = run(parse_spec(fields), tmp_path / "second")
    assert report["rows_by_label"] == ["head: 2 of 2 (2 of the source's 4 not used)"]
    assert ctl.Plan(**report["plan"])["head.weight"].source_rows == (0, 3)
    assert report["after"]["source"] is not None


def test_images_of_one_more_class(tmp_path):
    """Reference: rows of the source model's head by the names of the folders."""
    pillow = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for root, classes in (("source", ("b", "c")), ("target", ("a", "b", "c"))):
        for number, name in enumerate(("a", "b", "c")):
            folder = tmp_path / root / name
            for place in range(6 if name in classes else 0):
                folder.mkdir(parents=True, exist_ok=True)
                pixels = torch.rand(16, 16, 3, generator=generator) * 60 + 90 * number
                pillow.fromarray(pixels.byte().numpy()).save(folder / f"{place}.png")
    fields = {
        "task": "vision",
        "data": {
            "kind": "imagefolder",
            "root": str(tmp_path / "target"),
            "source_root": str(tmp_path / "source"),
            "shots": 2,
            "images": {"size": 16},
        },
        "source": {"training": {"epochs": 2, "lr": 1e-3, "evaluate_every": 9}, "cache": str(tmp_path / "cache")},
        "training": {"epochs": 1},
        "strategies": [{"kind": "output_conservation"}],
    }
    report = run(parse_spec(fields), tmp_path / "out")
    setting = prepare(parse_spec(fields))
    adaptation = setting.adaptation(obtain_source(setting).with_notes())
    (name,) = (row.name for row in adaptation.plan.rows if row.name in adaptation.plan.head and row.kind == "weight")
    assert adaptation.plan[name].source_rows == (None, 0, 1)
    assert report["rows_by_label"][0].endswith(": 2 of 3")
    source = obtain_source(setting).model.state_dict()[name]
    assert torch.equal(adaptation.start[name][1:], source)
    assert report["after"]["source"] is not None


def test_joint_training_numbers_the_source_by_the_targets_labels(one_more):
    setting = prepare(parse_spec(one_more))
    joined = _training_data("joint", setting)
    count = len(setting.domains.source_train.labels)
    assert torch.equal(joined.labels[:count], torch.tensor([0, 2, 3])[setting.domains.source_train.labels])


def test_studies_say_that_rows_are_copied(one_more, tmp_path, capsys):
    fields = {**one_more, "training": {"epochs": 1}}
    section = {"targets": ["cleo"], "seeds": 1, "baselines": ["source as it is", "linear probe"]}
    result = compare(parse_spec({**fields, "compare": section}), tmp_path / "compare")
    write_compare(result, tmp_path / "compare.html")
    section = {"targets": ["cleo"], "seeds": 1, "layers": [1], "sides": ["input"], "controls": False}
    swept = sweep(parse_spec({**fields, "sweep": section}), tmp_path / "sweep")
    write_sweep(swept, tmp_path / "sweep.html")
    for name, found in (("compare", result), ("sweep", swept)):
        assert found["rows_by_label"] == ["head: 3 of 4"]
        assert "Rows copied by label, head: 3 of 4." in (tmp_path / f"{name}.html").read_text()
        json.dumps(found)
