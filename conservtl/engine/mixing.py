"""Mixup and CutMix: batches of images whose pairs are mixed, with labels that are mixed alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.engine.batch import Batches
from conservtl.engine.evaluation import Functions
from conservtl.engine.randomness import preserve_rng
from conservtl.engine.session import Session
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.extras import require
from conservtl.functions import logits_of
from conservtl.labels import labels_for_loss
from conservtl.runtime.preserve import eval_mode

__all__ = ["Augment", "with_mixing"]

Augment = Callable[[Any, torch.Generator], Any]


def with_mixing(session: Session, functions: Functions, batches: Batches, augment: Augment | None) -> Augment | None:
    """Return the augmentation of a run: the given one, then the settings' mixup or CutMix, by torchvision.

    The functions are tried on one mixed batch, because its labels are probabilities.
    """
    if augment is not None and not callable(augment):
        raise SpecError(f"augment must be a function (batch, generator) -> batch; received {augment!r:.60}. Pass one.")
    settings = session.training
    if settings.mixup is None and settings.cutmix is None:
        return augment
    name = "mixup" if settings.mixup is not None else "cutmix"
    model = session.adaptation.model
    with eval_mode(model), preserve_rng(batches.generators), torch.no_grad(), session.autocast():
        content = next(batches.epoch()).content
        images, labels = _images_and_labels(content, name)
        if (labels < 0).any():
            raise SpecError(
                f"training.{name} mixes every label of a batch; received {int(labels.min())}. "
                f"Leave training.{name} out."
            )
        labels_for_loss(model, content, functions.forward, functions.loss)
        logits = logits_of(functions.forward(model, content))
        if logits.ndim != 2 or len(logits) != len(images):
            raise SpecError(
                f"training.{name} mixes classes, so outputs must be logits (N, classes); received shape "
                f"{tuple(logits.shape)}. Leave training.{name} out."
            )
        mix = _mixer(settings, logits.shape[1])

        def mixed(content: Any, generator: torch.Generator) -> Any:
            content = content if augment is None else augment(content, generator)
            images, labels = _images_and_labels(content, name)
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torchvision draws from it alone
                return _with(content, *mix(images, labels))

        _try_loss(functions, model, mixed(content, torch.Generator(session.device)), name)
    return mixed


def _mixer(settings: Training, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return torchvision's function (images, labels) -> (images, probabilities); one of two, drawn for each batch."""
    transforms = require("torchvision.transforms.v2", "vision")
    chosen = []
    if settings.mixup is not None:
        chosen.append(transforms.MixUp(alpha=settings.mixup, num_classes=classes))
    if settings.cutmix is not None:
        chosen.append(transforms.CutMix(alpha=settings.cutmix, num_classes=classes))
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = (
        chosen[0] if len(chosen) == 1 else (transforms.RandomChoice(chosen))
    )
    return mix


def _images_and_labels(content: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch: of (images, labels), or of a dictionary with ``labels``."""
    parts = list(content.values()) if isinstance(content, Mapping) else list(content)
    images = [part for part in parts if isinstance(part, Tensor) and part.ndim == 4 and part.is_floating_point()]
    labels = content.get("labels") if isinstance(content, Mapping) else parts[1] if len(parts) == 2 else None
    if len(images) != 1 or not isinstance(labels, Tensor):
        raise SpecError(
            f"training.{name} mixes images (N, C, H, W): batches must be (images, labels), or a dictionary with "
            f"one tensor of images and labels. Leave training.{name} out for other data."
        )
    if labels.ndim != 1 or labels.is_floating_point():
        raise SpecError(
            f"training.{name} mixes one class an image: labels must be integers (N,); received "
            f"{str(labels.dtype)[6:]} of shape {tuple(labels.shape)}. Leave training.{name} out."
        )
    return images[0], labels.long()


def _with(content: Any, images: Tensor, labels: Tensor) -> Any:
    """Return a batch with other images and labels."""
    if not isinstance(content, Mapping):
        return images, labels
    return {
        key: labels if key == "labels" else images if isinstance(part, Tensor) and part.ndim == 4 else part
        for key, part in content.items()
    }


def _try_loss(functions: Functions, model: nn.Module, content: Any, name: str) -> None:
    """Raise unless the loss takes probabilities as labels."""
    outputs = functions.forward(model, content)
    try:
        functions.loss(outputs, content)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise SpecError(
            f"training.{name} makes labels probabilities (N, classes), which the loss must take; it failed: {error}. "
            f"Use cross-entropy, or leave training.{name} out."
        ) from error
