"""Memory of a pretraining step per image, and the batch that fits a GPU.

    python benchmarks/memory.py --json benchmarks/results/memory.json

The peak of a step is measured at two batch sizes; their difference is what an image takes. Weights, gradients and two
moments of the optimiser come on top. A tenth of the memory is left to the driver, the libraries and fragmentation.
Each case is measured with and without `checkpoint_gradients`. Measured on the CPU: on a GPU, the libraries' workspaces
differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from measure import peak_memory, provenance
from sparkmim.machine import keep_freed_memory
from step import OURS, SAVING, Work

CASES = ("resnet18:256", "resnet50:256", "resnet50:768", "convnext_tiny:256", "convnext_small:768")
BATCHES = (16, 32)
GIGABYTES = (8, 16, 24, 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="NETWORK:DECODER_WIDTH")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, metavar=("CASE", "PRECISION", "WAY", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, precision, way, batch = args.one
        name, _, width = case.partition(":")
        work = Work(way, name, int(width), precision == "bfloat16", "cpu", int(batch), args.size, 0.6)
        keep_freed_memory()
        print(peak_memory(work.step, "cpu"), sum(p.numel() for p in work.model.parameters()))
        return

    rows = []
    for case, precision, way in itertools.product(args.cases, ("float32", "bfloat16"), (OURS, SAVING)):
        peaks = []
        for batch in BATCHES:
            command = [sys.executable, *sys.argv, "--one", case, precision, way, str(batch)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            peaks.append(float(out.split()[0]))
            parameters = int(out.split()[1])
        image = (peaks[1] - peaks[0]) / (BATCHES[1] - BATCHES[0])
        fixed = peaks[0] - image * BATCHES[0] + 3 * 4 * parameters  # gradients are in the peak
        fits = {gb: max(0, int((0.9 * gb * 1e9 - fixed) / image)) for gb in GIGABYTES}
        rows.append({
            "case": case, "precision": precision, "checkpoint_gradients": way == SAVING, "bytes_per_image": image,
            "fixed_bytes": fixed, "fits": fits,
        })  # fmt: skip

    sizes = (f"batch in {gigabytes} GB" for gigabytes in GIGABYTES)
    table = Table("network:width", "precision", "checkpoint_gradients", "per image", "fixed", *sizes)
    for row in rows:
        image, fixed = (f"{row[name] / 2**20:,.0f} MiB" for name in ("bytes_per_image", "fixed_bytes"))
        fits = (f"{fit:,}" for fit in row["fits"].values())
        table.add_row(row["case"], row["precision"], str(row["checkpoint_gradients"]), image, fixed, *fits)
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "size": args.size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
