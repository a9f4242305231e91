"""Conversion of recordings of any length to inputs: resample, log-mel, normalise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conservtl.bounds import Fraction
from conservtl.spec_model import FrozenModel
from conservtl.tasks.audio.mel import mel_power, normalise
from conservtl.tasks.audio.reading import duration_of, read_audio
from conservtl.tasks.audio.resampling import resample
from conservtl.tasks.audio.streaming import windows_of
from conservtl.tasks.transcribe.beam_search import Decoding, Greedy
from conservtl.tasks.transcribe.long_recordings import OVERLAP, WINDOW
from conservtl.tasks.transcribe.pretrained_features import kaldi_fbank, whisper_log_mel
from conservtl.tasks.transcribe.text import Normalisation
from conservtl.tasks.transcribe.tokens import Characters, Tokenizer

__all__ = ["Features", "TranscribePreprocessing"]

_TINY = 1e-10  # power of silence: -100 dB
_DEFAULTS: dict[Any, dict[str, Any]] = {
    "whisper": {"n_mels": 80, "normalise": "none"},
    "fbank": {"n_mels": 80, "normalise": "bands"},
}
_FIXED = {
    "whisper": ("sample_rate", "window", "hop", "range_db", "normalise"),
    "fbank": ("window", "hop", "range_db", "seconds"),
}


class Features(FrozenModel):
    """Conversion of a recording to an input of the network, as long as the recording."""

    kind: Literal["logmel", "waveform", "whisper", "fbank"] = "logmel"
    """`logmel`: (frames, n_mels). `waveform`: (samples,), for networks on samples. `whisper`: Whisper's log-mel with
    silence up to `seconds`. `fbank`: Kaldi's filter banks, for Speech2Text; each band normalised unless `normalise`
    says otherwise."""
    sample_rate: Annotated[int, Field(ge=2000, le=96_000)] = 16_000
    """Sample rate in Hz. Recordings with another rate are resampled."""
    n_mels: Annotated[int, Field(ge=1, le=512)] = 40
    """Number of mel bands; 80 by default for `whisper` and `fbank`."""
    window: Fraction = 0.025
    """Length of the analysis window in seconds."""
    hop: Fraction = 0.010
    """Time between frames in seconds."""
    range_db: Annotated[float, Field(gt=0, le=200)] = 40.0
    """Level in dB below the recording's loudest value at which values are clipped."""
    normalise: Literal["none", "mean", "mean_variance", "bands"] = "mean_variance"
    """Normalisation of each recording: subtract the mean of all values, or also scale to unit variance; `bands`: mean
    and variance of each mel band."""

    seconds: Annotated[float, Field(ge=1, le=30)] = 30.0
    """Duration that recordings are padded to with silence, for `whisper` alone. Below 30, the first positions of the
    encoder are used, which is as much quicker."""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, fields: Any) -> Any:
        given = fields.get("kind") if isinstance(fields, dict) else None
        return {**_DEFAULTS.get(given, {}), **fields} if isinstance(given, str) else fields

    @model_validator(mode="after")
    def _fits(self) -> Features:
        fixed = _FIXED.get(self.kind, ()) if self.kind in _DEFAULTS else ("seconds",)
        for name in fixed:
            usual = _DEFAULTS.get(self.kind, {}).get(name, type(self).model_fields[name].default)
            if (value := getattr(self, name)) != usual:
                raise ValueError(f"{name} must be {usual!r} for the kind {self.kind!r}; received {value!r}")
        return self

    @property
    def longest(self) -> float:
        """Longest recording in seconds that can be converted."""
        return self.seconds if self.kind == "whisper" else math.inf

    def __call__(self, wave: Tensor, rate: int) -> Tensor:
        """Return the input for a recording, (samples,) at a rate in Hz: (frames, n_mels) or (samples,)."""
        if self.kind in _DEFAULTS:
            (wave,) = resample(wave.unsqueeze(0), rate, self.sample_rate)
            if self.kind == "whisper":
                return whisper_log_mel(wave, self.n_mels, self.seconds)
            return self._normalised(kaldi_fbank(wave, self.sample_rate, self.n_mels))
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
        if self.normalise == "bands":
            return normalise(values.T, "mean_variance").T
        return normalise(values.unsqueeze(0), self.normalise)[0]


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
    """Fields that change neither an input nor a label."""
    of_labels: ClassVar[frozenset[str]] = frozenset({"tokens"})
    """Fields that change labels alone. A run from an earlier run's weights may change them."""

    def seconds(self, file: Path) -> float:
        """Return the duration of a recording, from its header."""
        return duration_of(file)

    def read(self, files: Sequence[Path]) -> dict[str, Any]:
        """Return padded inputs (N, frames, ...) and lengths (N,) for these recordings."""
        inputs = [self.features(*read_audio(Path(file))) for file in files]
        return {"inputs": pad_sequence(inputs, batch_first=True), "lengths": torch.tensor([len(one) for one in inputs])}

    @property
    def longest(self) -> float:
        """Longest recording in seconds that is read as a whole; others are read as windows of that length."""
        return min(WINDOW, self.features.longest)

    def windows(self, file: Path) -> Iterator[tuple[tuple[float, float], dict[str, Any]]]:
        """Yield (start, end) in seconds and the inputs of each window of a long recording."""
        for one in windows_of(file, self.longest, OVERLAP * self.longest):
            inputs = self.features(one.wave, one.rate).unsqueeze(0)
            yield (one.start, one.end), {"inputs": inputs, "lengths": torch.tensor([inputs.shape[1]])}
