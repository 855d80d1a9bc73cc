"""Cost of the encoder alone: masked-dense definition, plain dense network, and the packed network, in one run.

    python benchmarks/encoder.py --json benchmarks/results/encoder.json

One step is forward and backward of the four feature maps. The ways take turns, round by round, so that a
machine whose speed drifts treats them alike; the best round counts. Peak memory is that of one step, above
what the process held before it, each way in a process of its own (CPU), or the allocator's (CUDA).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparkmim.models import Hierarchy, create_encoder, random_visible
from sparkmim.sparse import MaskedDense, PatchLayout, pack, unpack

WAYS = ("masked dense", "plain dense", "sparkmim")


def make_step(
    way: str, model: str, bfloat16: bool, device: str, batch: int, size: int, mask_ratio: float
) -> Callable[[], None]:
    """One forward and backward pass, ready to be called."""
    torch.manual_seed(0)
    hierarchy = Hierarchy(create_encoder(model)).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    patch = hierarchy.stride
    visible = random_visible(batch, (size // patch, size // patch), mask_ratio, torch.Generator().manual_seed(0))
    visible = visible.to(device)
    mask = visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)
    weights = [
        torch.randn(batch, c, size // s, size // s, device=device).to(memory_format=torch.channels_last)
        for c, s in zip(hierarchy.channels, hierarchy.strides, strict=True)
    ]

    def maps() -> list[Tensor]:
        if way == "plain dense":
            return hierarchy(images)
        if way == "masked dense":
            with MaskedDense(visible):
                return [map_ * _at(mask, map_) for map_ in hierarchy(images * mask)]
        return [unpack(map_) for map_ in hierarchy(pack(images, PatchLayout(visible)))]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            found = maps()
        torch.autograd.backward(found, [weight.to(map_.dtype) for weight, map_ in zip(weights, found, strict=True)])
        hierarchy.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _at(mask: Tensor, map_: Tensor) -> Tensor:
    """The pixel mask at a map's resolution."""
    stride = mask.shape[-1] // map_.shape[-1]
    return mask[:, :, ::stride, ::stride]


def time_steps(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Best time of each, in seconds, taking turns."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first is a warm-up
                best[way] = min(best[way], time.perf_counter() - start)
    return best


def peak_memory(step: Callable[[], None], device: str) -> float:
    """Bytes that one step takes at its peak, above what was held before."""
    step()  # allocators, caches and lazy state are not the step's
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet50", "convnext_small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=3, metavar=("MODEL", "PRECISION", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.device, args.batch, args.size, args.mask_ratio)
    if args.memory_of:
        model, precision, way = args.memory_of
        print(peak_memory(make_step(way, model, precision == "bfloat16", *shape), args.device))
        return

    rows = []
    for model in args.models:
        for precision in ("float32", "bfloat16"):
            steps = {way: make_step(way, model, precision == "bfloat16", *shape) for way in WAYS}
            seconds = time_steps(steps, args.rounds)
            steps.clear()
            for way in WAYS:
                command = [sys.executable, *sys.argv, "--memory-of", model, precision, way]
                found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rows.append({
                    "model": model, "precision": precision, "way": way,
                    "seconds": seconds[way], "peak_bytes": float(found.strip().splitlines()[-1]),
                })  # fmt: skip

    table = Table("network", "precision", "way", "step", "of masked dense", "peak memory", "of masked dense")
    for row in rows:
        base = next(r for r in rows if (r["model"], r["precision"]) == (row["model"], row["precision"]))
        row["speedup"] = base["seconds"] / row["seconds"]
        row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]
        table.add_row(
            row["model"], row["precision"], row["way"], f"{row['seconds']:.3f} s", f"{row['speedup']:.2f}× as fast",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB", f"{row['memory_ratio']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if args.json:
        machine = torch.cuda.get_device_name() if args.device == "cuda" else processor()
        report = {
            "command": "python " + " ".join(sys.argv), "machine": machine, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "batch": args.batch, "size": args.size,
            "mask_ratio": args.mask_ratio, "rounds": args.rounds, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
