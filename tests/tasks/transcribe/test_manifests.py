"""Lists of utterances in the usual layouts, official splits, and lines that cannot be used."""

from __future__ import annotations

import json

import pytest
import torch

import conservtl as ctl
from conservtl.tasks.transcribe import CorpusData, Features, load, speakers
from conservtl.tasks.transcribe.manifests import lines_of

soundfile = pytest.importorskip("soundfile")

RATE = 2000
QUICK = {"features": Features(sample_rate=RATE, n_mels=8), "shots": 1}


def record(file, seconds=0.5):
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(str(file).encode())
    soundfile.write(
        file, torch.rand(round(seconds * RATE), generator=torch.Generator().manual_seed(seed)).numpy() - 0.5, RATE
    )
    return file


def write_nemo(root):
    lines = []
    for speaker in ("ann", "bob", "cid"):
        for number in range(3):
            record(root / f"{speaker}{number}.wav")
            lines.append({"audio_filepath": f"{speaker}{number}.wav", "text": f"Say {number}!", "speaker": speaker})
    (root / "all.json").write_text("\n".join(map(json.dumps, lines)))


def write_table(root, *, tabs):
    rows = [("path", "text", "speaker", "duration", "offset")]
    for speaker in ("ann", "bob", "cid"):
        record(root / f"{speaker}.wav", 1.5)
        rows += [(f"{speaker}.wav", f"Say {number}!", speaker, "0.5", str(0.5 * number)) for number in range(3)]
    text = "\n".join(("\t" if tabs else ",").join(row) for row in rows)
    (root / ("all.tsv" if tabs else "all.csv")).write_text(text)


def write_kaldi(root):
    names = [f"{speaker}{number}" for speaker in ("ann", "bob", "cid") for number in range(3)]
    for name in names:
        record(root / "sound" / f"{name}.wav")
    (root / "wav.scp").write_text("".join(f"{name} sound/{name}.wav\n" for name in names))
    (root / "text").write_text("".join(f"{name} say {name[-1]}\n" for name in names))
    (root / "utt2spk").write_text("".join(f"{name} {name[:-1]}\n" for name in names))


def write_librispeech(root):
    for subset, speaker in (("train-clean-100", "ann"), ("train-clean-100", "bob"), ("test-clean", "cid")):
        folder = root / "LibriSpeech" / subset / speaker / "1"
        for number in range(3):
            record(folder / f"{speaker}-1-{number:04}.flac")
        lines = [f"{speaker}-1-{number:04} SAY {number}" for number in range(3)]
        (folder / f"{speaker}-1.trans.txt").write_text("\n".join(lines))


def write_common_voice(root):
    for part, people in {"train": ("ann", "bob"), "test": ("cid",)}.items():
        rows = ["client_id\tpath\tsentence\tage"]
        for speaker in people:
            for number in range(3):
                record(root / "clips" / f"{speaker}{number}.wav")
                rows.append(f'{speaker}\t{speaker}{number}.wav\tSay "{number}"!\t')
        (root / f"{part}.tsv").write_text("\n".join(rows))


def write_audiofolder(root):
    for part, speaker in (("train", "ann"), ("train", "bob"), ("test", "cid")):
        rows = []
        for number in range(3):
            record(root / part / speaker / f"{number}.wav")
            rows.append(f"{speaker}/{number}.wav,Say {number}!,{speaker}")
        file = root / part / "metadata.csv"
        before = file.read_text() if file.exists() else "file_name,transcription,speaker_id\n"
        file.write_text(before + "\n".join(rows) + "\n")


