"""A compact Conformer for CTC: convolutional subsampling, rotary self-attention, no norm across examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.bounds import ProperShare
from conservtl.spec_model import FrozenModel

__all__ = ["ConformerArgs", "ConformerBlock", "ConformerCTC", "Subsampling"]


class ConformerArgs(FrozenModel):
    """Arguments of the compact Conformer."""

    width: Annotated[int, Field(ge=16, le=512)] = 128
    """Length of the vector of a frame."""
    blocks: Annotated[int, Field(ge=1, le=24)] = 4
    """Conformer blocks."""
    heads: Annotated[int, Field(ge=1, le=16)] = 4
    """Heads of the self-attention; width must be a multiple of twice their number."""
    expansion: Annotated[int, Field(ge=1, le=8)] = 2
    """Hidden units of a feed-forward module, as a multiple of the width."""
    kernel: Annotated[int, Field(ge=3, le=63)] = 15
    """Frames that the convolution of a block sees; an odd number."""
    subsampling: Literal[2, 4] = 4
    """Frames of features for each frame of outputs."""
    dropout: ProperShare = 0.1
    """Dropout probability."""

    @model_validator(mode="after")
    def _fits(self) -> ConformerArgs:
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice heads; received {self.width} and {self.heads}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd; received {self.kernel}")
        return self


class ConformerCTC(nn.Module):
    """A Conformer encoder with a linear head for CTC, output 0 the blank.

    Layer norms take the place of the paper's batch norm, and rotary positions that of its relative ones: outputs of an
    utterance do not depend on the others of its batch, nor on padding.

    Args:
        bands: number of mel bands.
        tokens: number of outputs, the blank among them.
        args: sizes.

    Reference:
        Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", Interspeech 2020.
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.

    Example:
        >>> import torch
        >>> model = ConformerCTC(40, 30, ConformerArgs(width=16, blocks=1, heads=2))
        >>> outputs, lengths = model(torch.randn(2, 50, 40), torch.tensor([50, 21]))
        >>> outputs.shape, lengths.tolist()
        (torch.Size([2, 13, 30]), [13, 6])
    """

    def __init__(self, bands: int, tokens: int, args: ConformerArgs) -> None:
        super().__init__()
        self.subsampling = Subsampling(bands, args.width, args.subsampling, args.dropout)
        self.blocks = nn.ModuleList([ConformerBlock(args) for _ in range(args.blocks)])
        self.head = nn.Linear(args.width, tokens)

    def checkpointed_blocks(self) -> Iterable[nn.Module]:
        """Return the blocks that ``training.checkpointing`` computes again."""
        return self.blocks

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, frames, tokens) logits and the number of frames of each utterance, (N,).

        Args:
            inputs: (N, frames, bands).
            lengths: (N,) frames that are no padding.
        """
        frames, lengths = self.subsampling(inputs, lengths)
        valid = torch.arange(frames.shape[1], device=frames.device) < lengths.unsqueeze(1)
        for block in self.blocks:
            frames = block(frames, valid)
        return self.head(frames), lengths


