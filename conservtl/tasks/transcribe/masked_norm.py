"""Group norm over the frames of each utterance that are no padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MaskedGroupNorm", "mask_norms"]


class MaskedGroupNorm(nn.GroupNorm):
    r"""Group norm with one group a channel whose statistics leave out padding.

    wav2vec 2.0 normalises each channel over time behind its first convolution, so that zeros behind a short utterance
    would change its outputs.

    .. math:: y_{ct} = \gamma_c \frac{x_{ct} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + \beta_c,
              \quad \mu_c = \frac{1}{L} \sum_{t < L} x_{ct}

    Args:
        channels: C.
        eps: added to the variance.
        kernel: of the convolution before it.
        stride: of the convolution before it.
    """

    def __init__(self, channels: int, eps: float, kernel: int, stride: int) -> None:
        super().__init__(channels, channels, eps)
        self.kernel, self.stride = kernel, stride
        self.samples: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, C, frames) for (N, C, frames)."""
        samples = self.samples
        if samples is None or len(samples) != len(inputs):
            return super().forward(inputs)
        frames = ((samples.to(inputs.device) - self.kernel) // self.stride + 1).clamp_min(1)
        valid = (torch.arange(inputs.shape[-1], device=inputs.device) < frames.unsqueeze(1)).unsqueeze(1)
        count = frames.view(-1, 1, 1)
        values = inputs.float()
        mean = values.where(valid, 0).sum(-1, keepdim=True) / count
        variance = (values - mean).where(valid, 0).square().sum(-1, keepdim=True) / count
        normalised = (values - mean) * (variance + self.eps).rsqrt()
        return (normalised * self.weight.unsqueeze(-1) + self.bias.unsqueeze(-1)).to(inputs.dtype)


def mask_norms(network: nn.Module) -> None:
    """Replace each group norm over time behind a convolution, and let the network tell it the lengths at each call."""
    for module in list(network.modules()):
        conv = getattr(module, "conv", None)
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.GroupNorm) and isinstance(conv, nn.Conv1d) and norm.num_groups == norm.num_channels:
                masked = MaskedGroupNorm(norm.num_channels, norm.eps, conv.kernel_size[0], conv.stride[0])
                masked.load_state_dict(norm.state_dict())
                setattr(module, name, masked)
    network.register_forward_pre_hook(_tell_lengths, with_kwargs=True)


def _tell_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    lengths = kwargs.get("lengths", args[1] if len(args) > 1 else None)
    for norm in module.modules():
        if isinstance(norm, MaskedGroupNorm):
            norm.samples = lengths
