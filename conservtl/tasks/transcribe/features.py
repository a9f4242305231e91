"""Conversion of recordings of any length to inputs: resample, log-mel, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conservtl.bounds import Fraction
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.mel import mel_power
from conservtl.tasks.audio.reading import read_audio
from conservtl.tasks.audio.resampling import resample
from conservtl.tasks.transcribe.beam_search import Decoding, Greedy
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.tokens import Characters, Tokenizer

__all__ = ["Features", "TranscribePreprocessing"]

_TINY = 1e-10  # power of silence: -100 dB
_FLAT = 1e-5  # standard deviation of silence, which becomes zeros


class Features(FrozenModel):
    """Conversion of a recording to an input of the network, as long as the recording."""

    kind: Literal["logmel", "waveform"] = "logmel"
    """`logmel`: (frames, n_mels). `waveform`: (samples,), for networks on samples."""
    sample_rate: Annotated[int, Field(ge=2000, le=96_000)] = 16_000
    """Sample rate in Hz. Recordings with another rate are resampled."""
    n_mels: Annotated[int, Field(ge=1, le=512)] = 40
    """Number of mel bands."""
    window: Fraction = 0.025
    """Length of the analysis window in seconds."""
    hop: Fraction = 0.010
    """Time between frames in seconds."""
    range_db: Annotated[float, Field(gt=0, le=200)] = 40.0
    """Level in dB below the recording's loudest value at which values are clipped."""
    normalise: Literal["none", "mean", "mean_variance", "bands"] = "mean_variance"
    """Normalisation of each recording: subtract the mean of all values, or also scale to unit variance; `bands`: mean
    and variance of each mel band."""

    def __call__(self, wave: Tensor, rate: int) -> Tensor:
        """Return the input for a recording, (frames, n_mels) or (samples,).

        Args:
            wave: (samples,).
            rate: its sample rate in Hz.
        """
        wave = resample((wave - wave.mean()).unsqueeze(0), rate, self.sample_rate)
        if self.kind == "waveform":
            return self._normalised(wave[0].unsqueeze(1)).squeeze(1)
        window, hop = (max(1, round(seconds * self.sample_rate)) for seconds in (self.window, self.hop))
        power = mel_power(
            wave,
            rate=self.sample_rate,
            bands=self.n_mels,
            n_fft=2 ** (window - 1).bit_length(),
            window=window,
            hop=hop,
            f_min=20.0,
        )
        values = power[0].T.clamp_min(_TINY).log10()
        return self._normalised(values.maximum(values.max() - self.range_db / 10)).contiguous()

    def _normalised(self, values: Tensor) -> Tensor:
        if self.normalise == "none":
            return values
        over = (0,) if self.normalise == "bands" else (0, 1)
        centred = values - values.mean(over, keepdim=True)
        if self.normalise == "mean":
            return centred
        deviation = centred.square().mean(over, keepdim=True).sqrt()
        return torch.where(deviation > _FLAT, centred / deviation.clamp_min(_FLAT), torch.zeros_like(centred))


class TranscribePreprocessing(FrozenModel):
    """Conversion of files to inputs, and of texts to tokens. Saved with the adapted model."""

    features: Features = Features()
    """How a recording becomes an input."""
    text: Normalisation = Normalisation()
    """How a text is written."""
    tokens: Tokenizer = Characters()
    """How a text becomes tokens."""
    decoding: Decoding = Greedy()
    """How outputs become a text."""
    of_outputs: ClassVar[frozenset[str]] = frozenset({"decoding"})
    """Fields that change no input."""

    def read(self, files: Sequence[Path]) -> dict[str, Any]:
        """Return padded inputs (N, frames, ...) and lengths (N,) for these recordings.

        Raises:
            DataError: a file is missing or unreadable.
            MissingExtraError: soundfile is not installed.
        """
        inputs = [self.features(*read_audio(Path(file))) for file in files]
        return {"inputs": pad_sequence(inputs, batch_first=True), "lengths": torch.tensor([len(one) for one in inputs])}
