"""A small residual network for small images, as an example of a network of your own.

    sparkmim verify --model examples/small_cnn.py:small_cnn --image-size 32
    sparkmim pretrain --model examples/small_cnn.py:small_cnn --image-size 32 --data photos/ --out runs/small

Nothing in it knows of sparkmim: its feature hierarchy (strides 2, 4 and 8) is found by tracing shapes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions with a shortcut; the first may stride."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels_in, H, W]` to `[B, channels, H / stride, W / stride]`."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class SmallCNN(nn.Module):
    """Four stages at strides 1, 2, 4 and 8 times `stride`, and a classifier on the average of the last."""

    def __init__(self, in_chans: int = 3, width: int = 32, classes: int = 10, stride: int = 1) -> None:
        super().__init__()
        self.stage1 = Block(in_chans, width, stride)
        self.stage2 = Block(width, 2 * width, 2)
        self.stage3 = Block(2 * width, 4 * width, 2)
        self.stage4 = Block(4 * width, 8 * width, 2)
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` to `[B, classes]`."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.classifier(x.mean((2, 3)))


def small_cnn(in_chans: int = 3) -> SmallCNN:
    """What `--model examples/small_cnn.py:small_cnn` calls; it is given the number of channels."""
    return SmallCNN(in_chans)


def small_cnn_s16(in_chans: int = 3) -> SmallCNN:
    """The same with a total stride of 16, for images of 64 pixels and more."""
    return SmallCNN(in_chans, stride=2)
