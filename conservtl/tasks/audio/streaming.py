"""Recordings that are read as overlapping windows, in memory for one window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.tasks.audio.reading import cut_short, silence
from conservtl.tasks.bad_files import shown_name

__all__ = ["Window", "windows_of"]


@dataclass(frozen=True)
class Window:
    """A part of a recording.

    Args:
        start: in seconds.
        end: in seconds.
        wave: its samples, mixed to mono, (samples,).
        rate: sample rate in Hz.
    """

    start: float
    end: float
    wave: Tensor
    rate: int


def windows_of(file: Path, seconds: float, overlap: float) -> Iterator[Window]:
    """Yield windows of so many seconds, each beginning ``overlap`` before the one before ends; the last may be shorter.

    Raises:
        DataError: the file cannot be read or is cut short, has samples that are not finite, or is silent to its end.
    """
    soundfile = require("soundfile", "speech")
    kept, start, fault = torch.empty(0), 0, None
    try:
        with soundfile.SoundFile(str(file)) as opened:
            rate = int(opened.samplerate)
            size, shared = int(seconds * rate), int(overlap * rate)
            if (cut := cut_short(opened)) is not None:
                raise DataError(f"{shown_name(file)} {cut}. Replace or remove it.")
            while len(block := opened.read(size - len(kept), dtype="float32", always_2d=True)):
                channels = torch.from_numpy(block)
                if start == 0 or fault is not None:
                    fault = silence(channels, channels.mean(1))
                wave = torch.cat([kept, channels.mean(1)])
                if not bool(wave.isfinite().all()):
                    raise DataError(
                        f"{shown_name(file)} must have finite samples; some between {start / rate:.1f} and "
                        f"{(start + len(wave)) / rate:.1f} s are not. Replace or remove it."
                    )
                yield Window(start / rate, (start + len(wave)) / rate, wave, rate)
                kept = wave[size - shared :]
                start += size - shared
                if len(wave) < size:
                    break
            if fault is not None:
                raise DataError(f"{shown_name(file)} {fault}. Replace or remove it.")
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # of soundfile
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown_name(file)} cannot be read as audio: {error}. Replace or remove it.") from error
