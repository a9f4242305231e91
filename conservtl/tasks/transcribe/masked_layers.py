"""Convolutions and norms over the frames of each utterance that are no padding; lengths are told before each call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MaskedBatchNorm1d", "MaskedConv1d", "MaskedGroupNorm1d", "tell"]


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
    """A group norm with one group, over channels and frames, whose statistics leave out padding.

    Args:
        norm: with the same values.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(1, norm.num_channels, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.lengths: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, channels, frames) for (N, channels, frames)."""
        valid = _valid(inputs, self.lengths)
        if valid is None:
            return super().forward(inputs)
        values, inside = inputs.float(), valid.unsqueeze(1)
        count = valid.sum(1).view(-1, 1, 1) * self.num_channels
        mean = values.where(inside, 0).sum((1, 2), keepdim=True) / count
        variance = (values - mean).where(inside, 0).square().sum((1, 2), keepdim=True) / count
        normalised = (values - mean) * (variance + self.eps).rsqrt()
        return (normalised * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)).to(inputs.dtype)


def tell(network: nn.Module, lengths: Tensor) -> None:
    """Tell the masked layers of a network how many frames of each utterance reach them, (N,)."""
    for module in network.modules():
        if isinstance(module, (MaskedConv1d, MaskedBatchNorm1d, MaskedGroupNorm1d)):
            module.lengths = lengths


def _valid(inputs: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Return which frames are no padding, (N, frames); None if that is not told of these utterances."""
    if lengths is None or len(lengths) != len(inputs):
        return None
    return torch.arange(inputs.shape[-1], device=inputs.device) < lengths.to(inputs.device).unsqueeze(1)
