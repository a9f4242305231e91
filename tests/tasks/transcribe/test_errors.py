"""Errors pooled over words, by kind and speaker, and their interval."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("jiwer")

from conservtl.tasks.transcribe.details import Transcript, error_tables, interval, worst_utterances
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.word_errors import Errors, changed_words, character_errors, word_errors


def test_errors_by_hand():
    """`a b c` heard as `a x c d`: one substitution and one insertion; `e f` as `e`: one deletion."""
    errors = word_errors(["a b c", "e f"], ["a x c d", "e"])
    assert errors == Errors(substitutions=1, deletions=1, insertions=1, count=5)
    assert errors.rate == pytest.approx(3 / 5)
    assert character_errors(["abc"], ["abd"]) == Errors(1, 0, 0, 3)


def test_the_errors_of_each_utterance():
    records = [[("1.wav", "a b c", "a x c d")], [("2.wav", "e f", "e"), ("3.wav", "g", "g")]]
    assert Transcribe().errors([], [], records) == [2, 1, 0]


def test_an_empty_reference_counts_its_insertions():
    assert word_errors(["", "a"], ["b c", "a"]) == Errors(0, 0, 2, 1)
    assert word_errors([""], [""]).count == 0


def test_changed_words_by_hand():
    found = changed_words(["a b c", "e f", ""], ["a x c d", "e", "g"])
    assert found == {("b", "x"): 1, ("", "d"): 1, ("f", ""): 1, ("", "g"): 1}


def test_the_interval_needs_two_speakers_and_is_the_rate_where_all_agree():
    assert interval([Errors(1, 0, 0, 4)]) == (None, None)
    assert interval([Errors(1, 0, 0, 4), Errors(2, 0, 0, 8)]) == pytest.approx((0.25, 0.25))
    low, high = interval([Errors(0, 0, 0, 10), Errors(10, 0, 0, 10)])
    assert (low, high) == (0, 1)


def test_tables_pool_each_speaker():
    said = [
        Transcript("1", "ann", "a b", "a x", "a b"),
        Transcript("2", "ann", "c", "c", "c"),
        Transcript("3", "bob", "a", "", "a"),
    ]
    kinds, people, words = error_tables({"target": said})
    assert kinds["rows"][0][:6] == ["target, before", "4", "1", "1", "0", "50.0"]
    assert kinds["rows"][1][:6] == ["target, after", "4", "0", "0", "0", "0.0"]
    assert people["rows"] == [
        ["target: ann", "3", "33.3", "0.0", "25.0", "0.0"],  # 1 of 3 words and of 4 characters
        ["target: bob", "1", "100.0", "0.0", "100.0", "0.0"],
    ]
    # 2 of 5 characters; by the draws of two speakers from ann's alone to bob's alone.
    assert kinds["rows"][0][6:] == ["33.3 to 100.0", "40.0", "25.0 to 100.0"]
    assert kinds["rows"][1][6:] == ["0.0 to 0.0", "0.0", "0.0 to 0.0"]
    assert words["rows"] == [["target", "a", "–", "1", "0"], ["target", "b", "x", "1", "0"]]


def test_an_utterance_of_30_s_has_a_player():
    soundfile = pytest.importorskip("soundfile")
    wave = torch.sin(0.05 * torch.arange(30 * 48_000))
    data = SimpleNamespace(names=("1",), inputs=SimpleNamespace(wave=lambda _: (wave, 48_000)))
    (found,) = worst_utterances([Transcript("1", "ann", "a", "a", "b")], data)
    kind, _, content = found["audio"].partition(";base64,")
    assert kind == "data:audio/mpeg"
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert len(heard) / rate == pytest.approx(30, abs=0.1)
