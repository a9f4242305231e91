"""Prediction of many recordings: batches of similar length, the order given, bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conservtl as ctl
from conservtl.experiments.run.adapted import Adapted, batches_by_length, read_ahead, speed_text
from conservtl.tasks.transcribe.conformer import ConformerArgs, ConformerCTC
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.task import Transcribe
from conservtl.tasks.transcribe.tokens import Characters

soundfile = pytest.importorskip("soundfile")

RATE = 2000
SECONDS = (0.9, 0.3, 2.0, 0.5, 1.4, 0.4, 0.7)


@pytest.fixture(scope="module")
def adapted():
    torch.manual_seed(0)
    features = Features(sample_rate=RATE, n_mels=8, hop=0.02)
    preprocessing = TranscribePreprocessing(features=features, tokens=Characters(alphabet=" abc"))
    labels = preprocessing.tokens.vocabulary(())
    args = ConformerArgs(width=16, blocks=1, heads=2, subsampling=2)
    model = ConformerCTC(8, len(labels), args).eval()
    return Adapted(model, labels, preprocessing, Transcribe(labels, preprocessing))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    for number, seconds in enumerate(SECONDS):
        wave = torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(number)) / 9
        soundfile.write(root / f"{number}.wav", wave.numpy(), RATE)
    return [root / f"{number}.wav" for number in range(len(SECONDS))]


def test_batches_hold_files_of_similar_length_and_few_long_ones():
    """At most two files and 40 s with padding: one of 30 s is alone."""
    assert batches_by_length([3.0, 30.0, 1.0, 19.0, 2.0, 21.0], most=2) == [[2, 4], [0, 3], [5], [1]]


def test_answers_come_in_the_order_given_whatever_the_batches(adapted, files):
    given = [*files, files[2]]
    alone = [adapted.predict(file)[0] for file in given]
    for size in (1, 2, 3, 32):
        found = adapted.predict(given, batch_size=size)
        assert [one.file for one in found] == given
        assert [one.label for one in found] == [one.label for one in alone]
        assert [one.probability for one in found] == pytest.approx([one.probability for one in alone], abs=1e-5)


def test_files_that_cannot_be_used_are_skipped_in_any_batch(adapted, files, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    given = [files[0], bad, *files[1:], bad]
    skipped = {}
    found = adapted.predict(given, batch_size=2, on_bad="skip", skipped=skipped)
    assert [one.file for one in found] == files
    assert list(skipped) == [str(bad)]
    with pytest.raises(ctl.DataError, match=r"bad\.wav cannot be read as audio"):
        adapted.predict(given, batch_size=2)


def test_the_next_content_is_read_while_one_is_used():
    class Executor:
        """Runs at once."""

        def submit(self, read):
            value = read()
            return type("Future", (), {"result": lambda _: value})()

    begun = []
    contents = read_ahead(Executor(), [lambda n=n: begun.append(n) or n for n in range(3)])
    assert (next(contents), begun) == (0, [0, 1])
    assert list(contents) == [1, 2]
    assert list(read_ahead(Executor(), [])) == []


def test_the_real_time_factor_is_work_over_duration(adapted, files):
    total = sum(SECONDS)
    assert speed_text(adapted.preprocessing, files, 0.5) == f"7 files, {total:.1f} s, in 0.5 s: real-time factor 0.0806"
    assert 0.5 / total == pytest.approx(0.0806, abs=5e-5)
    assert speed_text(object(), files, 0.5) == ""


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    """100 recordings of 1.2 MB: a few of them are in memory at a time."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = f"""
import torch, soundfile
from conservtl.experiments.run.adapted import Adapted
from conservtl.tasks.transcribe.features import Features, TranscribePreprocessing
from conservtl.tasks.transcribe.task import Transcribe
def rss():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
class Energy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, inputs, lengths):
        return inputs[:, ::16000, None].repeat(1, 1, 3) * self.scale, lengths // 16000
preprocessing = TranscribePreprocessing(features=Features(kind="waveform"))
labels = ("<blank>", "|", "a")
adapted = Adapted(Energy(), labels, preprocessing, Transcribe(labels, preprocessing))
files = []
for n in range(4):
    files.append(r"{tmp_path}/" + f"{{n}}.wav")
    soundfile.write(files[-1], torch.randn(300_000 + 100 * n).numpy() / 9, 16000)
list(adapted.predictions(files * 2, batch_size=4))
before, most, count = rss(), 0, 0
for _ in adapted.predictions(files * 25, batch_size=4):
    most, count = max(most, rss() - before), count + 1
print(count, most)
"""
    # With a threshold of its own the allocator returns each freed tensor at once: what is resident is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(Path(ctl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    count, most = done.stdout.split()
    assert int(count) == 100
    assert float(most) < 30  # all at once are 114 MiB
