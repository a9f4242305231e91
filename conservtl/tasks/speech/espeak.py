"""Synthetic speakers from espeak-ng, through espeakng-loader: offline, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import subprocess
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
"""Men and women with seven accents."""

TARGET_VOICES = ("de+f4", "pl", "fr+m2", "sv+m1", "it+f2", "en-us+whisperf")
"""Voices that a model trained on the source voices finds hard: readers who pronounce English words by the
rules of their own language, and a whisper."""

_LONGEST = 120  # seconds a process may take for one voice


@dataclass(frozen=True)
class Utterance:
    """One word as one voice says it once.

    Args:
        voice: espeak-ng's name, with a variant after `+`.
        word: the text.
        take: its number.
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
    """``takes`` recordings of each word, at rates and pitches drawn from the name of each.

    Rates lie between 130 and 220 words a minute, pitches between 30 and 70.
    """
    said = []
    for word in words:
        for take in range(takes):
            draw = hashlib.sha256(f"{voice}/{word}/{take}".encode()).digest()
            said.append(Utterance(voice, word, take, 130 + draw[0] % 91, 30 + draw[1] % 41, 30 + draw[2] % 41))
    return said


def speak(utterances: Sequence[Utterance]) -> list[tuple[Tensor, int]]:
    """Synthesise: each (samples,) float32 in [-1, 1], with its sample rate in Hz.

    Each voice speaks in a fresh process of its own, since espeak-ng's output depends on what the process
    said before: a voice then sounds the same whichever others there are. A voice that does not exist is
    refused here; espeak-ng itself accepts an unknown variant in silence.

    Raises:
        DataError: a voice or variant does not exist, or says nothing.
        MissingExtraError: espeakng-loader is not installed.
    """
    loader = require("espeakng_loader", "demo")
    library, data = str(loader.get_library_path()), Path(loader.get_data_path())
    spoken: dict[Utterance, tuple[Tensor, int]] = {}
    for voice in dict.fromkeys(u.voice for u in utterances):
        _check_variant(voice, data)
        own = [u for u in utterances if u.voice == voice]
        spoken |= dict(zip(own, _in_fresh_process(own, library, data), strict=True))
    return [_as_recorded(u, *spoken[u]) for u in utterances]


def _check_variant(voice: str, data: Path) -> None:
    _, plus, variant = voice.partition("+")
    known = sorted(file.name for file in (data / "voices" / "!v").iterdir())
    if plus and variant not in known:
        raise DataError(
            f"data: espeak-ng has no voice variant {variant!r} (in {voice!r}). Name one of: {', '.join(known)}."
        )


def _in_fresh_process(utterances: Sequence[Utterance], library: str, data: Path) -> list[tuple[Tensor, int]]:
    request = {
        "library": library,
        "data": str(data),
        "utterances": [[u.voice, u.word, u.rate, u.pitch, u.pitch_range] for u in utterances],
    }
    worker = Path(__file__).with_name("_espeak_worker.py")
    done = subprocess.run(  # noqa: S603 - our own file, run by this interpreter
        [sys.executable, "-I", str(worker)],
        input=json.dumps(request).encode(),
        capture_output=True,
        timeout=_LONGEST,
        check=False,
    )
    head, _, body = done.stdout.partition(b"\n")
    failed = done.returncode != 0 or not head
    answer: dict[str, Any] = {"error": done.stderr.decode()[-500:]} if failed else json.loads(head)
    if "error" in answer:
        raise DataError(
            f"data: espeak-ng cannot say {utterances[0].word!r} with {utterances[0].voice!r}: "
            f"{answer['error'] or f'its process ended with code {done.returncode}'}. Name another voice."
        )
    lengths: list[int] = answer["lengths"]
    samples = torch.frombuffer(bytearray(body), dtype=torch.int16).float() / 32768
    return [(part, int(answer["rate"])) for part in torch.split(samples, lengths)]


def _as_recorded(utterance: Utterance, wave: Tensor, rate: int) -> tuple[Tensor, int]:
    """As a microphone would have it: cut loosely, at some level, with some noise; the same every time."""
    name = f"{utterance.voice}/{utterance.word}/{utterance.take}/room"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
    generator = torch.Generator().manual_seed(seed)
    before, after, gain, noise = torch.rand(4, generator=generator).tolist()
    wave = torch.nn.functional.pad(wave, (int(0.15 * before * rate), int(0.15 * after * rate)))
    loudness = wave.square().mean().sqrt()
    signal_to_noise = 15 + 20 * noise  # dB
    wave = wave + loudness * 10 ** (-signal_to_noise / 20) * torch.randn(len(wave), generator=generator)
    return wave * 10 ** (-gain), rate
