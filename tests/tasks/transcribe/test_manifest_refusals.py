"""Lists of utterances that cannot be read are refused with the file, the line and the fix."""

from __future__ import annotations

import pytest

import conservtl as ctl
from conservtl.tasks.transcribe import CorpusData, load
from conservtl.tasks.transcribe.manifests import lines_of


def kaldi(root, **files):
    for name, text in {"wav.scp": "r r.wav\n", "text": "u hello\n", "utt2spk": "u ann\n"}.items():
        (root / name).write_text(text)
    for name, text in files.items():
        (root / name).write_text(text)


def refused(layout, root, message, files=()):
    with pytest.raises(ctl.DataError, match=message):
        lines_of(layout, root, files)


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    refused("manifest", tmp_path / "file", r"data\.root must be a folder; .*file is not one")


def test_a_folder_without_utterances(tmp_path):
    refused("librispeech", tmp_path, "holds no utterance in the layout 'librispeech'")


def test_a_folder_without_manifests_and_a_name_that_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("no list")
    refused("manifest", tmp_path, r"data\.files must name a manifest; .* has no \.json, \.jsonl, \.csv or \.tsv")
    refused("manifest", tmp_path, r"data\.files: there is no file .*a\.json\. Correct the name", ["a.json"])
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("manifest", tmp_path, r"with a line for each utterance; received empty\.jsonl without any", ["empty.jsonl"])


def test_empty_lines_of_a_manifest_are_passed_over(tmp_path):
    line = '{"audio_filepath": "a.wav", "text": "hello", "speaker": "ann"}'
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n   \n{line}\n")
    assert [one.where for one in lines_of("manifest", tmp_path, [])] == ["a.jsonl, line 2", "a.jsonl, line 4"]


def test_segments_cut_a_recording(tmp_path):
    """From 0.5 s to 1.25 s: an offset of 0.5 s and a duration of 0.75 s."""
    kaldi(tmp_path, segments="u r 0.5 1.25\n")
    (line,) = lines_of("kaldi", tmp_path, [])
    assert (line.path, line.offset, line.duration, line.text, line.speaker) == ("r.wav", 0.5, 0.75, "hello", "ann")


def test_a_segment_may_end_where_its_recording_does(tmp_path):
    kaldi(tmp_path, segments="u r 0.5 -1\n")
    (line,) = lines_of("kaldi", tmp_path, [])
    assert (line.offset, line.duration) == (0.5, None)


@pytest.mark.parametrize("times", ["r 0.5", "r half one", "r 0.5 1.0 1.5"])
def test_a_segment_without_a_start_and_an_end(tmp_path, times):
    kaldi(tmp_path, segments=f"u {times}\n")
    refused("kaldi", tmp_path, rf"'u' must have a recording, a start and an end; received '{times}'")


def test_a_list_of_kaldi_that_is_missing(tmp_path):
    kaldi(tmp_path)
    (tmp_path / "utt2spk").unlink()
    refused("kaldi", tmp_path, r"needs wav\.scp, text and utt2spk; .*utt2spk is missing")


def test_a_subset_that_is_the_root_itself(tmp_path):
    chapter = tmp_path / "test-clean" / "5" / "1"
    chapter.mkdir(parents=True)
    (chapter / "5-1.trans.txt").write_text("5-1-0000 HELLO\n\n")
    (line,) = lines_of("librispeech", tmp_path / "test-clean", [])
    (same,) = lines_of("librispeech", tmp_path, [])
    assert line.part == same.part == "test"


def test_a_language_without_lists(tmp_path):
    refused(
        "common_voice", tmp_path, r"must hold train\.tsv, dev\.tsv and test\.tsv of Common Voice, or validated\.tsv"
    )


def test_text_of_another_encoding_names_the_byte(tmp_path):
    kaldi(tmp_path)
    (tmp_path / "text").write_bytes("u gr\u00fcn\n".encode("latin-1"))
    refused("kaldi", tmp_path, r"text must be text in UTF-8; .* at byte 4\. Convert it")


