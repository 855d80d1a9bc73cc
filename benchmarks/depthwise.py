"""Input gradient of depthwise convolutions with a stride: the dense kernel in float32 against bfloat16, on this CPU.

    python benchmarks/depthwise.py --json benchmarks/results/depthwise.json

Why `sparkmim.sparse.windows` computes it in float32. Best of five, 8 maps each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from measure import provenance, take_turns

CASES = ((96, 56, 3), (144, 28, 5), (240, 28, 3), (576, 14, 5))
"""Channels, size of the map, kernel."""


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
        steps = {dtype: input_gradient(*case, dtype) for dtype in (torch.float32, torch.bfloat16)}
        single, half = take_turns(steps, rounds=5).values()
        row = dict(zip(("channels", "size", "kernel"), case, strict=True))
        rows.append({**row, "float32_ms": single * 1e3, "bfloat16_ms": half * 1e3, "ratio": half / single})
        print(f"{case}: float32 {single * 1e3:.2f} ms, bfloat16 {half * 1e3:.2f} ms, {half / single:.0f} times as long")
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
