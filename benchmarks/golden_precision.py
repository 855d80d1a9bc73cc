"""How exact are the golden numbers of ResNet-50, and ours? Both against the same sums in 80-bit arithmetic.

    python benchmarks/golden_precision.py

That case sees 2 samples of 64² pixels: the batch norms of its last stages average over a few positions that are
nearly alike, and magnify rounding. The script runs the masked network by its definition in NumPy's longdouble
(64 bits of mantissa, on x86), and compares the running statistics after one forward pass. Takes half a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "models")]

from golden_case import CASES, build, golden_pass, images_of, mask_of, one_pass  # noqa: E402

Map = np.ndarray
"""A dense map `[B, C, H, W]` in extended precision."""


def extended(x: Tensor) -> Map:
    return x.detach().numpy().astype(np.longdouble)


class ExactResNet:
    """timm's ResNet with bottlenecks, masked everywhere, in training mode; collects running statistics."""

    def __init__(self, network: nn.Module, visible: np.ndarray) -> None:
        self.network, self.visible = network, visible
        self.names = {module: name for name, module in network.named_modules()}
        self.statistics: dict[str, Map] = {}

    def mask(self, x: Map) -> np.ndarray:
        """bool `[B, H, W]`."""
        block = x.shape[2] // self.visible.shape[1]
        return self.visible.repeat(block, 1).repeat(block, 2)

    def conv(self, x: Map, module: nn.Conv2d) -> Map:
        (kernel, _), (stride, _), (pad, _) = module.kernel_size, module.stride, module.padding
        x = np.pad(x * self.mask(x)[:, None], ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        columns = self.windows(x, kernel, stride)  # [taps, B, C, H, W]
        matrix = columns.transpose(1, 3, 4, 2, 0).reshape(-1, x.shape[1] * kernel**2)
        out = matrix @ extended(module.weight).reshape(module.out_channels, -1).T
        return out.reshape(x.shape[0], *columns.shape[3:], -1).transpose(0, 3, 1, 2)

    @staticmethod
    def windows(x: Map, kernel: int, stride: int) -> Map:
        """What each tap sees: `[taps, B, C, H, W]`."""
        out = (x.shape[2] - kernel) // stride + 1
        reach = stride * (out - 1) + 1
        taps = [(i, j) for i in range(kernel) for j in range(kernel)]
        return np.stack([x[:, :, i : i + reach : stride, j : j + reach : stride] for i, j in taps])

    def norm(self, x: Map, module: nn.BatchNorm2d) -> Map:
        mask = self.mask(x)
        seen = x.transpose(0, 2, 3, 1)[mask]  # [positions, C]
        mean, var = seen.mean(0), seen.var(0)
        momentum, unbiased = np.longdouble(module.momentum), var * len(seen) / (len(seen) - 1)
        for name, old, new in (("mean", module.running_mean, mean), ("var", module.running_var, unbiased)):
            self.statistics[f"{self.names[module]}.running_{name}"] = (1 - momentum) * extended(old) + momentum * new
        out = np.zeros_like(x.transpose(0, 2, 3, 1))
        out[mask] = (seen - mean) / np.sqrt(var + module.eps) * extended(module.weight) + extended(module.bias)
        return out.transpose(0, 3, 1, 2)

    def run(self, x: Map) -> None:
        net = self.network
        x = np.maximum(self.norm(self.conv(x, net.conv1), net.bn1), 0)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        x = self.windows(padded, 3, 2).max(0)
        for block in (block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer):
            out = np.maximum(self.norm(self.conv(x, block.conv1), block.bn1), 0)
            out = np.maximum(self.norm(self.conv(out, block.conv2), block.bn2), 0)
            out = self.norm(self.conv(out, block.conv3), block.bn3)
            if block.downsample is not None:
                x = self.norm(self.conv(x, block.downsample[0]), block.downsample[1])
            x = np.maximum(out + x, 0)


def main() -> None:
    case = CASES["resnet50"]
    exact = ExactResNet(build(case).encoder, mask_of(case).numpy())
    exact.run(extended(images_of(case)))
    golden, ours = golden_pass(case), one_pass(case, torch.float64)
    rows = []
    for name, values in exact.statistics.items():
        for kind, value in (("sum", values.sum()), ("norm", np.sqrt((values**2).sum()))):
            key = f"buffer encoder.{name} {kind}"
            rows.append((key, *(float(abs(numbers[key] - value) / abs(value)) for numbers in (golden, ours))))
    table = Table(f"worst of {len(rows)} running statistics", "golden number is off by", "ours is off by")
    for key, golden_error, our_error in sorted(rows, key=lambda row: -max(row[1:]))[:5]:
        table.add_row(key.removeprefix("buffer encoder."), f"{golden_error:.1e}", f"{our_error:.1e}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
