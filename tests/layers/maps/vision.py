"""Networks for images and videos, with the smallest inputs that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]

TORCHVISION = {
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 80,
    "maxvit_t": 224,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_0": 32,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 32,
    "vit_b_16": 224,
}
TIMM = {
    "beit_base_patch16_224": 224,
    "cait_xxs24_224": 224,
    "caformer_s18": 64,
    "coatnet_0_rw_224": 224,
    "convnextv2_atto": 32,
    "davit_tiny": 64,
    "deit_tiny_distilled_patch16_224": 224,
    "densenet121": 32,
    "dpn68": 64,
    "efficientnet_lite0": 32,
    "eva02_tiny_patch14_224": 224,
    "fastvit_t8": 64,
    "hiera_tiny_224": 224,
    "hrnet_w18_small": 64,
    "inception_next_tiny": 64,
    "inception_v4": 128,
    "mambaout_femto": 64,
    "maxvit_rmlp_pico_rw_256": 256,
    "mixer_s32_224": 224,
    "mobilenetv4_conv_small": 64,
    "mvitv2_tiny": 224,
    "poolformer_s12": 64,
    "regnety_002": 32,
    "repvgg_a0": 64,
    "resnetv2_50": 64,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "vit_base_patch16_siglip_224": 224,
    "vit_small_patch14_dinov2": 518,
    "vit_small_patch14_reg4_dinov2": 518,
    "vit_tiny_patch16_224": 224,
}


def torchvision_model(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = TORCHVISION[name]
        return torchvision.models.get_model(name, weights=None, **quick), torch.zeros(2, 3, size, size)

    return build


def timm_model(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return timm.create_model(name, num_classes=5), torch.zeros(2, 3, TIMM[name], TIMM[name])

    return build


def other(name: str, *shape: int, **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **settings), torch.zeros(shape)

    return build


def headless() -> Built:
    import timm

    return timm.create_model("vit_tiny_patch16_224", num_classes=0), torch.zeros(2, 3, 224, 224)


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    **{f"torchvision.{name}": torchvision_model(name) for name in TORCHVISION},
    "torchvision.r3d_18": other("r3d_18", 1, 3, 8, 32, 32),
    "torchvision.r2plus1d_18": other("r2plus1d_18", 1, 3, 8, 32, 32),
    "torchvision.swin3d_t": other("swin3d_t", 1, 3, 8, 32, 32),
    "torchvision.mvit_v1_b": other("mvit_v1_b", 1, 3, 16, 224, 224),
    "torchvision.lraspp_mobilenet_v3_large": other("lraspp_mobilenet_v3_large", 2, 3, 64, 64, weights_backbone=None),
    "torchvision.deeplabv3_mobilenet_v3_large": other(
        "deeplabv3_mobilenet_v3_large", 2, 3, 64, 64, weights_backbone=None
    ),
    **{f"timm.{name}": timm_model(name) for name in TIMM},
    "timm.vit_tiny_patch16_224 without a head": headless,
}
