"""Convolutions and norms over the frames of each utterance that are no padding; lengths are told before each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MaskedBatchNorm1d", "MaskedConv1d", "MaskedGroupNorm1d", "mask_layers", "tell", "tell_samples"]


class MaskedConv1d(nn.Conv1d):
    """A convolution that sees zeros in the place of padding.

    Args:
        conv: with the same sizes and values.
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        size = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
        super().__init__(*size, padding=conv.padding[0], groups=conv.groups, bias=conv.bias is not None)
        self.load_state_dict(conv.state_dict())
        self.lengths: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, channels, frames) for (N, channels, frames)."""
        valid = _valid(inputs, self.lengths)
        return super().forward(inputs if valid is None else inputs.masked_fill(~valid.unsqueeze(1), 0.0))


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """A batch norm whose statistics leave out padding.

    Args:
        norm: with the same values.
    """

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.lengths: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, channels, frames) for (N, channels, frames), zeros where padded."""
        valid = _valid(inputs, self.lengths)
        if valid is None:
            return super().forward(inputs)
        frames = inputs.transpose(1, 2)
        normalised = super().forward(frames[valid])
        return torch.zeros_like(frames).masked_scatter(valid.unsqueeze(-1), normalised.to(frames.dtype)).transpose(1, 2)


class MaskedGroupNorm1d(nn.GroupNorm):
    r"""A group norm over frames whose statistics leave out padding.

    wav2vec 2.0 normalises each channel over time behind its first convolution, so that zeros behind a short utterance
    would change its outputs.

    .. math:: y_{ct} = \gamma_c \frac{x_{ct} - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta_c,
              \quad \mu_g = \operatorname{mean}_{c \in g, t < L} x_{ct}

    Args:
        norm: with the same groups and values.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.lengths: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, channels, frames) for (N, channels, frames)."""
        valid = _valid(inputs, self.lengths)
        if valid is None:
            return super().forward(inputs)
        values = inputs.float().reshape(len(inputs), self.num_groups, -1, inputs.shape[2])
        inside = valid[:, None, None]
        count = valid.sum(1).view(-1, 1, 1, 1) * values.shape[2]
        mean = values.where(inside, 0).sum((2, 3), keepdim=True) / count
        variance = (values - mean).where(inside, 0).square().sum((2, 3), keepdim=True) / count
        normalised = ((values - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normalised * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)).to(inputs.dtype)


def mask_layers(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Replace layers of these kinds over several frames by ones that leave out padding.

    A convolution with a parametrised weight stays: transformers and torchaudio give it zeros in the place of padding.
    """
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) in kinds and getattr(layer, "kernel_size", (2,)) != (1,):
                setattr(module, name, _MASKED[type(layer)](layer))


def tell_samples(extractor: Any, samples: Tensor) -> None:
    """Tell the norms behind the first convolution of a feature extractor the samples of each utterance, (N,)."""
    first = extractor.conv_layers[0].conv
    tell(extractor, ((samples - first.kernel_size[0]) // first.stride[0] + 1).clamp_min(1))


def tell(network: nn.Module, lengths: Tensor) -> None:
    """Tell the masked layers of a network how many frames of each utterance reach them, (N,)."""
    for module in network.modules():
        if isinstance(module, (MaskedConv1d, MaskedBatchNorm1d, MaskedGroupNorm1d)):
            module.lengths = lengths


_MASKED: dict[type[nn.Module], Any] = {
    nn.Conv1d: MaskedConv1d,
    nn.BatchNorm1d: MaskedBatchNorm1d,
    nn.GroupNorm: MaskedGroupNorm1d,
}


def _valid(inputs: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Return which frames are no padding, (N, frames); None if that is not told of these utterances."""
    if lengths is None or len(lengths) != len(inputs):
        return None
    return torch.arange(inputs.shape[-1], device=inputs.device) < lengths.to(inputs.device).unsqueeze(1)
