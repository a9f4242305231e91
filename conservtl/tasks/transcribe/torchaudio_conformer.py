"""torchaudio's Conformer as a CTC model on mel features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from conservtl.bounds import ProperShare
from conservtl.extras import require
from conservtl.spec_model import FrozenModel
from conservtl.tasks.transcribe.conformer import Subsampling
from conservtl.tasks.transcribe.masked_layers import mask_layers, tell

__all__ = ["TorchaudioConformer", "TorchaudioConformerArgs"]


class TorchaudioConformerArgs(FrozenModel):
    """Arguments of ``torchaudio.models.Conformer``, by its names; the defaults are the paper's small model."""

    input_dim: Annotated[int, Field(ge=16, le=1024)] = 144
    """Length of the vector of a frame, a multiple of num_heads."""
    num_heads: Annotated[int, Field(ge=1, le=16)] = 4
    """Heads of the self-attention."""
    ffn_dim: Annotated[int, Field(ge=16, le=4096)] = 576
    """Hidden units of a feed-forward module."""
    num_layers: Annotated[int, Field(ge=1, le=32)] = 16
    """Conformer blocks."""
    depthwise_conv_kernel_size: Annotated[int, Field(ge=3, le=63)] = 31
    """Frames that the convolution of a block sees; an odd number."""
    dropout: ProperShare = 0.1
    """Dropout probability."""
    use_group_norm: bool = False
    """Whether to normalise each utterance, in the place of batch norm."""
    convolution_first: bool = False
    """Whether the convolution comes before the self-attention."""
    subsampling: Literal[2, 4] = 4
    """Frames of features for each frame of outputs, by convolutions before the blocks."""

    @model_validator(mode="after")
    def _fits(self) -> TorchaudioConformerArgs:
        if self.input_dim % self.num_heads:
            raise ValueError(
                f"input_dim must be a multiple of num_heads; received {self.input_dim} and {self.num_heads}"
            )
        if self.depthwise_conv_kernel_size % 2 == 0:
            raise ValueError(f"depthwise_conv_kernel_size must be odd; received {self.depthwise_conv_kernel_size}")
        return self


class TorchaudioConformer(nn.Module):
    """Convolutional subsampling, torchaudio's Conformer, and a linear head for CTC, output 0 the blank.

    Convolutions and norms leave out padding, in training too: outputs of an utterance do not depend on it.

    Args:
        bands: number of mel bands.
        tokens: number of outputs, the blank among them.
        args: sizes.

    Reference:
        Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", Interspeech 2020.
    """

    def __init__(self, bands: int, tokens: int, args: TorchaudioConformerArgs) -> None:
        super().__init__()
        sizes = args.model_dump(exclude={"subsampling"})
        self.subsampling = Subsampling(bands, args.input_dim, args.subsampling, args.dropout)
        self.network: Any = require("torchaudio.models", "torchaudio").Conformer(**sizes)
        layers = self.network.conformer_layers
        for place, block in enumerate(layers):
            mask_layers(block.conv_module, nn.Conv1d, nn.BatchNorm1d, nn.GroupNorm)
            layers[place] = _Block(block)
        self.head = nn.Linear(args.input_dim, tokens)

    def checkpointed_blocks(self) -> Iterable[nn.Module]:
        """Return the blocks that ``training.checkpointing`` computes again."""
        blocks: Iterable[nn.Module] = self.network.conformer_layers
        return blocks

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, frames, tokens) logits and the number of frames of each utterance, (N,).

        Args:
            inputs: (N, frames, bands).
            lengths: (N,) frames that are no padding.
        """
        frames, lengths = self.subsampling(inputs, lengths)
        frames = frames[:, : int(lengths.max())]
        tell(self.network, lengths)
        padded = torch.arange(frames.shape[1], device=frames.device) >= lengths.to(frames.device).unsqueeze(1)
        for block in self.checkpointed_blocks():
            frames = block(frames, padded)
        return self.head(frames), lengths


class _Block(nn.Module):
    """torchaudio's block with its modules, for frames whose first axis is the utterances', as elsewhere."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ffn1: Any = block.ffn1
        self.self_attn_layer_norm: Any = block.self_attn_layer_norm
        self.self_attn: Any = block.self_attn
        self.self_attn_dropout: Any = block.self_attn_dropout
        self.conv_module: Any = block.conv_module
        self.ffn2: Any = block.ffn2
        self.final_layer_norm: Any = block.final_layer_norm
        self.convolution_first: bool = block.convolution_first

    def forward(self, frames: Tensor, padded: Tensor) -> Tensor:
        """Return (N, frames, width) for (N, frames, width) and the mask of padding, (N, frames)."""
        frames = frames + 0.5 * self.ffn1(frames)
        if self.convolution_first:
            frames = frames + self.conv_module(frames)
        query = self.self_attn_layer_norm(frames).transpose(0, 1)
        mixed, _ = self.self_attn(query, query, query, key_padding_mask=padded, need_weights=False)
        frames = frames + self.self_attn_dropout(mixed).transpose(0, 1)
        if not self.convolution_first:
            frames = frames + self.conv_module(frames)
        frames = frames + 0.5 * self.ffn2(frames)
        return self.final_layer_norm(frames)  # type: ignore[no-any-return]
