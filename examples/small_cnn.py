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
    """A strided convolution, three stages at 1, 2 and 4 times its stride, and a classifier of the last on average."""

    def __init__(self, in_chans: int = 3, width: int = 64, classes: int = 10, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width // 2, 2 * stride - 1, stride, padding=stride - 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
        )
        self.stage1 = Block(width // 2, width, 1)
        self.stage2 = Block(width, 2 * width, 2)
        self.stage3 = Block(2 * width, 4 * width, 2)
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` to `[B, classes]`."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def small_cnn(in_chans: int = 3) -> SmallCNN:
    """What `--model examples/small_cnn.py:small_cnn` calls; it is given the number of channels."""
    return SmallCNN(in_chans)


def small_cnn_s16(in_chans: int = 3) -> SmallCNN:
    """The same with a total stride of 16, for images of 64 pixels and more."""
    return SmallCNN(in_chans, stride=4)