@pytest.mark.parametrize("name", ["wav.scp", "text", "utt2spk", "segments"])
def test_a_list_of_kaldi_that_names_one_twice(tmp_path, name):
    row = {"wav.scp": "r a.wav", "text": "u hello", "utt2spk": "u ann", "segments": "u r 0 1"}[name]
    kaldi(tmp_path, **{name: f"{row}\n{row}\n"})
    refused("kaldi", tmp_path, rf"{name} must name '{row[0]}' once; it does twice. Remove one of the lines")


def test_a_command_of_kaldi_is_never_run(tmp_path):
    kaldi(tmp_path, **{"wav.scp": "u touch evil |\n"})
    refused("kaldi", tmp_path, r"wav\.scp: 'u' must be a file; a command is never run")


def test_marks_and_ends_of_lines_are_no_part_of_a_text(tmp_path):
    """A byte order mark, capitals, CRLF, spaces behind commas, a quoted text over two lines, an empty row; U+2028."""
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfPath, TEXT, Speaker\r\na.wav, "hello,\r\nyou", ann\r\nb.wav,yes,bo\r\n,,\r\n'
    )
    (tmp_path / "b.jsonl").write_text(
        '{"audio_filepath": "c.wav", "text": "one\u2028two", "speaker": "ann"}\n', "utf-8"
    )
    found = lines_of("manifest", tmp_path, [])
    assert [(one.path, one.text, one.speaker) for one in found] == [
        ("a.wav", "hello,\nyou", "ann"),
        ("b.wav", "yes", "bo"),
        ("c.wav", "one\u2028two", "ann"),
    ]
    assert [one.where for one in found] == ["a.csv, line 3", "a.csv, line 4", "b.jsonl, line 1"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", "path,text,speaker\na.wav,hello, you,ann\n", r"has 4 cells for 3 columns; put a text with commas"),
        ("a.tsv", "path\ttext\nb.wav\thello\tyou\n", r"has 3 cells for 2 columns; write a space for a tab"),
        ("a.json", '{"audio_filepath": "a.wav", "text": ["a"], "speaker": "b"}', r"has a text that is none, \['a'\]"),
        ("a.json", '{"audio_filepath": "a.wav", "text": true, "speaker": "b"}', r"has a text that is none, True"),
        ("a.json", '{"audio_filepath": "a.wav", "text": "a", "speaker": "b", "duration": NaN}', r"duration that is no"),
        (
            "a.json",
            '{"audio_filepath": "a.wav", "text": "a", "speaker": "b", "duration": true}',
            r"duration that is no",
        ),
        ("a.json", '{"audio_filepath": "a.wav", "text": "a", "speaker": "b", "offset": -1}', r"offset that is no"),
        ("a.json", '{"audio_filepath": "/etc/passwd", "text": "a", "speaker": "b"}', r"leads out of"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    (tmp_path / "a.wav").write_text("")
    with pytest.raises(ctl.DataError, match=rf"(?s)line \d.*{fault}"):
        load(CorpusData(root=tmp_path, target="b"), seed=0)


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "a.csv").write_text("path,text,speaker,Text\na.wav,hello,ann,bye")
    refused("manifest", tmp_path, r"a\.csv must have each column once; it has text twice. Rename one")


def test_bad_lines_of_lists_with_one_name_are_counted_each(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "metadata.csv").write_text("file_name,text,speaker\nnone.wav,hello,ann\n")
    with pytest.raises(ctl.DataError, match=r"test/metadata\.csv, line 2 .*; 1 other is bad too"):
        load(CorpusData(kind="audiofolder", root=tmp_path, target="ann"), seed=0)


def test_a_quote_that_never_ends(tmp_path):
    (tmp_path / "a.csv").write_text('path,text\na.wav,"' + "hello\n" * 30_000)
    refused("manifest", tmp_path, r"a\.csv, line \d+ must be a row of a table: field larger .* Correct its quotes")
