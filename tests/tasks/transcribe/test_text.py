"""Texts by explicit rules, and tokens of them."""

from __future__ import annotations

import io

import pytest

import conservtl as ctl
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.tokens import Characters, SentencePiece


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Hello,  World!", "hello world"),
        ("don\u2019t \u2018quote\u2019 'me' rock 'n' roll", "don't quote me rock n roll"),
        ("Cafe\u0301", "caf\u00e9"),
        ("42 and 1,205; 007", "forty two and one thousand two hundred five zero zero seven"),
        ("2,000,019", "two million nineteen"),
        ("3.5, 1,200.05.", "three point five one thousand two hundred point zero five"),
        ("1.2.3 on 12.05.", "one two three on twelve point zero five"),
        ("The 1st, 22nd, 30TH and 112th", "the first twenty second thirtieth and one hundred twelfth"),
        ("well-known", "well known"),
        ("\ufeffco\u00adoperate\u200b\u00a0now\0", "cooperate now"),
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", "\u0645\u06cc\u200c\u0631\u0648\u0645"),  # a joiner is a letter
        ("\u2014 \u2026", ""),
    ],
)
def test_the_default_rules(written, expected):
    assert Normalisation()(written) == expected


def test_each_rule_is_a_choice():
    rules = Normalisation(case="upper", punctuation="keep", numbers="keep", apostrophes="remove")
    assert rules("It's 42.") == "ITS 42."
    assert Normalisation(numbers="digits")("in 1984") == "in 1 9 8 4"
    assert Normalisation(case="keep")("A b") == "A b"


def test_normalised_texts_stay_as_they_are():
    for text in ("I\u2019m 21!", "a - b", "'tis", "\u00c5ngstro\u0308m 10,000"):
        once = Normalisation()(text)
        assert Normalisation()(once) == once


def test_characters_and_back():
    """By hand: the blank is 0, the space has the name |."""
    tokens = Characters()
    vocabulary = tokens.vocabulary(["a b", "ba"])
    assert vocabulary == ("<blank>", "|", "a", "b")
    assert tokens.encode("ab a", vocabulary) == [2, 3, 1, 2]
    assert tokens.decode([2, 3, 1, 2], vocabulary) == "ab a"
    with pytest.raises(ctl.DataError, match="outside the vocabulary, 'c', in 'abc'"):
        tokens.encode("abc", vocabulary)


def test_an_alphabet_has_each_character_once():
    with pytest.raises(ctl.SpecError, match=r"\['a'\] twice"):
        Characters(alphabet="aba ").vocabulary([])
    with pytest.raises(ctl.SpecError, match=r"must not hold '\|'"):
        Characters(alphabet="a|").vocabulary([])


def test_sentencepiece_is_saved_with_its_bytes(tmp_path):
    library = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    texts = ["turn on the lights", "turn off the radio", "open the door", "close the window"] * 5
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    file = tmp_path / "pieces.model"
    file.write_bytes(content.getvalue())
    saved = SentencePiece(model=str(file)).embedded()
    file.unlink()
    vocabulary = saved.vocabulary(())
    assert vocabulary[0] == "<blank>"
    tokens = saved.encode("open the radio", vocabulary)
    assert min(tokens) > 0
    assert saved.decode(tokens, vocabulary) == "open the radio"
    with pytest.raises(ctl.DataError, match="outside the vocabulary"):
        saved.encode("\u00fc", vocabulary)
    with pytest.raises(ctl.DataError, match="cannot be read"):
        SentencePiece(model=str(file)).embedded()
