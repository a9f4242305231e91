"""Networks by name, without downloaded weights."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from conservtl.errors import SpecError, hint
from conservtl.extras import require
from conservtl.tasks.own_network import NetworkSection
from conservtl.tasks.vision.cifar_resnet import CIFAR_DEPTHS, CifarResNet
from conservtl.tasks.vision.image_settings import CIFAR_IMAGES, IMAGENET_IMAGES, ImageSettings
from conservtl.tasks.vision.preprocessing import VisionPreprocessing

__all__ = ["ModelSpec", "build", "published_settings"]

_WEIGHTS = frozenset({"checkpoint_path", "pretrained", "pretrained_cfg", "progress", "weights", "weights_backbone"})
_TIMM = "timm/"


class ModelSpec(NetworkSection):
    """A network by name or by a function of your own, without weights; ``source.weights`` names those."""

    name: str = Field(default="cifar_resnet20", min_length=1)
    """`cifar_resnet20`, `32`, `44` or `56`; a classifier of torchvision (`resnet18`); or one of timm (`timm/resnet18`,
    also without the prefix if torchvision has no such name)."""

    @field_validator("args")
    @classmethod
    def _no_weights(cls, args: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for name in sorted(args) if info.data.get("own") is None else ():
            if name in _WEIGHTS:
                raise ValueError(
                    f"model.args must not set weights, which source.weights names; received {name}. Set source.weights "
                    f"to a file, or to a name such as torchvision:ResNet18_Weights.DEFAULT."
                )
            if name in {"num_classes", "classes"}:
                raise ValueError(
                    f"model.args must not set the classes, which the data decides; received {name}. Remove it."
                )
        return args


def build(model: ModelSpec, preprocessing: VisionPreprocessing, classes: int) -> nn.Module:
    """Build a network with random weights; one that is built for one size gets that of the images.

    Raises:
        SpecError: the name is unknown, or the arguments do not fit.
        MissingExtraError: torchvision or timm is needed and not installed.
    """
    if (own := model.built(classes)) is not None:
        return own
    library, name = _find(model.name)
    size = preprocessing.images.size
    try:
        if library == "cifar":
            return CifarResNet(CIFAR_DEPTHS[name], classes, **model.args)
        if library == "torchvision":
            return _build_torchvision(name, size, classes, model.args)
        return _build_timm(name, size, classes, model.args)
    except (TypeError, ValueError, AssertionError) as error:
        raise SpecError(
            f"model.args must fit the constructor of {model.name}; received {model.args} for images of {size} "
            f"pixels, which raises: {error}. Change model.args or data.images.size."
        ) from error


def published_settings(model: ModelSpec) -> ImageSettings:
    """Return the image settings of the model's published weights, or the usual ones for ImageNet if there are none.

    Raises:
        SpecError: the name is unknown.
        MissingExtraError: torchvision or timm is needed and not installed.
    """
    if model.own is not None:
        return IMAGENET_IMAGES
    library, name = _find(model.name)
    if library == "cifar":
        return CIFAR_IMAGES
    return _torchvision_settings(name) if library == "torchvision" else _timm_settings(name)


def _find(name: str) -> tuple[str, str]:
    """Return the library that has the model, and the model's name there."""
    if name in CIFAR_DEPTHS:
        return "cifar", name
    classifiers: list[str] = []
    if not name.startswith(_TIMM):
        models = require("torchvision.models", "vision")
        classifiers = models.list_models(module=models)  # without detection, segmentation and video
        if name in classifiers:
            return "torchvision", name
    timm = require("timm", "vision")
    bare = name.removeprefix(_TIMM)
    if timm.is_model(bare):
        if "." in bare:
            _timm_tag(timm, bare)
        return "timm", bare
    prefixed = [_TIMM + other for other in timm.list_models()]
    known = prefixed if name.startswith(_TIMM) else [*CIFAR_DEPTHS, *classifiers, *timm.list_models()]
    raise SpecError(
        f"model.name must be a cifar_resnet, or a classifier of torchvision or timm; received {name!r}."
        f"{hint(name, known, count=3)}"
    )


def _timm_tag(timm: Any, name: str) -> None:
    architecture, _, tag = name.partition(".")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{architecture}.*")]
        raise SpecError(
            f"model.name: {architecture} has no published weights tagged {tag!r}.{hint(tag, tags, count=3)} "
            f"Without a tag, the settings of the default weights apply."
        ) from error


def _build_torchvision(name: str, size: int, classes: int, args: dict[str, Any]) -> nn.Module:
    models = require("torchvision.models", "vision")
    fitting: dict[str, Any] = {}
    if name.startswith("vit_"):
        fitting = {"image_size": size}
    if name in {"googlenet", "inception_v3"}:
        # auxiliary outputs would turn the logits into a tuple in training mode
        fitting = {"aux_logits": False, "init_weights": True}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **(fitting | args))
    return network


def _build_timm(name: str, size: int, classes: int, args: dict[str, Any]) -> nn.Module:
    timm = require("timm", "vision")
    published = timm.get_pretrained_cfg(name)
    built_for_one_size = published is not None and published.fixed_input_size
    fitting = {"img_size": size} if built_for_one_size and published.input_size[-1] != size else {}
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, **(fitting | args))
    return network


def _torchvision_settings(name: str) -> ImageSettings:
    try:
        weights = require("torchvision.models", "vision").get_model_weights(name).DEFAULT
    except (AttributeError, ValueError):  # a model without published weights
        return IMAGENET_IMAGES
    preset = weights.transforms()
    size, resize = preset.crop_size[0], preset.resize_size[0]
    return ImageSettings(
        size=size,
        resize=None if resize == size else resize,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def _timm_settings(name: str) -> ImageSettings:
    published = require("timm", "vision").get_pretrained_cfg(name)
    if published is None:
        return IMAGENET_IMAGES
    resolve = require("timm.data", "vision").resolve_data_config
    config = resolve({}, pretrained_cfg=published.to_dict())
    channels, size = config["input_size"][0], config["input_size"][-1]
    if channels != 3:
        raise SpecError(f"model.name must take RGB images; {name} takes {channels} channels. Choose another model.")
    resize = int(size / config["crop_pct"])
    return ImageSettings(
        size=size,
        resize=resize if resize > size and config["crop_mode"] == "center" else None,
        crop="squash" if config["crop_mode"] == "squash" else "center",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] != "random" else "bilinear",
    )