class Subsampling(nn.Module):
    """Convolutions over time and bands that keep every second or fourth frame; padding stays zero between them."""

    def __init__(self, bands: int, width: int, factor: int, dropout: float) -> None:
        super().__init__()
        channels = max(8, width // 4)
        strides = (2, 2) if factor == 4 else (2, 1)
        self.conv1 = nn.Conv2d(1, channels, 3, (strides[0], 2), 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, (strides[1], 2), 1)
        self.linear = nn.Linear(channels * ((bands + 3) // 4), width)
        self.norm = nn.LayerNorm(width)
        self.dropout = _Dropout(dropout)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, frames, width) and (N,) for (N, frames, bands) and (N,)."""
        frames = _masked(inputs, lengths).unsqueeze(-1).permute(0, 3, 1, 2)  # channels last: faster on a CPU
        for conv in (self.conv1, self.conv2):
            lengths = (lengths - 1) // conv.stride[0] + 1
            frames = _masked(F.silu(conv(frames)), lengths, axis=2)
        flat = frames.transpose(1, 2).flatten(2)
        return self.dropout(self.norm(self.linear(flat))), lengths


class ConformerBlock(nn.Module):
    """Half a feed-forward module, self-attention, convolution, half a feed-forward module, layer norm."""

    def __init__(self, args: ConformerArgs) -> None:
        super().__init__()
        self.feed_forward1 = _feed_forward(args)
        self.attention = _Attention(args)
        self.convolution = _Convolution(args)
        self.feed_forward2 = _feed_forward(args)
        self.norm = nn.LayerNorm(args.width)

    def forward(self, frames: Tensor, valid: Tensor) -> Tensor:
        """Return (N, frames, width) for (N, frames, width) and the mask of frames that count, (N, frames)."""
        frames = frames + 0.5 * self.feed_forward1(frames)
        frames = frames + self.attention(frames, valid)
        frames = frames + self.convolution(frames, valid)
        frames = frames + 0.5 * self.feed_forward2(frames)
        return self.norm(frames)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, args: ConformerArgs) -> None:
        super().__init__()
        self.heads, self.rate = args.heads, args.dropout
        self.norm = nn.LayerNorm(args.width)
        self.qkv = nn.Linear(args.width, 3 * args.width)
        self.out = nn.Linear(args.width, args.width)
        self.dropout = _Dropout(args.dropout)

    def forward(self, frames: Tensor, valid: Tensor) -> Tensor:
        n, time, width = frames.shape
        parts = self.qkv(self.norm(frames)).view(n, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        mask, rate = valid[:, None, None, :], self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(_rotated(query), _rotated(key), value, mask, dropout_p=rate)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(n, time, width)))  # type: ignore[no-any-return]


class _Convolution(nn.Module):
    def __init__(self, args: ConformerArgs) -> None:
        super().__init__()
        width = args.width
        self.norm = nn.LayerNorm(width)
        self.into = nn.Linear(width, 2 * width)
        self.depthwise = _Depthwise(width, width, args.kernel, padding=args.kernel // 2, groups=width)
        self.inner_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.dropout = _Dropout(args.dropout)

    def forward(self, frames: Tensor, valid: Tensor) -> Tensor:
        gated = F.glu(self.into(self.norm(frames))).masked_fill(~valid.unsqueeze(-1), 0.0)
        mixed = self.depthwise(gated.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.out(F.silu(self.inner_norm(mixed))))  # type: ignore[no-any-return]


class _Depthwise(nn.Conv1d):
    """The same convolution; on a CPU it reads (N, channels, frames) whose channels are neighbours without a copy."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu":
            return super().forward(inputs)
        weight, padding = self.weight.unsqueeze(2), (0, *self.padding)
        return F.conv2d(inputs.unsqueeze(2), weight, self.bias, padding=padding, groups=self.groups).squeeze(2)


class _Dropout(nn.Dropout):
    """Dropout that on a CPU draws 16 bits for each value; torch's own draws take much of a training step there."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or inputs.device.type != "cpu":
            return super().forward(inputs)
        words = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        kept = draws >= round(self.p * 2**16) - 2**15
        return inputs * kept.to(inputs.dtype).div_(1 - self.p)


def _feed_forward(args: ConformerArgs) -> nn.Sequential:
    hidden = args.expansion * args.width
    return nn.Sequential(
        nn.LayerNorm(args.width),
        nn.Linear(args.width, hidden),
        nn.SiLU(),
        _Dropout(args.dropout),
        nn.Linear(hidden, args.width),
        _Dropout(args.dropout),
    )


def _rotated(vectors: Tensor) -> Tensor:
    """Rotate pairs of (N, heads, frames, size) by angles that grow with the frame."""
    half = vectors.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=vectors.device, dtype=torch.float32) / half)
    angles = torch.arange(vectors.shape[-2], device=vectors.device, dtype=torch.float32).unsqueeze(1) * rates
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _masked(frames: Tensor, lengths: Tensor, axis: int = 1) -> Tensor:
    """Return frames with zeros beyond the lengths along an axis."""
    shape = [1] * frames.ndim
    shape[0], shape[axis] = len(frames), frames.shape[axis]
    valid = torch.arange(frames.shape[axis], device=frames.device) < lengths.to(frames.device).unsqueeze(1)
    return torch.where(valid.view(shape), frames, 0.0)  # masked_fill would change the layout
