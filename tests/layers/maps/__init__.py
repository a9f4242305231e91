"""Published architectures, built without weights, and the layers expected of each.

The tables beside this file are the expected layers, a file an architecture. `python tests/layers/write_maps.py` writes
them anew; read every line that changes before you keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conservtl.layers import Layer

from . import images, speech, text, vision

ARCHITECTURES = vision.ARCHITECTURES | images.ARCHITECTURES | text.ARCHITECTURES | speech.ARCHITECTURES

LARGE = frozenset(
    {
        *(f"timm.{name}" for name in (
            "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coatnet_0_rw_224", "davit_tiny",
            "deit_tiny_distilled_patch16_224", "densenet121", "dpn68", "eva02_tiny_patch14_224", "fastvit_t8",
            "hiera_tiny_224", "inception_next_tiny", "inception_v4", "maxvit_rmlp_pico_rw_256",
            "mobilenetv4_conv_small", "mvitv2_tiny", "poolformer_s12", "repvgg_a0", "resnetv2_50",
            "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "vit_base_patch16_siglip_224",
            "vit_small_patch14_dinov2",
        )),
        *(f"torchvision.{name}" for name in (
            "deeplabv3_mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "inception_v3",
            "mobilenet_v3_small", "mvit_v1_b", "r2plus1d_18", "regnet_y_400mf", "swin3d_t", "swin_v2_t",
        )),
        "torchaudio.Tacotron2",
        *(f"transformers.{name}" for name in (
            "BartForConditionalGeneration", "DetrForObjectDetection", "MarianMTModel",
            "MobileNetV2ForImageClassification", "MobileViTForImageClassification",
            "PegasusForConditionalGeneration", "PoolFormerForImageClassification",
            "Speech2TextForConditionalGeneration", "SpeechT5ForSpeechToText", "WavLMForXVector",
            "YolosForObjectDetection",
        )),
    }
)  # fmt: skip
"""Architectures that take longest, each with a smaller one of its kind among the others: for tests marked slow."""

FAMILIES = (
    "vit_", "swin", "convnext", "efficientnet", "beit", "maxvit", "hrnet", "dino", "clip", "bertfor", "deberta", "gpt2",
    "llama", "t5for", "albert", "whisper", "wav2vec2", "hubert", "conformer", "mambaout",
)  # fmt: skip
"""A part of the name, in lower case, of families that the other architectures must hold."""


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a model and an example; large models are on the meta device."""
    torch.manual_seed(0)
    if name not in vision.ARCHITECTURES or name == "torchvision.regnet_y_400mf":
        return ARCHITECTURES[name]()
    with torch.device("meta"):
        return ARCHITECTURES[name]()


def file(name: str) -> Path:
    return Path(__file__).with_name(f"{name.replace(' ', '_')}.txt")


def table(layers: Sequence[Layer]) -> str:
    """Return a line a layer: its name, parameters, weights, biases and norms; other modules; the head's modules."""
    lines = []
    for layer in layers:
        infos = layer.parameters
        kinds = [f"{sum(info.kind == kind for info in infos)}{kind[0]}" for kind in ("weight", "bias", "norm")]
        line = [layer.name, str(sum(math.prod(info.shape) for info in infos)), *kinds]
        line += [f"+ {', '.join(others)}"] if (others := [name for name in layer.modules if name != layer.name]) else []
        for word in ("head", "candidate"):
            modules = sorted({module for info in infos if (module := getattr(info, word))})
            line += [f"{word}: {', '.join(modules)}"] if modules else []
        lines.append("  ".join(line))
    return "\n".join(lines) + "\n"
