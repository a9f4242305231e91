"""The example on Common Voice with a small Whisper in the place of the published one: planned, run, predicted with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.run.setting import prepare
from conservtl.experiments.run.source_training import obtain_source
from conservtl.experiments.spec.spec import load_spec
from conservtl.tasks.transcribe import CorpusData, load

transformers = pytest.importorskip("transformers")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("jiwer")

EXAMPLE = Path(__file__).parents[3] / "examples" / "speech" / "whisper.yaml"
LANGUAGES = pytest.importorskip("transformers.models.whisper.tokenization_whisper").LANGUAGES
MARKS = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>"]
MARKS += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
SIZES = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 12}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as save_pretrained writes it: a small Whisper with random weights, its tokenizer and its features."""
    folder = tmp_path_factory.mktemp("whisper")
    letters = {letter: number for number, letter in enumerate(["\u0120", *"abcdefghijklmnopqrstuvwxyz'"])}
    tokenizer = transformers.WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    ids = {"decoder_start_token_id": tokenizer.convert_tokens_to_ids(MARKS[1])}
    ids |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    config = transformers.WhisperConfig(vocab_size=len(tokenizer) + 3, **SIZES, **ids)
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two accents of noise in Common Voice's layout, at 48 kHz as it is; one line has no accent."""
    root = tmp_path_factory.mktemp("cv")
    (root / "clips").mkdir()
    lines = {"train": [], "test": []}
    for number in range(10):
        generator = torch.Generator().manual_seed(number)
        soundfile.write(root / "clips" / f"{number}.wav", torch.randn(9600, generator=generator) / 9, 48_000)
        accent = "" if number == 9 else ("Scottish English", "Welsh English")[number % 2]
        text = ("A cab!", "Bad bee.", "Deed?")[number % 3]
        lines["train" if number < 6 else "test"].append(f"c{number}\t{number}.wav\t{text}\t{accent}")
    for part, rows in lines.items():
        (root / f"{part}.tsv").write_text("\n".join(["client_id\tpath\tsentence\taccents", *rows]))
    return root


def overrides(root, weights, *more):
    small = f"model.args={json.dumps(SIZES)}"
    data = [f"data.root={root}", "data.shots=2", f"data.tokens.folder={weights}", f"source.weights={weights}"]
    return [small, *data, "training.batch_size=2", "training.epochs=2", "training.evaluate_every=2", *more]


def test_the_example_is_planned_from_the_weights_and_the_files_beside_them(root, weights):
    spec = load_spec(EXAMPLE, overrides(root, weights)[1:])
    setting = prepare(spec)
    assert setting.spec.model.args == SIZES  # those beside the weights
    assert setting.shared
    assert len(setting.domains.labels) == 27 + 1 + len(MARKS) + 3
    assert setting.domains.labels[-1].startswith("<unused")
    assert setting.domains.preprocessing.features.kind == "whisper"
    assert setting.domains.skipped == {"test.tsv, line 5": "has no accents"}
    assert "9 of 9 utterances are resampled from 48,000 Hz to 16,000 Hz" in " ".join(setting.domains.notes)
    plan = plan_of(spec)
    assert {row.origin for row in plan.rows} == {"source"}
    frozen = {row.layer for row in plan.rows if row.frozen}
    assert frozen == {f"network.model.encoder.{name}" for name in ("conv1", "conv2", "embed_positions")}


def test_the_example_takes_two_steps_and_its_model_predicts(root, weights, tmp_path):
    short = "data.features={kind: whisper, seconds: 2}"  # the first 100 of 1500 positions
    report = run(load_spec(EXAMPLE, overrides(root, weights, short)), tmp_path)
    assert set(report["after"]["target"]) == {"loss", "wer", "cer"}
    assert report["agreement"]["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["agreement"]["after"]["kl"] > 0
    assert "Word errors by kind" in (tmp_path / "report.html").read_text()
    adapted = ctl.load_adapted(tmp_path)
    assert adapted.model.tokens.start[1] == adapted.labels.index("<|en|>")
    (found,) = adapted.predict(root / "clips" / "0.wav")
    assert 0 <= found.probability <= 1
    assert "<|" not in found.label
    searching = ctl.load_adapted(tmp_path, decoding={"kind": "beam", "beam": 2})
    assert 0 <= searching.predict(root / "clips" / "0.wav")[0].probability <= 1


def test_features_that_the_weights_were_not_trained_with_are_refused(root, weights):
    more = "data.features={kind: whisper, n_mels: 128}"
    with pytest.raises(ctl.SpecError, match=r"data.features.n_mels must be 80, as source.weights .* were trained; rec"):
        prepare(load_spec(EXAMPLE, overrides(root, weights, more)))


def test_tokens_that_do_not_fit_the_head_are_refused(root, weights):
    """Characters in the place of the tokenizer: the weights' head has a row for each of its tokens."""
    more = 'data.tokens={kind: characters, alphabet: " abcdefghijklmnopqrstuvwxyz\'"}'
    given = [one for one in overrides(root, weights, more) if "tokens.folder" not in one]
    with pytest.raises(ctl.SourceError, match=r"must have an output for each label .*; its head .*embed_tok"):
        obtain_source(prepare(load_spec(EXAMPLE, given)))


def test_a_column_that_is_not_there_is_refused(root, weights):
    with pytest.raises(ctl.DataError, match=r"data.group must be a column .* received 'accent', .* client_id, path"):
        prepare(load_spec(EXAMPLE, overrides(root, weights, "data.group=accent")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 8000}, r"kind must be 'waveform'"),
        ({"feature_extractor_type": "WhisperFeatureExtractor"}, r"preprocessor_config.json .* must be settings"),
        ({"feature_extractor_type": "Speech2TextFeatureExtractor", "sampling_rate": 8000, "num_mel_bins": 80}, "fbank"),
    ],
)
def test_other_processors_are_compared_too(root, weights, tmp_path, settings, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    more = ["data.features={kind: whisper}", f"source.weights={tmp_path}"]
    with pytest.raises(ctl.SpecError, match=message):
        prepare(load_spec(EXAMPLE, overrides(root, weights, *more)))


@pytest.mark.parametrize(("speeds", "skipped"), [(None, [4]), ([0.8, 1.0], [2, 4])])
def test_utterances_beyond_the_encoders_positions_are_left_out(tmp_path, speeds, skipped):
    """1.1 s, and 0.9 s that speed perturbation makes 1.125 s, for an encoder of one second."""
    lines = []
    for number, (name, seconds) in enumerate({"a0": 0.5, "a1": 0.9, "a2": 0.6, "b0": 1.1, "b1": 0.4}.items()):
        generator = torch.Generator().manual_seed(number)
        soundfile.write(tmp_path / f"{name}.wav", torch.randn(int(seconds * 8000), generator=generator) / 9, 8000)
        lines.append(json.dumps({"audio_filepath": f"{name}.wav", "text": "a b", "speaker": name[0]}))
    (tmp_path / "all.json").write_text("\n".join(lines))
    augment = {} if speeds is None else {"augment": {"waves": {"speeds": speeds}}}
    fields = {"root": tmp_path, "target": "a", "shots": 1, "on_bad": "skip", "held_out": 0.0}
    data = CorpusData(features={"kind": "whisper", "seconds": 1}, **fields, **augment)
    found = load(data, seed=0)
    assert sorted(found.skipped) == [f"all.json, line {number}" for number in skipped]
    assert all("is longer than data.features.seconds, 1 s" in reason for reason in found.skipped.values())
