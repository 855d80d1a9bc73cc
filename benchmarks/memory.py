"""Memory of a pretraining step per image, and the batch that fits a GPU.

    python benchmarks/memory.py --json benchmarks/results/memory.json

The peak of a step is measured at two batch sizes; their difference is what an image takes. Weights, gradients and two
moments of the optimiser come on top. A tenth of the memory is left to the driver, the libraries and fragmentation.
Measured on the CPU: on a GPU, the libraries' workspaces differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from measure import peak_memory, provenance
from sparkmim.machine import keep_freed_memory
from step import OURS, Work

CASES = ("resnet18:256", "resnet50:256", "resnet50:768", "convnext_tiny:256", "convnext_small:768")
BATCHES = (4, 8)
GIGABYTES = (8, 16, 24, 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="NETWORK:DECODER_WIDTH")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("CASE", "PRECISION", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case, precision, batch = args.one
        name, _, width = case.partition(":")
        work = Work(OURS, name, int(width), precision == "bfloat16", "cpu", int(batch), args.size, 0.6)
        keep_freed_memory()
        print(peak_memory(work.step, "cpu"), sum(p.numel() for p in work.model.parameters()))
        return

    rows = []
    for case in args.cases:
        for precision in ("float32", "bfloat16"):
            peaks = []
            for batch in BATCHES:
                command = [sys.executable, *sys.argv, "--one", case, precision, str(batch)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
                peaks.append(float(out.split()[0]))
                parameters = int(out.split()[1])
            image = (peaks[1] - peaks[0]) / (BATCHES[1] - BATCHES[0])
            fixed = peaks[0] - image * BATCHES[0] + 3 * 4 * parameters  # gradients are in the peak
            fits = {gb: max(0, int((0.9 * gb * 1e9 - fixed) / image)) for gb in GIGABYTES}
            rows.append({
                "case": case, "precision": precision, "bytes_per_image": image, "fixed_bytes": fixed, "fits": fits,
            })  # fmt: skip

    table = Table("network:width", "precision", "per image", "fixed", *(f"batch in {gb} GB" for gb in GIGABYTES))
    for row in rows:
        table.add_row(
            row["case"], row["precision"], f"{row['bytes_per_image'] / 2**20:,.0f} MiB",
            f"{row['fixed_bytes'] / 2**20:,.0f} MiB", *(f"{fit:,}" for fit in row["fits"].values()),
        )  # fmt: skip
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "size": args.size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
