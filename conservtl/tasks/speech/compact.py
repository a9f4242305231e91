"""A compact keyword network: temporal convolutions with mel bands as channels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from conservtl.bounds import ProperShare
from conservtl.spec_model import FrozenModel

__all__ = ["TCResNet", "TCResNetArgs", "TemporalBlock"]

Norm = Literal["batch", "group"]


class TCResNetArgs(FrozenModel):
    """Arguments of a TC-ResNet."""

    width: Annotated[float, Field(gt=0, le=16)] = 1.5
    """Multiplier of the channels 16, 24, 32, 48 (the paper's k)."""
    dropout: ProperShare = 0.3
    """Dropout probability before the head."""
    norm: Norm = "batch"
    """Batch norm as in the paper, or group norm, which has no running statistics."""


class TCResNet(nn.Module):
    """TC-ResNet: each mel band is a channel, and every convolution runs along time only.

    Args:
        bands: number of mel bands.
        classes: number of words.
        blocks_a_width: 1 for TC-ResNet8, 2 for TC-ResNet14.
        args: width, dropout and norm.

    Reference:
        Choi et al., "Temporal Convolution for Real-time Keyword Spotting on Mobile Devices",
        Interspeech 2019, figure 2.
    """

    def __init__(self, bands: int, classes: int, blocks_a_width: int, args: TCResNetArgs) -> None:
        super().__init__()
        stem, *widths = (max(1, round(args.width * channels)) for channels in (16, 24, 32, 48))
        self.stem = nn.Sequential(nn.Conv1d(bands, stem, 3, padding=1, bias=False), _norm(args.norm, stem), nn.ReLU())
        blocks, before = [], stem
        for width in widths:
            for index in range(blocks_a_width):
                blocks.append(TemporalBlock(before, width, 2 if index == 0 else 1, args.norm))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(args.dropout)
        self.head = nn.Linear(before, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, classes) logits for (N, bands, frames)."""
        return self.head(self.dropout(self.blocks(self.stem(inputs)).mean(dim=-1)))  # type: ignore[no-any-return]


class TemporalBlock(nn.Module):
    """Two convolutions over nine frames and a shortcut; the first has the stride."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(before, after, 9, stride, padding=4, bias=False)
        self.norm1 = _norm(norm, after)
        self.conv2 = nn.Conv1d(after, after, 9, padding=4, bias=False)
        self.norm2 = _norm(norm, after)
        self.shortcut = (
            nn.Sequential()
            if stride == 1 and before == after
            else nn.Sequential(nn.Conv1d(before, after, 1, stride, bias=False), _norm(norm, after), nn.ReLU())
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, after, frames / stride) features for (N, before, frames)."""
        inner = self.norm1(self.conv1(inputs)).relu()
        return (self.norm2(self.conv2(inner)) + self.shortcut(inputs)).relu()  # type: ignore[no-any-return]


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm1d(channels)
    groups = next(g for g in (8, 6, 4, 3, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)
