"""Image classification: two domains of labelled images, models by name, and preprocessing.

Importing this package does not import torchvision, timm, Pillow or scikit-learn; functions import them when needed.
"""

from conservtl.tasks.vision.augment import VisionAugment
from conservtl.tasks.vision.cifar_resnet import CifarResNet
from conservtl.tasks.vision.corruptions import Corruption, corrupt
from conservtl.tasks.vision.datasets import DataSpec, DigitsData, ImageFolderData, TorchvisionData
from conservtl.tasks.vision.image_settings import ImageSettings
from conservtl.tasks.vision.loading import load, preprocessing_for
from conservtl.tasks.vision.models import ModelSpec, build, published_settings
from conservtl.tasks.vision.preprocessing import VisionPreprocessing
from conservtl.tasks.vision.task import Vision

__all__ = [
    "CifarResNet",
    "Corruption",
    "DataSpec",
    "DigitsData",
    "ImageFolderData",
    "ImageSettings",
    "ModelSpec",
    "TorchvisionData",
    "Vision",
    "VisionAugment",
    "VisionPreprocessing",
    "build",
    "corrupt",
    "load",
    "preprocessing_for",
    "published_settings",
]
