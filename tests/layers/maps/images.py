"""Networks of transformers for images and videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .text import SMALL, model, tokens

PLAIN = {k: v for k, v in SMALL.items() if k != "vocab_size"}
VIT = PLAIN | {"image_size": 32, "patch_size": 8}


def picture(size: int = 32) -> Callable[[], torch.Tensor]:
    return lambda: torch.zeros(2, 3, size, size)


Built = tuple[nn.Module, Any]


def clip() -> Built:
    import transformers

    c = transformers.CLIPConfig(
        text_config=SMALL | {"max_position_embeddings": 16, "projection_dim": 8},
        vision_config=VIT | {"projection_dim": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(c), {"input_ids": tokens(), "pixel_values": torch.zeros(2, 3, 32, 32)}


def siglip() -> Built:
    import transformers

    c = transformers.SiglipConfig(text_config=SMALL | {"max_position_embeddings": 16}, vision_config=VIT)
    return transformers.SiglipModel(c), {"input_ids": tokens(), "pixel_values": torch.zeros(2, 3, 32, 32)}


def detr(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        backbone = transformers.ResNetConfig(
            depths=[2, 2], hidden_sizes=[8, 16], embedding_size=8, out_features=["stage2"], layer_type="basic"
        )
        c = transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            d_model=8,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=5,
        )
        return getattr(transformers, name)(c), torch.zeros(1, 3, 64, 64)

    return build


HIER = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "transformers.ViTForImageClassification": model("ViTForImageClassification", "ViTConfig", picture(), **VIT),
    "transformers.ViTMAEForPreTraining": model(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        picture(),
        **VIT,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "transformers.DeiTForImageClassificationWithTeacher": model(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", picture(), **VIT
    ),
    "transformers.BeitForImageClassification": model(
        "BeitForImageClassification", "BeitConfig", picture(), **VIT, use_relative_position_bias=True
    ),
    "transformers.Dinov2ForImageClassification": model(
        "Dinov2ForImageClassification", "Dinov2Config", picture(), **PLAIN, image_size=32, patch_size=8
    ),
    "transformers.Dinov2WithRegistersForImageClassification": model(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        picture(),
        **PLAIN,
        image_size=32,
        patch_size=8,
    ),
    "transformers.DINOv3ViTModel": model("DINOv3ViTModel", "DINOv3ViTConfig", picture(), **VIT),
    "transformers.CLIPVisionModelWithProjection": model(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", picture(), **VIT, projection_dim=8
    ),
    "transformers.CLIPModel": clip,
    "transformers.SiglipModel": siglip,
    "transformers.SwinForImageClassification": model("SwinForImageClassification", "SwinConfig", picture(), **HIER),
    "transformers.Swinv2ForImageClassification": model(
        "Swinv2ForImageClassification", "Swinv2Config", picture(), **HIER
    ),
    "transformers.ConvNextForImageClassification": model(
        "ConvNextForImageClassification", "ConvNextConfig", picture(), depths=[1, 2], hidden_sizes=[8, 16], num_stages=2
    ),
    "transformers.ConvNextV2ForImageClassification": model(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        picture(),
        depths=[1, 2],
        hidden_sizes=[8, 16],
        num_stages=2,
    ),
    "transformers.ResNetForImageClassification": model(
        "ResNetForImageClassification", "ResNetConfig", picture(), depths=[1, 2], hidden_sizes=[8, 16], embedding_size=8
    ),
    "transformers.RegNetForImageClassification": model(
        "RegNetForImageClassification",
        "RegNetConfig",
        picture(),
        depths=[1, 2],
        hidden_sizes=[8, 16],
        embedding_size=8,
        groups_width=8,
    ),
    "transformers.MobileNetV2ForImageClassification": model(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", picture()
    ),
    "transformers.MobileViTForImageClassification": model(
        "MobileViTForImageClassification", "MobileViTConfig", picture(64), image_size=64
    ),
    "transformers.SegformerForImageClassification": model(
        "SegformerForImageClassification",
        "SegformerConfig",
        picture(64),
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    ),
    "transformers.SegformerForSemanticSegmentation": model(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        picture(64),
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    ),
    "transformers.PoolFormerForImageClassification": model(
        "PoolFormerForImageClassification", "PoolFormerConfig", picture(64)
    ),
    "transformers.DetrForObjectDetection": detr("DetrForObjectDetection"),
    "transformers.YolosForObjectDetection": model(
        "YolosForObjectDetection",
        "YolosConfig",
        picture(),
        **PLAIN,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
    ),
    "transformers.VideoMAEForVideoClassification": model(
        "VideoMAEForVideoClassification", "VideoMAEConfig", lambda: torch.zeros(1, 4, 3, 32, 32), **VIT, num_frames=4
    ),
    "transformers.TimesformerForVideoClassification": model(
        "TimesformerForVideoClassification",
        "TimesformerConfig",
        lambda: torch.zeros(1, 4, 3, 32, 32),
        **VIT,
        num_frames=4,
    ),
}
