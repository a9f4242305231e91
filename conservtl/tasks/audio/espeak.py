"""Synthetic speakers from espeak-ng, through espeakng-loader: offline and deterministic."""

from __future__ import annotations

import hashlib
import json
import subprocess  # for a worker in this package # nosec B404
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require

__all__ = ["DIGITS", "SOURCE_VOICES", "TARGET_VOICES", "Utterance", "speak", "takes_of"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SOURCE_VOICES = (
    "en-us",
    "en-us+f2",
    "en-us+m3",
    "en-us+m7",
    "en",
    "en+f3",
    "en+m1",
    "en-gb-x-rp+f1",
    "en-gb-x-rp+m2",
    "en-gb-scotland",
    "en-gb-scotland+f4",
    "en-gb-x-gbclan+m4",
    "en-gb-x-gbcwmd+f5",
    "en-029",
    "en-029+m5",
    "en-us-nyc+m6",
)
"""Male and female voices with seven accents."""

TARGET_VOICES = ("de+f4", "pl", "fr+m2", "sv+m1", "it+f2", "en-us+whisperf")
"""Voices on which a model trained on the source voices makes many errors: foreign accents and a whisper."""

_TIMEOUT = 120  # seconds for the process of one voice


@dataclass(frozen=True)
class Utterance:
    """One recording of a word by a voice.

    Args:
        voice: name in espeak-ng, with a variant after `+`.
        word: the text.
        take: number of the recording.
        rate: words a minute.
        pitch: 0 to 99.
        pitch_range: 0 (monotone) to 99.
    """

    voice: str
    word: str
    take: int
    rate: int
    pitch: int
    pitch_range: int


def takes_of(voice: str, words: Sequence[str], takes: int) -> list[Utterance]:
    """Return ``takes`` utterances of each word, with rates and pitches drawn from a hash of their names.

    Rates are between 130 and 220 words a minute, pitches between 30 and 70.
    """
    utterances = []
    for word in words:
        for take in range(takes):
            draw = hashlib.sha256(f"{voice}/{word}/{take}".encode()).digest()
            utterances.append(Utterance(voice, word, take, 130 + draw[0] % 91, 30 + draw[1] % 41, 30 + draw[2] % 41))
    return utterances


def speak(utterances: Sequence[Utterance]) -> list[tuple[Tensor, int]]:
    """Synthesise each utterance: (samples,) float32 in [-1, 1], and the sample rate in Hz.

    Each voice runs in a new process, because espeak-ng's output depends on earlier utterances of the process: a voice
    then sounds the same, whichever other voices there are. Unknown variants are checked here, because espeak-ng
    accepts them silently.

    Raises:
        DataError: a voice or variant does not exist, or returns no samples.
        MissingExtraError: espeakng-loader is not installed.
    """
    loader = require("espeakng_loader", "demo")
    library, data = str(loader.get_library_path()), Path(loader.get_data_path())
    spoken: dict[Utterance, tuple[Tensor, int]] = {}
    for voice in dict.fromkeys(u.voice for u in utterances):
        _check_variant(voice, data)
        selected = [u for u in utterances if u.voice == voice]
        spoken |= dict(zip(selected, _in_new_process(selected, library, data), strict=True))
    return [_as_recorded(u, *spoken[u]) for u in utterances]


def _check_variant(voice: str, data: Path) -> None:
    _, plus, variant = voice.partition("+")
    known = sorted(file.name for file in (data / "voices" / "!v").iterdir())
    if plus and variant not in known:
        raise DataError(
            f"data: espeak-ng has no voice variant {variant!r} (in {voice!r}). Choose one of: {', '.join(known)}."
        )


def _in_new_process(utterances: Sequence[Utterance], library: str, data: Path) -> list[tuple[Tensor, int]]:
    request = {
        "library": library,
        "data": str(data),
        "utterances": [[u.voice, u.word, u.rate, u.pitch, u.pitch_range] for u in utterances],
    }
    worker = Path(__file__).with_name("_espeak_worker.py")
    done = subprocess.run(  # noqa: S603 - a file of this package, run by this interpreter # nosec B603
        [sys.executable, "-I", str(worker)],
        input=json.dumps(request).encode(),
        capture_output=True,
        timeout=_TIMEOUT,
        check=False,
    )
    header, _, body = done.stdout.partition(b"\n")
    failed = done.returncode != 0 or not header
    answer: dict[str, Any] = {"error": done.stderr.decode()[-500:]} if failed else json.loads(header)
    if "error" in answer:
        raise DataError(
            f"data: espeak-ng cannot synthesise {utterances[0].word!r} with {utterances[0].voice!r}: "
            f"{answer['error'] or f'its process ended with code {done.returncode}'}. Choose another voice."
        )
    lengths: list[int] = answer["lengths"]
    samples = torch.frombuffer(bytearray(body), dtype=torch.int16).float() / 32768
    return [(part, int(answer["rate"])) for part in torch.split(samples, lengths)]


def _as_recorded(utterance: Utterance, wave: Tensor, rate: int) -> tuple[Tensor, int]:
    """Add silence at both ends, a gain and noise, as in a recording; drawn from a hash of the utterance's name."""
    name = f"{utterance.voice}/{utterance.word}/{utterance.take}/room"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
    generator = torch.Generator().manual_seed(seed)
    before, after, gain, noise = torch.rand(4, generator=generator).tolist()
    wave = torch.nn.functional.pad(wave, (int(0.15 * before * rate), int(0.15 * after * rate)))
    loudness = wave.square().mean().sqrt()
    signal_to_noise = 15 + 20 * noise  # dB
    wave = wave + loudness * 10 ** (-signal_to_noise / 20) * torch.randn(len(wave), generator=generator)
    return wave * 10 ** (-gain), rate
