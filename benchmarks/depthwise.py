"""Input gradient of depthwise convolutions with a stride: the dense kernel in float32 against bfloat16, on this CPU.

    python benchmarks/depthwise.py --json benchmarks/results/depthwise.json

Why `sparkmim.sparse.windows` computes it in float32. Best of five, 8 maps each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from measure import processor

CASES = ((96, 56, 3), (144, 28, 5), (240, 28, 3), (576, 14, 5))
"""Channels, size of the map, kernel."""


def best(function: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the fastest call, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return min(times)


def input_gradient(channels: int, size: int, kernel: int, dtype: torch.dtype) -> Callable[[], object]:
    """The gradient of a convolution of stride 2 to its input, ready to be called."""
    images = torch.randn(8, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype)
    grad = torch.randn_like(torch.nn.functional.conv2d(images, weight, None, 2, kernel // 2, 1, channels))
    return lambda: torch.ops.aten.convolution_backward(
        grad, images, weight, None, (2, 2), (kernel // 2,) * 2, (1, 1), False, (0, 0), channels, (True, False, False)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for case in CASES:
        single, half = (best(input_gradient(*case, dtype)) for dtype in (torch.float32, torch.bfloat16))
        row = dict(zip(("channels", "size", "kernel"), case, strict=True))
        rows.append({**row, "float32_ms": single * 1e3, "bfloat16_ms": half * 1e3, "ratio": half / single})
        print(f"{case}: float32 {single * 1e3:.2f} ms, bfloat16 {half * 1e3:.2f} ms, {half / single:.0f} times as long")
    if args.json:
        report = {
            "command": "python " + " ".join(sys.argv), "machine": processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
