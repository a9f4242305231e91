"""Recordings in files as samples, and the stretch of them that holds the sound."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import DataError
from conservtl.extras import require
from conservtl.tasks.bad_files import shown_name

__all__ = ["cut_short", "digest", "duration_of", "header_of", "loudest_stretch", "read_audio", "silence"]

_MOST_VALUES = 2**28  # samples times channels: 1 GB as float32, 90 minutes of one channel at 48 kHz
_MOST_RATE = 768_000  # Hz; beyond every recorder, and a second of it fits in memory
_MOST_LEVEL = 2.0**31  # of floating-point samples, which may be scaled as integers; squares of it are finite
_BLOCK = 2**22  # values that are read at a time
_UNKNOWN_LENGTH = 2**62  # frames; libsndfile's number for a stream whose header gives none
_CUT_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_NEARLY_ALL = 0.01  # seconds that a list may round from a recording's duration
_STREAMED = (range(0x7FFFF000, 0x80000000), range(0xFFFFF000, 2**32))  # sizes that a program writes into a pipe
_STEP = 2**-15  # one step of 16-bit samples
_CANCELLED = 0.1  # of the channels' level: a sum of fewer than 100 channels of different sounds is above
_FRAME = 0.010  # seconds
_CLICK = 4  # frames that a click can be in
_NEARLY = 0.99  # of the largest energy


def read_audio(file: Path, start: float = 0.0, seconds: float | None = None) -> tuple[Tensor, int]:
    """Return a recording, mixed to mono: (samples,) float32 in [-1, 1], and its sample rate in Hz.

    The file is read block by block: a header that lies about the length costs no memory.

    Args:
        file: the recording.
        start: of the stretch that is read, in seconds.
        seconds: its duration; None: to the end, as for all but a hundredth of a second of the recording.

    Raises:
        DataError: the file cannot be read as audio, is cut short or too long, has no samples or samples that are not
            finite or too large, is silent, or its channels cancel when they are mixed.
    """
    soundfile = require("soundfile", "speech")
    fault, channels, rate = None, torch.empty(0, 1), 0
    try:
        with soundfile.SoundFile(str(file)) as opened:
            rate = int(opened.samplerate)
            if not 1 <= rate <= _MOST_RATE:
                fault = f"must have a sample rate of 1 to {_MOST_RATE:,} Hz; it has {rate:,}"
            else:
                end = None if seconds is None else round((start + seconds) * rate)
                channels, fault = _samples(opened, round(start * rate), end)
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # of soundfile; TypeError for a .raw file
        fault = f"cannot be read as audio: {_shown_error(error, file)}"
    wave = channels.mean(dim=1)
    if fault := fault or _fault(channels, wave):
        raise DataError(f"{shown_name(file)} {fault}. Replace or remove it.")
    return wave, rate


def _shown_error(error: Exception, file: Path) -> str:
    return str(error).replace(repr(str(file)), shown_name(file)).rstrip(".")


def _samples(opened: Any, first: int, last: int | None) -> tuple[Tensor, str | None]:
    """Return the samples of an open file, (frames, channels), or why they cannot be used."""
    if last is not None and first == 0 and last >= opened.frames - _NEARLY_ALL * opened.samplerate:
        last = None
    blocks, promised, count = [], min(opened.frames, last or opened.frames) - first, 0
    if (fault := cut_short(opened)) is not None:
        return torch.empty(0, 1), fault
    if first:
        opened.seek(first)
    size = max(1, _BLOCK // opened.channels)
    while len(block := opened.read(size if last is None else min(size, last - first - count), "float32", True)):
        blocks.append(torch.from_numpy(block))
        count += len(block)
        if count * opened.channels > _MOST_VALUES:
            return torch.empty(0, 1), f"must have at most {_MOST_VALUES:,} samples in all channels; it has more"
    if count < promised < _UNKNOWN_LENGTH and opened.format != "MPEG":  # whose length is an estimate
        return torch.empty(0, 1), f"is cut short: its header promises {promised:,} samples, and it has {count:,}"
    return torch.cat(blocks) if blocks else torch.empty(0, opened.channels), None


def cut_short(opened: Any) -> str | None:
    """Return that an open file has fewer bytes of samples than its header promises; None if it has them."""
    if cut := _CUT_SHORT.search(opened.extra_info):
        size, held = map(int, cut.groups())
        if held < size and not any(size in sizes for sizes in _STREAMED):
            return f"is cut short: its header promises {size:,} bytes of samples, and it has {held:,}"
    return None


def _fault(channels: Tensor, wave: Tensor) -> str | None:
    if wave.numel() == 0:
        return "has no samples"
    if not bool(channels.isfinite().all()):
        return "has samples that are not finite"
    if channels.abs().max() > _MOST_LEVEL:
        return f"has samples beyond {_MOST_LEVEL:,.0f}, the largest of any format"
    return silence(channels, wave)


def silence(channels: Tensor, wave: Tensor) -> str | None:
    """Return why nothing is heard in samples, (frames, channels) and mixed (frames,); None if something is."""
    centred, mixed = channels - channels.mean(dim=0), wave - wave.mean()
    if centred.abs().max() <= _STEP:
        return "is silent: no sample differs from the mean by more than one step of 16 bits"
    if mixed.square().mean().sqrt() < _CANCELLED * centred.square().mean().sqrt():
        return f"is silent when its {channels.shape[1]} channels are mixed, because they cancel: one is inverted"
    return None


def duration_of(file: Path) -> float:
    """Return the duration of a recording in seconds, from its header.

    Raises:
        DataError: the file cannot be read as audio.
    """
    return header_of(file)[0]


def header_of(file: Path) -> tuple[float, int]:
    """Return the duration of a recording in seconds and its sample rate in Hz, from its header.

    Raises:
        DataError: the file cannot be read as audio.
    """
    soundfile = require("soundfile", "speech")
    try:
        info = soundfile.info(str(file))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError("cannot be read as audio") from error
    return float(info.frames / info.samplerate), int(info.samplerate)


def digest(wave: Tensor, rate: int) -> str:
    """Return a digest of a recording's samples, the same for a copy in another lossless format."""
    return hashlib.sha256(str(rate).encode() + wave.contiguous().numpy().tobytes()).hexdigest()


def loudest_stretch(wave: Tensor, rate: int, length: int) -> Tensor:
    """Return the ``length`` samples with the most energy, where no frame counts more than the fifth loudest.

    The recording, (samples,), is longer, and has no offset. The sound is in the middle of the stretch, with zeros
    beyond the ends of the recording, as ``fit_length`` puts a shorter one.
    """
    frame = max(1, min(round(_FRAME * rate), length))
    wave = torch.nn.functional.pad(wave, (length, length))  # so that a sound at an end can be in the middle
    energy = wave[: len(wave) // frame * frame].view(-1, frame).square().sum(dim=1).double()
    energy = energy.minimum(energy.topk(min(_CLICK + 1, len(energy))).values[-1])
    total = torch.nn.functional.pad(energy.cumsum(0), (1, 0))
    frames = min(-(-length // frame), len(energy))
    sums = total[frames:] - total[:-frames]
    # Every stretch around the loudest that holds nearly as much: the middle one has the sound in its middle.
    loudest, less = int(sums.argmax()), (sums < _NEARLY * sums.max()).nonzero().flatten()
    first = int(less[less < loudest].max()) + 1 if (less < loudest).any() else 0
    last = int(less[less > loudest].min()) - 1 if (less > loudest).any() else len(sums) - 1
    start = (first + last) // 2 * frame
    start = max(0, min(start, len(wave) - length))
    return wave[start : start + length]
