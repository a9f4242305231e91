"""A recognizer through a whole run: planned, trained, reported, loaded, predicted with and adapted again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import conservtl as ctl
from conservtl import cli
from conservtl.cli import app
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.spec.spec import load_spec, parse_spec, with_fields
from conservtl.experiments.studies.comparison import compare
from conservtl.tasks.transcribe.long_recordings import joined_frames

soundfile = pytest.importorskip("soundfile")
jiwer = pytest.importorskip("jiwer")

RATE = 2000
EXAMPLES = Path(__file__).parents[3] / "examples" / "speech"


def tones(text, pitch, seed):
    """A tone for each letter."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(RATE // 10) / RATE
    parts = [torch.sin(2 * torch.pi * pitch * (100 + 100 * " abc".index(letter)) * time) for letter in text]
    wave = torch.cat(parts)
    return wave + 0.1 * torch.randn(len(wave), generator=generator)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three speakers of a language of three letters; one speaks higher."""
    root = tmp_path_factory.mktemp("corpus")
    lines = []
    for speaker, pitch in (("ann", 1.0), ("bob", 1.05), ("cid", 1.8)):
        for number in range(10):
            text = ["ab ca", "c b", "abc", "ba ab c", "cab", "a c b", "bc", "aba", "ca bc", "b a"][number]
            name = f"{speaker}{number}.wav"
            soundfile.write(root / name, tones(text, pitch, number).numpy() / 4, RATE)
            lines.append({"audio_filepath": name, "text": text, "speaker": speaker})
    (root / "all.json").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def spec(root, tmp_path_factory):
    return parse_spec(
        {
            "task": "transcribe",
            "model": {"args": {"width": 16, "blocks": 1, "heads": 2, "subsampling": 2, "dropout": 0}},
            "data": {
                "kind": "manifest",
                "root": str(root),
                "target": "cid",
                "shots": 4,
                "held_out": 0.3,
                "features": {"sample_rate": RATE, "n_mels": 12, "hop": 0.02},
            },
            "source": {
                "training": {"epochs": 12, "batch_size": 6, "lr": 0.02, "evaluate_every": 12, "threads": 1},
                "cache": str(tmp_path_factory.mktemp("cache")),
            },
            "strategies": [{"kind": "l2_sp", "alpha": 0.01}, {"kind": "output_conservation", "rho": 0.1}],
            "training": {"epochs": 10, "batch_size": 4, "lr": 0.002, "evaluate_every": 5, "threads": 1},
        }
    )


@pytest.fixture(scope="module")
def done(spec, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return run(spec, out), out


def test_a_run_reports_the_word_error_rate_as_lower_is_better(done):
    report, out = done
    assert report["metric"] == {"key": "wer", "name": "word error rate", "better": "lower", "share": True}
    assert set(report["after"]["target"]) == {"loss", "wer", "cer"}
    assert report["after"]["target"]["loss"] < report["before"]["target"]["loss"]
    assert 0 <= report["agreement"]["after"]["agreement"] <= 1
    assert report["agreement"]["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "word error rate" in report["sentence"]
    assert "word error rate" in (out / "report.html").read_text()


VOICES = {"time_masks": 0, "frequency_masks": 0, "speed": 0.25, "frequency_stretch": 0.25, "tilt": 0.5}


def test_a_run_that_compares_on_other_voices(spec, tmp_path):
    """Of another length, with padding of their own; said by plan and card, kept in the resolved spec."""
    chosen = with_fields(spec, {"data.proxies": VOICES, "training.epochs": 2, "training.evaluate_every": 2})
    assert "on changed copies of the inputs" in str(plan_of(chosen))
    assert "on changed copies of the inputs" not in str(plan_of(spec))
    run(chosen, tmp_path / "run")
    assert load_spec(tmp_path / "run" / "spec.yaml").data.proxies == chosen.data.proxies
    assert "on changed copies of the inputs" in (tmp_path / "run" / "report.html").read_text()


def test_proxies_that_nothing_compares_on_are_refused(spec, tmp_path):
    chosen = with_fields(spec, {"data.proxies": VOICES, "strategies": [{"kind": "l2_sp"}]})
    for begin in (plan_of, lambda one: run(one, tmp_path / "run")):
        with pytest.raises(ctl.SpecError, match=r"data\.proxies are inputs on which .* no strategy here does"):
            begin(chosen)
    with pytest.raises(ctl.SpecError, match=r"proxies are made of the shots' features, and waves change recordings"):
        with_fields(spec, {"data.proxies": {"waves": {}}})


def test_the_error_rate_is_that_of_the_files_transcripts_pooled_over_words(done, spec, root):
    """jiwer on all transcripts at once: errors and words summed, no mean of utterances."""
    report, out = done
    test = prepare(spec).domains.target_test
    adapted = ctl.load_adapted(out)
    said = {
        line["audio_filepath"]: line["text"] for line in map(json.loads, (root / "all.json").read_text().splitlines())
    }
    found = adapted.predict([root / name for name in test.names], batch_size=2)
    references, heard = [said[name] for name in test.names], [one.label for one in found]
    assert report["after"]["target"]["wer"] == pytest.approx(jiwer.wer(references, heard))
    assert report["after"]["target"]["cer"] == pytest.approx(jiwer.cer(references, heard))
    assert all(0 <= one.probability <= 1 for one in found)


def test_the_page_shows_errors_by_kind_and_players_for_the_worst_utterances(done, spec):
    report, out = done
    kinds, people, _ = report["details"]["tables"]
    assert [row[0] for row in kinds["rows"]] == ["target, before", "target, after", "source, before", "source, after"]
    assert float(kinds["rows"][1][5]) == pytest.approx(100 * report["after"]["target"]["wer"], abs=0.06)
    assert {row[0] for row in people["rows"]} == {"target: cid", "source: ann", "source: bob"}
    worst = report["details"]["examples"]
    assert 0 < len(worst) <= 10
    page = (out / "report.html").read_text()
    assert page.count("<audio") == len(worst)
    assert "Word errors by kind" in page
    assert report["real_time_factor"] > 0
    assert "real-time factor" in page
    assert "same answer as the source model" in page
    assert f"{report['agreement']['after']['kl']:.3f}" in page


def test_a_saved_recognizer_decodes_as_it_is_told(done, spec, root, tmp_path):
    """By a lexicon only its words are heard; the run that goes on from it decodes in its own way."""
    pytest.importorskip("flashlight.lib.text.decoder")
    _, out = done
    words = tmp_path / "words.txt"
    words.write_text("ab\nca\n")
    decoding = {"kind": "beam", "lexicon": str(words)}
    files = [root / f"cid{number}.wav" for number in range(4)]
    heard = ctl.load_adapted(out, decoding=decoding).predict(files)
    assert {word for one in heard for word in one.label.split()} <= {"ab", "ca"}
    assert all(0 <= one.probability <= 1 for one in heard)
    printed = CliRunner().invoke(app, ["predict", str(out), *map(str, files), "--decoding", str(decoding)])
    assert printed.stdout.splitlines() == [str(one) for one in heard]

    fields = {"source.weights": str(out / "model.safetensors"), "data.decoding": decoding, "training.epochs": 1}
    report = run(with_fields(spec, fields | {"training.evaluate_every": 1}), tmp_path / "again")
    of_words = [name for name, _, *_ in report["details"]["tables"][2]["rows"]]
    assert of_words
    again = ctl.load_adapted(tmp_path / "again").predict(files)
    assert {word for one in again for word in one.label.split()} <= {"ab", "ca"}
    words.unlink()
    with pytest.raises(ctl.DataError, match=r"^decoding\.lexicon: there is no file .* kind: greedy"):
        ctl.load_adapted(tmp_path / "again")
    with pytest.raises(ctl.DataError, match=r"^data\.decoding\.lexicon: there is no file"):
        prepare(with_fields(spec, {"data.decoding": decoding}))
    assert ctl.load_adapted(tmp_path / "again", decoding={"kind": "greedy"}).predict(files)


def test_wrong_fields_of_the_decoding_are_named(done):
    _, out = done
    for decoding, message in (
        ({"kind": "bean"}, "decoding: .*'beam'"),
        ({"kind": "beam", "size": 3}, r"decoding\.beam\.size|decoding.size: there is no such field"),
        ({"kind": "beam", "beam": 0}, "greater than or equal to 1; received 0"),
    ):
        with pytest.raises(ctl.SpecError, match=message):
            ctl.load_adapted(out, decoding=decoding)
    shown = CliRunner().invoke(app, ["predict", str(out), "x.wav", "--decoding", "beam"])
    assert "--decoding must hold fields" in str(shown.exception) + shown.output


def test_the_command_line_hears_a_recording_of_ten_minutes(done, tmp_path, monkeypatch, capsys):
    """Twenty-five windows; the same windows by hand give the same text."""
    _, out = done
    texts = ["ab ca", "c b", "abc", "ba ab c"]
    wave = torch.cat([tones(texts[number % 4] + " ", 1.0, number) for number in range(1200)])[: 600 * RATE]
    soundfile.write(tmp_path / "long.wav", wave.numpy() / 4, RATE)
    monkeypatch.setattr(sys, "argv", ["conservtl", "predict", str(out), str(tmp_path / "long.wav")])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    adapted = ctl.load_adapted(out)
    spans = [(24.0 * place, min(600.0, 24.0 * place + 30)) for place in range(25)]
    wave = torch.from_numpy(soundfile.read(tmp_path / "long.wav", dtype="float32")[0])
    parts = [wave[round(start * RATE) : round(end * RATE)] for start, end in spans]
    inputs = [adapted.preprocessing.features(part, RATE).unsqueeze(0) for part in parts]
    outputs = [adapted.outputs({"inputs": one, "lengths": torch.tensor([one.shape[1]])}) for one in inputs]
    (expected,) = adapted.task.heard(joined_frames(outputs, spans))
    assert len(expected.split()) > 100
    assert f"\t{expected}\t" in printed


def test_its_plan_lists_the_blocks_and_the_head(spec):
    layers = plan_of(spec).layers
    assert layers[0].startswith("subsampling")
    assert layers[-1] == "head"


def test_a_saved_run_is_a_source_with_its_vocabulary(done, spec, tmp_path):
    _, out = done
    again = with_fields(spec, {"source.weights": str(out / "model.safetensors"), "data.target": "bob"})
    setting = prepare(again)
    assert setting.shared
    report = run(with_fields(again, {"training.epochs": 1, "training.evaluate_every": 1}), tmp_path / "again")
    assert report["transfer"]["fresh"] == {}


def test_a_growing_vocabulary_keeps_the_rows_of_known_tokens(done, spec):
    """The new letter and the new order are the target's; rows of known letters are the source's."""
    from conservtl.experiments.run.source_training import obtain_source

    source = obtain_source(prepare(spec))
    fields = {
        "source.weights": None,
        "source.labels": None,
        "data.tokens": {"kind": "characters", "alphabet": "cd ba"},
    }
    setting = prepare(with_fields(spec, fields))
    old, new = ("<blank>", "|", "a", "b", "c"), ("<blank>", "c", "d", "|", "b", "a")
    assert setting.domains.labels == new
    adaptation = ctl.adapt(
        setting.model(len(new), target=True), source.model, [], labels=(new, old), example=setting.example
    )
    head, before = adaptation.model.head.weight, source.model.head.weight
    for row, token in enumerate(new):
        if token in old:
            assert torch.equal(head[row], before[old.index(token)])


@pytest.mark.parametrize("alphabet", ["cd ba", " cba"])
def test_a_saved_run_goes_on_with_more_tokens_or_another_order(done, spec, tmp_path, alphabet):
    """From the folder of a run: known rows are its own, and the source's utterances are scored by its tokens."""
    before, out = done
    fields = {
        "source.weights": str(out / "model.safetensors"),
        "data.tokens": {"kind": "characters", "alphabet": alphabet},
        "training.epochs": 1,
        "training.evaluate_every": 1,
        "training.lr": 1e-6,
        "source.data": "auto",
    }
    report = run(with_fields(spec, fields), tmp_path)
    old, new = (ctl.load_adapted(folder) for folder in (out, tmp_path))
    assert new.labels == ("<blank>", *("|" if letter == " " else letter for letter in alphabet))
    for row, token in enumerate(new.labels):
        if token in old.labels:
            torch.testing.assert_close(
                new.model.head.weight[row], old.model.head.weight[old.labels.index(token)], rtol=0, atol=1e-4
            )
    if "d" not in alphabet:  # no other answer is possible
        assert report["before"]["target"]["wer"] == pytest.approx(before["after"]["target"]["wer"])
        assert report["after"]["source"]["wer"] == pytest.approx(before["after"]["source"]["wer"])


