"""Which settings of pretraining suit small data: each changed alone from the default recipe, in the same minutes.

    python benchmarks/recipe.py --data cifar10-mini imagenette-64 --runs recipe-runs \\
        --json benchmarks/results/recipe.json

Data, network and scores are those of `fewshot.py`; all scores are of choosing images. What is done is kept in `--runs`,
and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewshot import STEPS, Jobs, count_steps, finetune, frozen, pretrain
from measure import provenance
from sparkmim.files import replacing

SHOTS, RATE, FIT_HEAD = 50, 3e-3, False
"""Labels per class of fine-tuning, its learning rate per 256 images, and whether the head is fitted first."""

CANDIDATES: dict[str, dict[str, Any]] = {
    "default": {},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 4e-3": {"learning_rate": 4e-3},
    "no weight decay": {"weight_decay": 0.0, "weight_decay_end": 0.0},
    "batches of 64": {"batch_size": 64},
    "mask 0.5": {"mask_ratio": 0.5},
    "mask 0.75": {"mask_ratio": 0.75},
    "decoder 128": {"decoder_width": 128},
    "decoder 64": {"decoder_width": 64},
    "decoder 32": {"decoder_width": 32},
    "crops from 0.35": {"crop_scale": 0.35},
    "contrast": {"recipe": "contrast", "decoder_width": 64},
    "contrast, mask 0.25": {"recipe": "contrast", "decoder_width": 64, "mask_ratio": 0.25},
    "contrast, rate 2e-3": {"recipe": "contrast", "decoder_width": 64, "learning_rate": 2e-3},
    "contrast, mask 0.25, rate 2e-3": {
        "recipe": "contrast", "decoder_width": 64, "mask_ratio": 0.25, "learning_rate": 2e-3
    },
}  # fmt: skip
"""Settings that differ from the default recipe's."""


def compare(folder: Path, jobs: Jobs, names: list[str], minutes: float, seeds: int) -> dict[str, Any]:
    """Returns the scores of the random network and of each candidate."""
    every = range(1, seeds + 1)
    weights = {name: jobs.folder / f"{name}.safetensors" for name in names}
    per_minute = count_steps(jobs, folder, {name: ("sparkmim", CANDIDATES[name]) for name in names})
    pretrained = jobs.run(
        {
            f"pretrain {name}": (
                pretrain,
                (folder, weights[name], "sparkmim", CANDIDATES[name], None, round(minutes * per_minute[name]), 0),
            )
            for name in names
        }
    )
    starts: dict[str, Path | None] = {"random network": None, **weights}
    probed = jobs.run(
        {f"frozen {name}": (frozen, (folder, file, [SHOTS], 0, "choosing")) for name, file in starts.items()}
    )
    tuned = jobs.run({
        f"finetune {name} {seed}": (finetune, (folder, file, SHOTS, STEPS[SHOTS], RATE, FIT_HEAD, seed, "choosing"))
        for name, file in starts.items() for seed in every
    })  # fmt: skip
    return {
        "data": folder.name,
        "rows": [
            {
                "name": name, "settings": CANDIDATES.get(name), **pretrained.get(f"pretrain {name}", {}),
                **probed[f"frozen {name}"],
                "fine-tuned": [tuned[f"finetune {name} {seed}"]["accuracy"] for seed in every],
            }
            for name in starts
        ],
    }  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("candidate", "steps", "k-NN", "linear", f"linear, {SHOTS} labels", f"fine-tuned, {SHOTS} labels")
    table.title = result["data"]
    for row in result["rows"]:
        scores = [row["k-NN"], row["linear"], statistics.mean(row[f"linear {SHOTS}"])]
        table.add_row(
            row["name"], str(row.get("steps", "")), *(f"{score:.1%}" for score in scores),
            f"{statistics.mean(row['fine-tuned']):.1%}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--minutes", type=float, default=4, help="of each pretraining")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning, each with other labelled images")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for folder in args.data:
        with Jobs(args.runs / folder.name, args.workers, {"minutes": args.minutes}) as jobs:
            results.append(compare(folder, jobs, args.only, args.minutes, args.seeds))
    console = Console(width=120)
    for result in results:
        show(result, console)
    if args.json:
        report = {**provenance(), "minutes": args.minutes, "results": results}
        with replacing(args.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
