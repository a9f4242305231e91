"""Tokenizers of transformers, read from the folder of a processor and saved with the model."""

from __future__ import annotations

import json

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.models import ModelSpec, build
from conservtl.tasks.transcribe.pretrained_tokens import DecoderTokens, Pretrained
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.text import Normalisation

transformers = pytest.importorskip("transformers")

LANGUAGES = pytest.importorskip("transformers.models.whisper.tokenization_whisper").LANGUAGES
MARKS = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>"]
MARKS += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", "<|0.00|>"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper tokenizer of a few characters, with all of its marks."""
    folder = tmp_path_factory.mktemp("whisper")
    letters = {letter: number for number, letter in enumerate(["a", "b", "c", "\u0120", "A", ".", "\u0120a", "ab"])}
    (folder / "vocab.json").write_text(json.dumps(letters))
    tokenizer = transformers.WhisperTokenizer(vocab=letters, merges=[("\u0120", "a"), ("a", "b")])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[:-1]})
    tokenizer.add_tokens([transformers.AddedToken(MARKS[-1], special=False)])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "whisper", "decoder_start_token_id": tokenizer.convert_tokens_to_ids(MARKS[1])})
    )
    return folder


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    """A tokenizer for CTC of three letters."""
    folder = tmp_path_factory.mktemp("wav2vec2")
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder


def test_whispers_texts_begin_with_a_space_and_come_back(whisper):
    tokens = Pretrained(folder=str(whisper))
    labels = tokens.vocabulary(())
    found = tokens.encode("ab a.", labels)
    assert [labels[one] for one in found] == ["\u0120a", "b", "\u0120a", "."]
    assert tokens.decode(found, labels) == "ab a."
    assert tokens.end == "<|endoftext|>"


def test_whispers_decoder_begins_with_the_language_and_writes_no_marks(whisper):
    tokens = Pretrained(folder=str(whisper), language="de")
    labels, by = tokens.vocabulary(()), tokens.decoder()
    names = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert [labels[one] for one in by.start] == names
    assert labels[by.end] == "<|endoftext|>"
    assert {labels[one] for one in by.silent} == set(MARKS[1:])
    english = Pretrained(folder=str(whisper)).decoder()
    assert [labels[one] for one in english.start] == [names[0], names[3]]


def test_a_tokenizer_is_saved_with_the_model(whisper, tmp_path):
    saved = Pretrained(folder=str(whisper)).embedded()
    again = TranscribePreprocessing.model_validate(
        json.loads(json.dumps(TranscribePreprocessing(tokens=saved).model_dump(mode="json")))
    ).tokens
    assert again == saved == Pretrained(folder=str(whisper)).embedded()
    assert again.folder.startswith("zip:")
    labels = again.vocabulary(())
    assert again.decode(again.encode("cab", labels), labels) == "cab"


def test_a_network_takes_the_tokenizers_numbers(whisper):
    tokens = Pretrained(folder=str(whisper), language="en")
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 9}
    preprocessing = TranscribePreprocessing(features=Features(kind="whisper", seconds=1), tokens=tokens)
    count = len(tokens.vocabulary(()))
    network = build(ModelSpec(name="transformers/whisper", args=sizes), preprocessing, count)
    assert network.tokens == tokens.decoder()
    assert network.network.config.decoder_start_token_id == tokens.decoder().start[0]
    assert network.network.config.eos_token_id == tokens.decoder().end


def test_hypotheses_follow_the_rules_of_the_texts(whisper):
    tokens = Pretrained(folder=str(whisper))
    labels = tokens.vocabulary(())
    task = Transcribe(labels, TranscribePreprocessing(tokens=tokens, text=Normalisation()))
    assert task.texts([[labels.index("A"), labels.index("b"), labels.index(".")]]) == ["ab"]


def test_ctc_takes_the_tokenizers_padding_as_its_blank(wav2vec2):
    tokens = Pretrained(folder=str(wav2vec2))
    labels = tokens.vocabulary(())
    assert labels == ("<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C")
    found = tokens.encode("ABBA C", labels)
    assert [labels[one] for one in found] == ["A", "B", "B", "A", "|", "C"]
    assert tokens.decode(found, labels) == "ABBA C"
    with pytest.raises(ctl.DataError, match=r"has parts outside the tokenizer's vocabulary, in 'DAD'"):
        tokens.encode("DAD", labels)


def test_a_blank_of_ctc_that_stands_elsewhere_is_put_first(tmp_path):
    """As many recipes write a vocabulary, without an end of text."""
    names = ["A", "B", "|", "<unk>", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None).save_pretrained(
        tmp_path
    )
    tokens = Pretrained(folder=str(tmp_path))
    labels = tokens.vocabulary(())
    assert labels == ("<pad>", "A", "B", "|", "<unk>")
    assert tokens.order == tuple(names)
    assert tokens.encode("AB B", labels) == [1, 2, 3, 2]
    task = Transcribe(labels, TranscribePreprocessing(tokens=tokens, text=Normalisation(case="upper")))
    logits = torch.eye(5)[[1, 0, 2, 2, 3, 2]].unsqueeze(0)
    assert task.heard((logits, torch.tensor([6]))) == ["AB B"]
    assert build(ModelSpec(), TranscribePreprocessing(tokens=tokens), 5).head.out_features == 5


def test_a_tokenizer_without_a_blank_of_ctc_is_refused(whisper):
    with pytest.raises(ctl.SpecError, match=r"conformer needs a tokenizer of CTC, .* this one has none. Give"):
        build(ModelSpec(), TranscribePreprocessing(tokens=Pretrained(folder=str(whisper))), 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"data.tokens.folder .* must hold a tokenizer, such as tokenizer.json .*; it holds none"),
        ({"tokenizer.json": "{"}, r"the files of the tokenizer must be those of one that transformers knows"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ctl.DataError, match=message):
        Pretrained(folder=str(tmp_path)).vocabulary(())


def test_a_language_of_a_tokenizer_without_any_is_refused(wav2vec2):
    with pytest.raises(ctl.SpecError, match=r"data.tokens.language is for Whisper's tokenizers; received 'en'"):
        Pretrained(folder=str(wav2vec2), language="en").vocabulary(())


def test_a_tokenizer_of_characters_begins_and_ends_with_output_0():
    assert TranscribePreprocessing().tokens.decoder() == DecoderTokens((0,), 0, (), None)
