"""Recognizers on samples: torchaudio's wav2vec 2.0, HuBERT and WavLM, and those of transformers' AutoModelForCTC."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SpecError, hint
from conservtl.extras import require
from conservtl.tasks.transcribe.masked_layers import mask_layers, tell, tell_samples

__all__ = [
    "TorchaudioCTC",
    "TransformersCTC",
    "build_torchaudio",
    "build_transformers",
    "bundle_labels",
    "bundle_of",
    "of_transformers",
    "torchaudio_names",
]

TRANSFORMERS = "transformers/"
_FAMILIES = ("wav2vec2_", "hubert_", "wavlm_")
_BUNDLES = {"HUBERT_ASR_LARGE": "hubert_large", "HUBERT_ASR_XLARGE": "hubert_xlarge"}


class TorchaudioCTC(nn.Module):
    """A wav2vec 2.0, HuBERT or WavLM of torchaudio with a head.

    Args:
        network: takes samples and lengths, and returns logits and lengths.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        mask_layers(network.feature_extractor, nn.GroupNorm)
        blocks = network.encoder.transformer.layers
        for place, block in enumerate(blocks):
            if hasattr(block.attention, "rel_attn_embed"):
                blocks[place] = _WavLMBlock(block)

    def checkpointed_blocks(self) -> Iterable[nn.Module]:
        """Return the blocks that ``training.checkpointing`` computes again."""
        blocks: Iterable[nn.Module] = self.network.encoder.transformer.layers
        return blocks

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, frames, tokens) logits and the frames of each utterance, (N,), for (N, samples) and (N,)."""
        tell_samples(self.network.feature_extractor, lengths)
        return self.network(inputs, lengths)  # type: ignore[no-any-return]


class _WavLMBlock(nn.Module):
    """torchaudio's block with its modules, for a batch with padding: the attention refuses the mask of the encoder."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention: Any = block.attention
        self.dropout: Any = block.dropout
        self.layer_norm: Any = block.layer_norm
        self.layer_norm_first: bool = block.layer_norm_first
        self.feed_forward: Any = block.feed_forward
        self.final_layer_norm: Any = block.final_layer_norm

    def forward(self, x: Tensor, attention_mask: Tensor, position_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (N, frames, width) and biases for the same, a mask to be added to scores, and biases of positions."""
        attention = self.attention
        if position_bias is None and attention.rel_attn_embed is None:  # the first block was dropped, and its biases
            position_bias = attention_mask.new_zeros(len(x), attention.num_heads, *attention_mask.shape[2:])
        padded = attention_mask[:, 0, 0] < 0
        query = self.layer_norm(x) if self.layer_norm_first else x
        mixed, position_bias = attention(query, key_padding_mask=padded, position_bias=position_bias)
        x = x + self.dropout(mixed)
        if self.layer_norm_first:
            return x + self.feed_forward(self.final_layer_norm(x)), position_bias
        x = self.layer_norm(x)
        return self.final_layer_norm(x + self.feed_forward(x)), position_bias


class TransformersCTC(nn.Module):
    """A CTC model of transformers that takes samples with their lengths, and returns logits with theirs.

    Args:
        network: of ``AutoModelForCTC``, with convolutions on samples.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        base, config = network.base_model, network.config
        mask_layers(base.feature_extractor, nn.GroupNorm)
        mask_layers(base.encoder, nn.Conv1d, nn.BatchNorm1d)
        self._convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self._squeezed = getattr(config, "squeeze_factor", 1)
        self._adapts = getattr(base, "adapter", None) is not None
        if self._adapts:
            mask_layers(base.adapter, nn.Conv1d)
            base.adapter.layerdrop = 0.0  # its layers halve the frames: none can be left out

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, frames, tokens) logits and the frames of each utterance, (N,), for (N, samples) and (N,)."""
        base = self.network.base_model
        frames = self._encoded(lengths)
        tell_samples(base.feature_extractor, lengths)
        tell(base.encoder, frames)
        samples = frames
        for kernel, stride in reversed(self._convolutions):
            samples = (samples - 1) * stride + kernel
        if self._adapts:
            for layer in base.adapter.layers:
                tell(layer, frames)
                frames = (frames - 1) // layer.conv.stride[0] + 1
        valid = torch.arange(inputs.shape[1], device=inputs.device) < samples.to(inputs.device).unsqueeze(1)
        return self.network(inputs, attention_mask=valid.long()).logits, frames

    def _encoded(self, lengths: Tensor) -> Tensor:
        """Return the frames that the encoder reads of these numbers of samples; it may squeeze several into one."""
        for kernel, stride in self._convolutions:
            lengths = (lengths - kernel) // stride + 1
        return lengths // self._squeezed * self._squeezed


def torchaudio_names() -> list[str]:
    """Return the functions of ``torchaudio.models`` that build a recognizer on samples, and the bundles."""
    models = require("torchaudio.models", "torchaudio")
    functions = [name for name in models.__all__ if name.startswith(_FAMILIES) and "pretrain" not in name]
    pipelines = require("torchaudio.pipelines", "torchaudio")
    return functions + [name for name in pipelines.__all__ if "_ASR_" in name]


def bundle_of(name: str) -> Any | None:
    """Return torchaudio's bundle of this name; None if it is none."""
    return getattr(require("torchaudio.pipelines", "torchaudio"), name) if "_ASR_" in name else None


