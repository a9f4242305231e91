"""Small residual networks for CIFAR, with the parameter names of published weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CIFAR_DEPTHS", "CifarResNet"]

CIFAR_DEPTHS = {f"cifar_resnet{depth}": depth for depth in (20, 32, 44, 56)}
"""Model name -> number of layers."""


class CifarResNet(nn.Module):
    r"""Residual network of 6n + 2 layers: three stages of n blocks with 16, 32 and 64 channels.

    Shortcuts have no parameters (option A): if a stage halves the image, they take every second pixel and pad the
    channels with zeros on both sides. Layers are named ``conv1``, ``bn1``,
    ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}`` and ``linear``. Images may have any size from 4 x 4.

    Args:
        depth: 20, 32, 44, 56 or another 6n + 2.
        classes: number of outputs.

    Reference: He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
    section 4.2 (arXiv 1512.03385).

    Example:
        >>> import torch
        >>> CifarResNet(20, classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for images (N, 3, H, W)."""
        features = functional.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features (N, outputs, H / stride, W / stride) for (N, inputs, H, W)."""
        features = functional.relu(self.bn1(self.conv1(inputs)))
        features = self.bn2(self.conv2(features))
        shortcut = inputs
        if self.padding or self.stride > 1:
            shortcut = inputs[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(features + shortcut)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = _Block(inputs, outputs, stride=1 if inputs == outputs else 2)
    return nn.Sequential(first, *(_Block(outputs, outputs, stride=1) for _ in range(blocks - 1)))