LAYOUTS = {
    "manifest": write_nemo,
    "csv": lambda root: write_table(root, tabs=False),
    "tsv": lambda root: write_table(root, tabs=True),
    "kaldi": write_kaldi,
    "librispeech": write_librispeech,
    "common_voice": write_common_voice,
    "audiofolder": write_audiofolder,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_utterances(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    kind = "manifest" if layout in ("csv", "tsv") else layout
    data = CorpusData(kind=kind, root=tmp_path, target="cid", held_out=0.4, **QUICK)
    assert speakers(data) == ("ann", "bob", "cid")
    domains = load(data, seed=0)
    assert domains.labels == ("<blank>", "|", *sorted(set("sayzeroonetwo")))
    assert len(domains.shots) == 1
    assert len(domains.target_test) == 2
    parts = [domains.source_train, domains.source_test]
    assert sum(len(part) for part in parts if part is not None) == 6
    assert {name for part in parts if part is not None for name in part.groups} == {"ann", "bob"}
    batch = domains.target_test.batch([0, 1])
    assert batch["inputs"].shape == (2, 51, 8)
    spelled = "".join(domains.labels[token] for token in batch["labels"][0] if token >= 0)
    assert spelled in ("say|zero", "say|one", "say|two")


def test_official_parts_are_kept(tmp_path):
    """Shots come from the target's training part, and the source's test part is the official one."""
    rows = []
    for part in ("train", "test"):
        for speaker in ("ann", "bob"):
            for number in range(3):
                record(tmp_path / f"{part}-{speaker}{number}.wav")
                rows.append(f"{part}-{speaker}{number}.wav,one,{speaker},{part}")
    (tmp_path / "all.csv").write_text("path,text,speaker,split\n" + "\n".join(rows))
    domains = load(CorpusData(root=tmp_path, target="bob", **{**QUICK, "shots": 3}), seed=0)
    assert sorted(domains.shots.names) == [f"train-bob{number}.wav" for number in range(3)]
    assert sorted(domains.target_test.names) == [f"test-bob{number}.wav" for number in range(3)]
    assert sorted(domains.source_test.names) == [f"test-ann{number}.wav" for number in range(3)]
    with pytest.raises(ctl.DataError, match=r"'bob' has 3 utterances in its training part; received 4"):
        load(CorpusData(root=tmp_path, target="bob", **{**QUICK, "shots": 4}), seed=0)


@pytest.mark.parametrize(
    ("layout", "train", "test"),
    [
        ("manifest", "train/list.json", "eval/list.json"),
        ("manifest", "train_clean-100.json", "2024-TEST.json"),
        ("kaldi", "train-clean/", "test_clean2/"),
        ("audiofolder", "data/train/metadata.jsonl", "data/test-00/metadata.jsonl"),
    ],
)
def test_parts_by_names_of_lists_and_folders(layout, train, test, tmp_path):
    for part in (train, test):
        file = tmp_path / part
        (file if part.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if layout == "kaldi":
            for name, text in {"wav.scp": "u a.wav", "text": "u hello", "utt2spk": "u ann"}.items():
                (file / name).write_text(text)
        else:
            line = {"audio_filepath": "a.wav", "file_name": "a.wav", "text": "hello", "speaker": "ann"}
            file.write_text(json.dumps(line))
    files = [train, test] if layout == "manifest" else []
    assert [(one.part, one.base) for one in sorted(lines_of(layout, tmp_path, files), key=lambda one: one.part)] == [
        ("test", (tmp_path / test) if layout == "kaldi" else (tmp_path / test).parent),
        ("train", (tmp_path / train) if layout == "kaldi" else (tmp_path / train).parent),
    ]


def test_parts_by_the_recordings_folders_of_one_list_of_an_audiofolder(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,transcription\ntest/1.wav,a\ntrain/b/1.wav,b\n1.wav,c\n")
    assert [one.part for one in lines_of("audiofolder", tmp_path, [])] == ["test", "train", None]


def test_a_group_may_be_0_and_a_text_in_a_file_of_its_own(tmp_path):
    for accent in (0, 1):
        for number in (0, 2):
            name = f"{accent}{number}"
            record(tmp_path / f"{name}.wav")
            (tmp_path / f"{name}.txt").write_text(f"Say {number}\n")
            line = {"audio_filepath": f"{name}.wav", "text_filepath": f"{name}.txt", "Accent": accent}
            with (tmp_path / "all.json").open("a") as file:
                file.write(json.dumps(line) + "\r\n")
    domains = load(CorpusData(root=tmp_path, target="0", group="accent", held_out=0.0, **QUICK), seed=0)
    assert sorted((*domains.shots.names, *domains.target_test.names)) == ["00.wav", "02.wav"]
    assert len(domains.source_train) == 2
    assert domains.labels == ("<blank>", "|", *sorted(set("sayzerotwo")))


def test_speakers_can_be_held_out(tmp_path):
    write_nemo(tmp_path)
    data = CorpusData(root=tmp_path, target="cid", held_out_speakers=("bob",), held_out=0.0, **QUICK)
    domains = load(data, seed=0)
    assert set(domains.source_test.groups) == {"bob"}
    assert set(domains.source_train.groups) == {"ann"}


BAD = [
    ({"text": ""}, "has no text"),
    ({"text": "..."}, "has no text"),
    ({"text": float("nan")}, "has no text"),
    ({"text": None, "text_filepath": "none.txt"}, r"has no text: there is no file none\.txt"),
    ({"text": None, "text_filepath": "../outside.wav"}, "leads out of"),
    ({"audio_filepath": "none.wav"}, "no file none.wav"),
    ({"audio_filepath": ""}, "has no recording"),
    ({"audio_filepath": ["new.wav"]}, "has a recording that is none"),
    ({"audio_filepath": "say " * 99}, "has no recording: there is no file say"),
    ({"audio_filepath": "new\0.wav"}, "has no recording: there is no file 'new"),
    ({"audio_filepath": "../outside.wav"}, "leads out of"),
    ({"speaker": None}, "has no speaker"),
    ({"speaker": float("nan")}, "has no speaker"),
    ({"speaker": ["ann"]}, "has a speaker that is none"),
    ({"duration": 0}, "longer than 0 s"),
    ({"duration": "long"}, "a duration that is no number of seconds"),
    ({"duration": -1}, "a duration that is no number"),
    ({"offset": float("nan")}, "an offset that is no number"),
    ({"duration": 1.5}, "must lie within its recording of 0.50 s"),
    ({"audio_filepath": "long.wav"}, "longer than data.longest"),
    ({"text": "\u00fcber"}, "outside the vocabulary"),
    ({"audio_filepath": "silent.wav"}, "is silent"),
    ({"audio_filepath": "half.wav", "offset": 1.0, "duration": 0.5}, r"half\.wav@1 is silent"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_a_line_that_cannot_be_used_is_refused_or_skipped_with_a_list(change, reason, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write_nemo(root)
    record(tmp_path / "outside.wav")
    record(root / "long.wav", 3)
    record(root / "new.wav")
    soundfile.write(root / "silent.wav", torch.zeros(RATE // 2).numpy(), RATE)
    soundfile.write(root / "half.wav", torch.cat([torch.ones(RATE), torch.zeros(RATE)]).numpy() / 2, RATE)
    line = {"audio_filepath": "new.wav", "text": "say", "speaker": "ann"} | change
    with (root / "all.json").open("a") as file:
        file.write("\n" + json.dumps(line))
    tokens = {"kind": "characters", "alphabet": " 'abcdefghijklmnopqrstuvwxyz"}
    data = {"root": root, "target": "cid", "longest": 2.0, "tokens": tokens, **QUICK}
    with pytest.raises(ctl.DataError, match=reason):
        load(CorpusData(**data), seed=0)
    domains = load(CorpusData(**data, on_bad="skip"), seed=0)
    assert len(domains.skipped) == 1
    assert len(domains.source_train) + len(domains.source_test or ()) == 6


@pytest.mark.parametrize("field", ["source_speakers", "held_out_speakers"])
def test_speakers_that_are_not_there_are_answered_with_the_others(field, tmp_path):
    write_nemo(tmp_path)
    for name, message in (
        ("dan", "received 'dan'. Choose from: 'ann', 'bob'."),
        ("cid", "must not contain data.target"),
    ):
        with pytest.raises(ctl.DataError, match=message):
            load(CorpusData(root=tmp_path, target="cid", **{field: (name,)}, **QUICK), seed=0)


def test_two_manifests_that_share_an_utterance_are_refused(tmp_path):
    write_nemo(tmp_path)
    first = (tmp_path / "all.json").read_text().splitlines()[0]
    (tmp_path / "more.jsonl").write_text(first)
    with pytest.raises(
        ctl.DataError, match=r"more\.jsonl, line 1: every utterance must be there once.*all\.json, line 1"
    ):
        load(CorpusData(root=tmp_path, target="cid", **QUICK), seed=0)


def test_a_copy_of_a_recording_in_another_manifest_is_refused(tmp_path):
    write_nemo(tmp_path)
    line = json.loads((tmp_path / "all.json").read_text().splitlines()[0])
    copy = line | {"audio_filepath": "copy.wav"}
    (tmp_path / "copy.wav").write_bytes((tmp_path / line["audio_filepath"]).read_bytes())
    (tmp_path / "more.jsonl").write_text(json.dumps(copy))
    with pytest.raises(ctl.DataError, match=r"there once.* is a copy of .*(all\.json|more\.jsonl), line 1"):
        load(CorpusData(root=tmp_path, target="cid", **QUICK), seed=0)


@pytest.mark.parametrize("change", [{"audio_filepath": "copy.flac"}, {"audio_filepath": "long.wav", "offset": 0.5}])
def test_a_recording_in_another_format_or_cut_out_of_a_longer_one_is_refused(change, tmp_path):
    write_nemo(tmp_path)
    line = json.loads((tmp_path / "all.json").read_text().splitlines()[0])
    wave, _ = soundfile.read(tmp_path / line["audio_filepath"])
    soundfile.write(tmp_path / "copy.flac", wave, RATE)
    soundfile.write(tmp_path / "long.wav", torch.cat([torch.rand(RATE // 2) / 2, torch.from_numpy(wave)]).numpy(), RATE)
    (tmp_path / "more.jsonl").write_text(json.dumps(line | change))
    with pytest.raises(ctl.DataError, match=r"more\.jsonl, line 1: .* has the samples of ann0\.wav, all\.json, line 1"):
        load(CorpusData(root=tmp_path, target="cid", **QUICK), seed=0)


@pytest.mark.parametrize(("offset", "shared"), [(0.1, True), (0.6, False)])
def test_stretches_of_one_recording_must_not_share_most_of_it(tmp_path, offset, shared):
    """Of 1 s each: 0.9 s in common are refused, 0.4 s are not, because cuts overlap a little."""
    write_nemo(tmp_path)
    soundfile.write(tmp_path / "long.wav", torch.randn(4 * 16_000).numpy() / 9, 16_000)
    lines = [
        {"audio_filepath": "long.wav", "text": "say", "speaker": "cid", "offset": start, "duration": 1.0}
        for start in (1.0, 1.0 + offset)
    ]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = CorpusData(root=tmp_path, target="cid", **QUICK)
    if shared:
        with pytest.raises(ctl.DataError, match=r"shares most of its recording with long\.wav@1, .*line 1"):
            load(data, seed=0)
    else:
        load(data, seed=0)


def test_a_command_in_kaldis_list_is_never_run(tmp_path):
    write_kaldi(tmp_path)
    (tmp_path / "wav.scp").write_text("ann0 touch pwned |\n")
    with pytest.raises(ctl.DataError, match="a command is never run"):
        load(CorpusData(kind="kaldi", root=tmp_path, target="cid", **QUICK), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 must be a JSON object"),
        ("[1]", "line 1 must be a JSON object"),
        (b"\xff\xfe{", "must be text in UTF-8"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_line(content, message, tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ctl.DataError, match=message):
        load(CorpusData(root=tmp_path, target="cid", **QUICK), seed=0)


def test_a_table_needs_its_columns(tmp_path):
    (tmp_path / "all.csv").write_text("where,text\na.wav,b")
    with pytest.raises(ctl.DataError, match=r"must have a column for the path .*it has where, text"):
        load(CorpusData(root=tmp_path, target="cid", **QUICK), seed=0)


def test_an_unknown_target_is_answered_with_the_speakers(tmp_path):
    write_nemo(tmp_path)
    with pytest.raises(ctl.DataError, match=r"received 'dee'\. Choose one of: 'ann', 'bob', 'cid'"):
        load(CorpusData(root=tmp_path, target="dee", **QUICK), seed=0)
