"""Does it pay that training on CPUs keeps freed memory? `sparkmim.machine.keep_freed_memory`, with and without.

    python benchmarks/allocator.py --json benchmarks/results/allocator.json

Each measurement is a process of its own; the two kinds take turns, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import sparkmim
from measure import provenance
from sparkmim.machine import keep_freed_memory


def measure(model: str, size: int, batch: int, half: bool, keep: bool, steps: int) -> dict[str, float]:
    """Seconds per pretraining step of this process, share of them in the kernel, and peak memory in MiB."""
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    network = sparkmim.SparK(model, image_size=size).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size)
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = network(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    kernel, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {"seconds": seconds / steps, "kernel": kernel / (kernel + user), "peak_mib": after.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS, metavar=("HALF", "KEEP"))
    args = parser.parse_args()
    if args.one:
        half, keep = map(bool, args.one)
        print(json.dumps(measure(args.model, args.image_size, args.batch_size, half, keep, args.steps)))
        return

    rows = []
    for half in (0, 1):
        found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
        for _ in range(args.rounds):
            for keep, runs in found.items():
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--one", str(half), str(keep)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                runs.append(json.loads(done.stdout))
        without, kept = (min(runs, key=lambda run: run["seconds"]) for runs in found.values())
        rows.append({"precision": "bfloat16" if half else "float32", "given_back": without, "kept": kept})

    table = Table("precision", "given back", "kept", "faster by", "peak memory, given back", "kept")
    for row in rows:
        without, kept = row["given_back"], row["kept"]
        cells = [f"{run['seconds']:.2f} s, {run['kernel']:.0%} in the kernel" for run in (without, kept)]
        faster = f"{1 - kept['seconds'] / without['seconds']:.0%}"
        table.add_row(
            str(row["precision"]), *cells, faster, *(f"{run['peak_mib']:,.0f} MiB" for run in (without, kept))
        )
    Console().print(table)
    if args.json:
        known = {"model": args.model, "image_size": args.image_size, "batch_size": args.batch_size}
        args.json.write_text(json.dumps({**provenance(), **known, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
