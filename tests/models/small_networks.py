"""Networks as a user would write them, small."""

from torch import Tensor, nn


class PlainCNN(nn.Module):
    """No method but `forward`; ends in a classifier."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        out: Tensor = self.head(self.pool(x).flatten(1))
        return out


def volume_network() -> nn.Module:
    """A 3-D network of total stride 4."""
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True),
        nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace=True),
    )  # fmt: skip


def signal_network() -> nn.Module:
    """A 1-D network of total stride 8."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 4), (4, 8), (8, 16)):
        layers += [nn.Conv1d(inputs, outputs, 5, stride=2, padding=2), nn.GroupNorm(2, outputs), nn.GELU()]
    return nn.Sequential(*layers)