def test_a_saved_run_with_other_features_is_refused(done, spec):
    _, out = done
    fields = {"source.weights": str(out / "model.safetensors"), "data.features.hop": 0.01}
    with pytest.raises(ctl.SourceError, match=r"data.features.hop was 0.02 in that run and is 0.01 here"):
        prepare(with_fields(spec, fields))


def test_source_texts_with_tokens_that_the_saved_run_lacks_are_refused(done, spec, root, tmp_path):
    _, out = done
    lines = [("dan", "ann0", "dab"), *(("bob", f"bob{number}", "ab") for number in range(6))]
    for speaker, name, text in lines:
        with (tmp_path / "other.json").open("a") as file:
            line = {"audio_filepath": str(root / f"{name}.wav"), "text": text, "speaker": speaker}
            file.write(json.dumps(line) + "\n")
    fields = {"source.weights": str(out / "model.safetensors"), "data.tokens.alphabet": " abcd"}
    fields |= {"data.root": str(tmp_path), "data.target": "bob", "data.held_out": 0.0, "data.follow_links": True}
    with pytest.raises(ctl.SpecError, match=r"must list every label of the source's data.* without 'd'"):
        prepare(with_fields(spec, fields))


def test_a_comparison_ranks_by_the_lowest_error(spec, tmp_path):
    section = {"seeds": 1, "targets": ["cid"], "baselines": ["source as it is", "fine-tuning, low rate"]}
    result = compare(with_fields(spec, {"compare": section, "training.epochs": 2}), tmp_path)
    (table,) = result["tables"]
    assert result["metric"]["better"] == "lower"
    means = {row["variant"]: row["harmonic"]["mean"] for row in table["rows"] if row["baseline"]}
    assert means[table["best_baseline"]] == min(means.values())


def test_a_validation_part_selects_by_the_word_error_rate(spec, tmp_path):
    fields = {"data.validation": 0.5, "training.keep": "target", "training.evaluate_every": 2}
    run(with_fields(spec, fields), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "wer" in line.get("valid", {}).get("target", {})] == [2, 4, 6, 8, 10]


def test_the_example_needs_no_data():
    pytest.importorskip("espeakng_loader")
    spec = load_spec(EXAMPLES / "transcribe.yaml")
    assert len(spec.data.voices) >= 12
    assert plan_of(spec).layers[-1] == "head"
