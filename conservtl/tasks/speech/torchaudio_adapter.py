"""Adapter of torchaudio networks to classification: mean of the frames over time and a linear head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError
from conservtl.extras import require
from conservtl.tasks.speech.features import Features

__all__ = ["FrameClassifier", "torchaudio_names", "wrap"]

Layout = Literal["samples", "bands_frames", "frames_bands", "channel_samples", "channel_frames_bands"]

# Names of the argument for the number of mel bands in torchaudio's networks.
_BAND_ARGS = ("input_dim", "num_features", "n_feature")


class FrameClassifier(nn.Module):
    """A network that returns one vector a frame, followed by the mean over time and a linear head.

    Args:
        backbone: the network.
        size: length of its vectors.
        classes: number of words.
        layout: order of the axes of its input.
        time: time axis of its output, 1 or 2.
        lengths: whether its second argument is the number of frames of each input.
    """

    def __init__(
        self, backbone: nn.Module, size: int, classes: int, layout: Layout, time: int, *, lengths: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(size, classes)
        self.layout, self.time, self.lengths = layout, time, lengths

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, classes) logits for (N, bands, frames) or (N, samples)."""
        frames = run_backbone(self.backbone, inputs, self.layout, lengths=self.lengths)
        return self.head(frames.mean(dim=self.time))  # type: ignore[no-any-return]


def torchaudio_names() -> list[str]:
    """Return the names in ``torchaudio.models`` that build a network."""
    models = require("torchaudio.models", "torchaudio")
    return [name for name in models.__all__ if _is_network(getattr(models, name))]


def _is_network(value: Any) -> bool:
    return inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))


def wrap(name: str, args: dict[str, Any], features: Features, classes: int) -> FrameClassifier:
    """Build ``torchaudio.models.<name>`` and find the shape of its output from one silent input.

    Raises:
        SpecError: the arguments do not fit, or the network does not return one vector a frame.
    """
    make = getattr(require("torchaudio.models", "torchaudio"), name)
    backbone = _construct(name, make, _with_bands(make, args, features))
    silence = torch.zeros(1, *features.shape)
    layout, lengths = _calling_convention(name, backbone, features)
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            frames = run_backbone(backbone, silence, layout, lengths=lengths)
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
        raise SpecError(
            f"model.name: torchaudio's {name} does not turn inputs of shape {features.shape} "
            f"({features.kind}) into frames: {error}. "
            f"Change model.args or data.features, or choose another network."
        ) from error
    finally:
        backbone.train(training)
    if not isinstance(frames, Tensor) or frames.ndim != 3:
        raise SpecError(
            f"model.name must be a network that returns one vector a frame; torchaudio's {name} returns "
            f"{_shape(frames)}. Choose another, such as Wav2Letter, Conformer or wav2vec2_base."
        )
    time = 2 if name == "Wav2Letter" else 1
    return FrameClassifier(backbone, frames.shape[3 - time], classes, layout, time, lengths=lengths)


def _with_bands(make: Callable[..., nn.Module], args: dict[str, Any], features: Features) -> dict[str, Any]:
    """Return the arguments, with defaults for the number of bands and the kind of input."""
    names = inspect.signature(make).parameters
    filled: dict[str, Any] = {
        name: features.n_mels for name in _BAND_ARGS if name in names and features.kind == "logmel"
    }
    if "input_type" in names:  # Wav2Letter; its "mfcc" means any feature bands
        filled["input_type"] = "mfcc" if features.kind == "logmel" else "waveform"
    return {**filled, **args}


def _construct(name: str, make: Callable[..., nn.Module], args: dict[str, Any]) -> nn.Module:
    try:
        inspect.signature(make).bind(**args)
        backbone = make(**args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        takes = ", ".join(inspect.signature(make).parameters)
        raise SpecError(
            f"model.args: torchaudio's {name} cannot be built with {args}: {error}. It takes: {takes or 'none'}."
        ) from error
    if not isinstance(backbone, nn.Module):
        raise SpecError(f"model.name must be a network; torchaudio's {name} builds none. Choose another.")
    return backbone


def _calling_convention(name: str, backbone: nn.Module, features: Features) -> tuple[Layout, bool]:
    """Return the layout of the network's input and whether it takes lengths, from the signature of its forward."""
    parameters = inspect.signature(backbone.forward).parameters
    lengths = "lengths" in parameters and parameters["lengths"].default is inspect.Parameter.empty
    if features.kind == "waveform":
        return ("channel_samples" if name == "Wav2Letter" else "samples"), lengths
    if name == "DeepSpeech":
        return "channel_frames_bands", lengths
    return ("bands_frames" if name == "Wav2Letter" else "frames_bands"), lengths


def run_backbone(backbone: nn.Module, inputs: Tensor, layout: Layout, *, lengths: bool) -> Tensor:
    """Return the network's first output for inputs converted to its layout."""
    if layout in {"frames_bands", "channel_frames_bands"}:
        inputs = inputs.transpose(1, 2)
    if layout in {"channel_samples", "channel_frames_bands"}:
        inputs = inputs.unsqueeze(1)
    if lengths:
        frames = torch.full((len(inputs),), inputs.shape[1], dtype=torch.long, device=inputs.device)
        outputs = backbone(inputs, frames)
    else:
        outputs = backbone(inputs)
    first: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return first


def _shape(outputs: Any) -> str:
    return f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
