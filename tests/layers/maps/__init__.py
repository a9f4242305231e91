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