def bundle_labels(name: str) -> str:
    """Return the characters of a bundle's outputs after the blank."""
    bundle = bundle_of(name)
    return "".join(" " if label == "|" else label for label in bundle.get_labels()[1:]) if bundle else ""


def build_torchaudio(name: str, args: dict[str, Any], tokens: int) -> TorchaudioCTC:
    """Return a recognizer of torchaudio, by its function's or bundle's name, with random weights.

    Layers are not dropped at random unless ``args`` say so.

    Raises:
        SpecError: the arguments do not fit.
    """
    make: Callable[..., nn.Module] = getattr(require("torchaudio.models", "torchaudio"), _function_of(name))
    takes = inspect.signature(make).parameters
    try:
        network = make(**{"encoder_layer_drop": 0.0, **args, "aux_num_out": tokens})
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise SpecError(
            f"model.args: torchaudio's {name} cannot be built with {args}: {error}. It takes: {', '.join(takes)}."
        ) from error
    return TorchaudioCTC(network)


def build_transformers(name: str, args: dict[str, Any], tokens: int) -> TransformersCTC:
    """Return a recognizer of transformers, by its type, with random weights.

    Neither layers nor spans are dropped at random within the network unless ``args`` say so: augmentation is the
    spec's.

    Raises:
        SpecError: there is no such type, it does not take samples, or the arguments do not fit.
    """
    library = require("transformers", "transformers")
    kind = name.removeprefix(TRANSFORMERS)
    known = sorted(_transformers_types(library))
    if kind not in known:
        raise SpecError(
            f"model.name must be transformers/TYPE with a type of AutoModelForCTC that takes samples "
            f"({', '.join(known)}); received {name!r}.{hint(kind, known, count=3)}"
        )
    ours = {"vocab_size": tokens, "pad_token_id": 0}  # of the blank, no password # nosec B105
    chosen = {"layerdrop": 0.0, "apply_spec_augment": False, **args, **ours}
    return TransformersCTC(of_transformers("AutoModelForCTC", kind, args, chosen))


def of_transformers(auto: str, kind: str, args: dict[str, Any], fields: dict[str, Any]) -> Any:
    """Return a network of transformers with random weights; ``fields`` are ``args`` and those that are decided.

    Raises:
        SpecError: there is no such field, or they do not fit each other.
    """
    library = require("transformers", "transformers")
    plain = library.AutoConfig.for_model(kind)
    if unknown := [field for field in args if not hasattr(plain, field)]:
        raise SpecError(
            f"model.args: a configuration of {kind} has no field {unknown[0]!r}."
            f"{hint(unknown[0], sorted(plain.to_dict()), count=3)}"
        )
    try:
        return getattr(library, auto).from_config(library.AutoConfig.for_model(kind, **fields))
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise SpecError(f"model.args: {kind} cannot be built with {args}: {error}. Change model.args.") from error


def _function_of(name: str) -> str:
    """Return the function that builds a bundle's network; a function's name is its own."""
    if "_ASR_" not in name:
        return name
    size = "wav2vec2_large_lv60k" if "LV60K" in name else "wav2vec2_large" if "LARGE" in name else "wav2vec2_base"
    return _BUNDLES.get(name, size)


def _transformers_types(library: Any) -> list[str]:
    """Return the types of AutoModelForCTC whose first layers are convolutions on samples."""
    names = require("transformers.models.auto.modeling_auto", "transformers").MODEL_FOR_CTC_MAPPING_NAMES
    return [kind for kind in names if hasattr(library.AutoConfig.for_model(kind), "conv_kernel")]
