"""Recordings from strangers are refused, or skipped with a count and a list; memory and time stay bounded."""

from __future__ import annotations

import json
import os
import resource
import struct
import time

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.runner import plan_of, run
from conservtl.experiments.spec.spec import parse_spec
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.speech.corpora import FolderData, load
from conservtl.tasks.speech.features import SpeechPreprocessing

soundfile = pytest.importorskip("soundfile")


def hum(seconds=0.25, rate=8000, channels=1, pitch=300.0):
    time_ = torch.arange(round(seconds * rate)) / rate
    return (0.3 * torch.sin(2 * torch.pi * pitch * time_)).unsqueeze(1).repeat(1, channels).numpy()


def write(path, samples=None, rate=8000, **how):
    soundfile.write(path, hum(rate=rate) if samples is None else samples, rate, **how)
    return path


def with_size(path, size):
    """Make the header of a WAV file promise this many bytes of samples."""
    content = bytearray(write(path).read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


def cut(path, **how):
    content = write(path, hum(2.0), **how).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def with_rate(path, rate):
    content = bytearray(write(path).read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    return path


BAD = {
    "nothing at all": (lambda path: path.write_bytes(b""), r"cannot be read as audio: "),
    "text": (lambda path: path.write_text("These are words.\n" * 50), r"cannot be read as audio: .*Format not recogni"),
    "no samples": (lambda path: write(path, hum(0.0)), r"has no samples"),
    "one sample": (lambda path: write(path, hum()[:1]), r"is silent"),
    "not a number": (lambda path: write(path, hum() * float("nan"), subtype="FLOAT"), r"samples that are not finite"),
    "infinite": (lambda path: write(path, hum() / 0.0, subtype="FLOAT"), r"samples that are not finite"),
    "beyond": (lambda path: write(path, hum() * 1e20, subtype="FLOAT"), r"has samples beyond 2,147,483,648"),
    "cut short": (cut, r"is cut short: its header promises 32,000 bytes of samples, and it has 15,978"),
    "ten hours": (lambda path: with_size(path, 576_000_000), r"is cut short: its header promises 576,000,000 bytes"),
    "rate": (lambda path: with_rate(path, 2**31 - 1), r"a sample rate of 1 to 768,000 Hz; it has 2,147,483,647"),
    "opposed": (lambda path: write(path, hum(channels=2) * [1, -1]), r"its 2 channels are mixed, because they cancel"),
    "noise of bytes": (lambda path: path.write_bytes(b"RIFF\x24\0\0\0WAVEfmt " + bytes(range(256))), r"cannot be read"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BAD)
def test_recordings_that_cannot_be_used_are_named(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / "a.wav")
    with pytest.raises(ctl.DataError, match=rf"^.*a\.wav .*{message}.*\. Replace or remove it\.$"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("kind", ["FLAC", "AIFF", "AU"])
def test_a_file_that_is_cut_short_is_named_in_every_format(tmp_path, kind):
    path = cut(tmp_path / f"a.{kind.lower()}", format=kind)
    with pytest.raises(ctl.DataError, match=r"is cut short|cannot be read as audio"):
        read_audio(path)


def test_a_flac_header_that_promises_months_costs_no_memory(tmp_path):
    path = write(tmp_path / "a.flac")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the number of samples: 36 bits
    content[22:26] = b"\xff\xff\xff\xf0"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ctl.DataError, match=r"cut short|cannot be read as audio"):
        read_audio(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFDB])
def test_a_stream_without_a_length_is_read_to_its_end(tmp_path, size):
    """Programs that write into a pipe leave such sizes: no file is that long, and all of it is there."""
    wave, rate = read_audio(with_size(tmp_path / "a.wav", size))
    assert (len(wave), rate) == (2000, 8000)


def test_more_samples_than_fit_in_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("conservtl.tasks.audio.reading._MOST_VALUES", 10_000)
    monkeypatch.setattr("conservtl.tasks.audio.reading._BLOCK", 1_000)
    assert len(read_audio(write(tmp_path / "short.wav", hum(1.25)))[0]) == 10_000
    with pytest.raises(ctl.DataError, match=r"must have at most 10,000 samples in all channels; it has more"):
        read_audio(write(tmp_path / "long.wav", hum(1.3)))
    with pytest.raises(ctl.DataError, match=r"at most 10,000 samples"):
        read_audio(write(tmp_path / "wide.wav", hum(0.7, channels=2)))


USABLE = {
    "24 bits": {"subtype": "PCM_24"},
    "8 channels": {"samples": hum(channels=8)},
    "384 kHz": {"rate": 384_000},
    "clipped": {"samples": (hum() * 100).clip(-1, 1)},
    "integers as floats": {"samples": hum() * 32768, "subtype": "FLOAT"},
}


@pytest.mark.parametrize("name", USABLE)
def test_unusual_recordings_are_read(tmp_path, name):
    inputs = SpeechPreprocessing().read([write(tmp_path / "a.wav", **USABLE[name])])
    assert inputs.shape == (1, 40, 51)
    assert bool(inputs.isfinite().all())
    assert float(inputs.std()) > 0.5


def test_blocks_of_recordings_give_the_same_inputs(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{rate}.wav", hum(1.5, rate), rate) for rate in (8000, 16000, 384_000)]
    together = SpeechPreprocessing().read(files)
    monkeypatch.setattr("conservtl.tasks.speech.features._BLOCK_VALUES", 1)
    torch.testing.assert_close(SpeechPreprocessing().read(files), together)


def speak(root):
    """Write three takes of two words by two speakers."""
    root.mkdir()
    for place, (word, speaker, take) in enumerate(
        (word, speaker, take) for word in "01" for speaker in ("anna", "ben") for take in range(3)
    ):
        write(root / f"{word}_{speaker}_{take}.wav", hum(pitch=200.0 + 31 * place))
    return root


@pytest.fixture
def voices(tmp_path):
    return speak(tmp_path / "voices")


def data(root, **fields):
    return FolderData(root=root, target="anna", shots=1, held_out_takes=(0,), **fields)


def test_bad_recordings_are_refused_unless_the_spec_skips_them(voices):
    (voices / "0_anna_1.wav").write_text("text")
    write(voices / "1_ben_2.wav", hum() * 0)
    with pytest.raises(ctl.DataError, match=r"0_anna_1\.wav cannot be read as audio.*; 1 other is bad too"):
        load(data(voices), seed=0)
    domains = load(data(voices, on_bad="skip"), seed=0)
    assert list(domains.skipped) == ["0_anna_1.wav", "1_ben_2.wav"]
    assert domains.skipped["1_ben_2.wav"].startswith("is silent")
    # 6 of anna without 1: 2 shots, 3 to test on. 6 of ben without 1: takes 0 are held out.
    assert [len(part) for part in (domains.shots, domains.target_test, domains.source_train, domains.source_test)] == [
        2, 3, 3, 2,
    ]  # fmt: skip
    assert not [name for name in (*domains.shots.names, *domains.target_test.names) if name.endswith("0_anna_1.wav")]


def test_which_files_are_skipped_does_not_depend_on_the_seed(voices):
    (voices / "0_anna_1.wav").write_text("text")
    for seed in range(4):
        with pytest.raises(ctl.DataError, match=r"0_anna_1\.wav cannot be read"):
            load(data(voices), seed=seed)
    found = [load(data(voices, on_bad="skip"), seed=seed) for seed in range(4)]
    assert {tuple(domains.skipped) for domains in found} == {("0_anna_1.wav",)}


def test_a_file_that_is_mended_is_read_again(voices):
    (voices / "0_anna_1.wav").write_text("text")
    assert load(data(voices, on_bad="skip"), seed=0).skipped
    write(voices / "0_anna_1.wav", hum(pitch=777.0))
    assert not load(data(voices, on_bad="skip"), seed=0).skipped


def test_too_few_shots_are_explained_by_what_was_skipped(voices):
    for take in (0, 1):
        (voices / f"1_anna_{take}.wav").write_text("text")
    message = r"'anna' has 1 recording of '1'.* With data\.on_bad: skip, 2 files are skipped: 1_anna_0\.wav cannot be"
    with pytest.raises(ctl.DataError, match=message):
        load(data(voices, on_bad="skip"), seed=0)


def test_links_stay_in_the_root_unless_asked(voices, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere / "0_anna_7.wav", hum(pitch=900.0))
    write(tmp_path / "alone.wav", hum(pitch=950.0))
    (voices / "more").symlink_to(elsewhere)
    (voices / "1_anna_8.wav").symlink_to(tmp_path / "alone.wav")
    with pytest.raises(ctl.DataError, match=r"1_anna_8\.wav is a link that leads out of .*follow_links: true.*; 1 oth"):
        load(data(voices), seed=0)
    skipping = load(data(voices, on_bad="skip"), seed=0)
    assert sorted(skipping.skipped) == ["1_anna_8.wav", "more"]
    following = load(data(voices, follow_links=True), seed=0)
    assert not following.skipped
    assert len(following.target_test) - len(skipping.target_test) == 2


def test_a_root_that_is_a_link_is_followed(voices, tmp_path):
    (tmp_path / "link").symlink_to(voices)
    assert len(load(data(tmp_path / "link"), seed=0).target_test) == 4


@pytest.mark.parametrize("follow", [True, False])
def test_links_in_circles_end(voices, follow):
    (voices / "again").symlink_to(voices)
    for name in "abcdefgh":  # folders that all link to each other: 8! ways through them
        (voices / name).mkdir()
    for name in "abcdefgh":
        for other in "abcdefgh":
            (voices / name / other).symlink_to(voices / other)
    (voices / "itself.wav").symlink_to(voices / "itself.wav")
    with pytest.raises(ctl.DataError, match=r"(is a link to|are bad too|is bad too)"):
        load(data(voices, follow_links=follow), seed=0)
    domains = load(data(voices, follow_links=follow, on_bad="skip"), seed=0)
    assert len(domains.skipped) == 1 + 64 + 1
    assert len(domains.target_test) == 4


def test_special_files_and_names_that_are_no_text(voices):
    os.mkfifo(voices / "0_anna_9.wav")  # reading it would wait for ever
    (voices / os.fsdecode(b"1_anna_\xff.wav")).touch()
    skipped = load(data(voices, on_bad="skip"), seed=0).skipped
    assert skipped == {
        "0_anna_9.wav": "is neither a file nor a folder",
        r"'1_anna_\udcff.wav'": "has a name that is not valid UTF-8",
    }
    json.dumps(skipped, ensure_ascii=False).encode()


def test_names_with_newlines_and_letters_of_any_script(voices):
    pattern = r"(?P<label>\d)_(?P<speaker>[^_/]+)_(?P<take>\d+)\.wav"
    speaker = "two\nlines\x1b[2J \u0561\u202e"
    for word in "01":
        for take in range(2):
            write(voices / f"{word}_{speaker}_{take}.wav", hum(pitch=500.0 + 50 * take + int(word)))
    chosen = FolderData(root=voices, pattern=pattern, target=speaker, shots=1, held_out_takes=(0,))
    assert len(load(chosen, seed=0).target_test) == 2
    (bad := voices / f"1_{speaker}_0.wav").write_text("text")
    with pytest.raises(ctl.DataError) as refused:
        load(chosen, seed=0)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert ascii(bad.name)[1:-1] in str(refused.value)


def test_many_files_are_listed_in_bounded_time(tmp_path):
    """A hundredth of 100,000 files takes a hundredth of a few seconds: nothing looks at pairs of files."""

    def seconds(count):
        root = tmp_path / str(count)
        root.mkdir()
        for number in range(count):
            (root / f"{number // 2 % 10}_{'anna' if number % 2 else 'ben'}_{number}.wav").touch()
        begun = time.process_time()
        with pytest.raises(ctl.DataError, match=r"cannot be read as audio"):
            load(data(root).model_copy(update={"target": "anna"}), seed=0)
        return time.process_time() - begun

    seconds(100)
    assert seconds(4000) < 4.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on recordings of which two are bad: its spec, the recordings, its folder."""
    folder = tmp_path_factory.mktemp("run")
    voices = speak(folder / "voices")
    (voices / "0_ben_1.wav").write_text("text")
    write(voices / "1_anna_2.wav", hum() * 0)
    chosen = {"kind": "folder", "root": str(voices), "target": "anna", "shots": 1, "held_out_takes": [0]}
    fields = {
        "task": "speech",
        "data": chosen | {"on_bad": "skip"},
        "source": {"training": {"epochs": 1}, "cache": str(folder / "cache")},
        "training": {"epochs": 1},
    }
    spec = parse_spec(fields)
    run(spec, folder / "out")
    return spec, voices, folder / "out"


def test_plan_and_report_tell_what_is_skipped(finished):
    spec, _, out = finished
    assert "data  2 files are skipped: 0_ben_1.wav cannot be read as audio" in str(plan_of(spec))
    skipped = json.loads((out / "report.json").read_text())["skipped"]
    assert skipped["count"] == 2
    assert [entry["file"] for entry in skipped["files"]] == ["0_ben_1.wav", "1_anna_2.wav"]
    page = (out / "report.html").read_text()
    assert "Files that were skipped: 2" in page
    assert "<td>1_anna_2.wav</td><td>is silent: no sample" in page


def test_predictions_skip_or_refuse_bad_files(finished):
    _, voices, out = finished
    adapted = ctl.load_adapted(out)
    files = [voices / "0_anna_0.wav", voices / "1_anna_2.wav", voices / "gone.wav", voices / "0_anna_1.wav"]
    with pytest.raises(ctl.DataError, match=r"gone\.wav' is not a file"):
        adapted.predict(files)
    skipped = {}
    answers = adapted.predict(files, on_bad="skip", skipped=skipped)
    assert [answer.file for answer in answers] == [files[0], files[3]]
    assert [*skipped] == [str(files[2]), str(files[1])]
    whole = adapted.predict([files[0], files[3]])
    assert [answer.label for answer in answers] == [answer.label for answer in whole]
    assert adapted.predict(files[1:3], on_bad="skip") == []
    with pytest.raises(ctl.SpecError, match=r"on_bad must be 'error' or 'skip'; received 'never'"):
        adapted.predict(files, on_bad="never")


def test_the_command_lists_what_it_skips(finished, capsys, monkeypatch):
    from conservtl.cli._main import main

    _, voices, out = finished
    files = [str(voices / name) for name in ("0_anna_0.wav", "1_anna_2.wav")]
    monkeypatch.setattr("sys.argv", ["conservtl", "predict", str(out), *files, "--on-bad", "skip"])
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert f"1 file is skipped: {files[1]} is silent" in said.err
