"""Does pretraining pay for detection? Few annotated pictures of shapes: from pretrained weights and from scratch.

    python benchmarks/detection_transfer.py --json benchmarks/results/detection_transfer.json

A ResNet-18 is pretrained on pictures without annotations. Then, for each start, a learning rate is chosen on pictures
that are neither trained nor tested on, one run per candidate; the chosen one is run with several seeds, each with other
annotated pictures, and scored on the test pictures. Both starts have the same candidates, steps and augmentation, and
no layer decay. Pictures are those of `shapes.py`; the detector is Faster R-CNN, whose steps are quicker than those of
Mask R-CNN.

With `--runs`, what an interrupted benchmark has done is kept there, and the same command goes on with it; other
settings need another folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import sparkmim
from measure import provenance
from shapes import SIZE, write_part

MODEL = "resnet18"
RATES = (1e-3, 2e-3, 4e-3)
"""Candidates, per 16 images."""

BATCH = 4
UNLABELLED, TUNING, TEST = 2000, 60, 100
"""Pictures to pretrain on, to choose a rate on, and to score on."""

_SEEDS = {"unlabelled": 0, "tuning": 1, "test": 2}
_FIRST_TRAINING_SEED = 100


def part(folder: Path, name: str, count: int, seed: int) -> dict[str, Path]:
    """The annotation file and the images of a part, which is drawn if it is not there."""
    file = folder / "annotations" / f"instances_{name}.json"
    if not file.is_file():
        write_part(folder, name, count, seed)
    return {"annotations": file, "images": folder / name}


def complete(run: Path, train: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Trains what is missing in a run folder: all, the rest after an interruption, or nothing."""
    resume = (run / "checkpoints" / "last.ckpt").is_file()
    if not train(out=run, **({"resume": True} if resume else settings)).finished:
        raise SystemExit(130)


def pretrain(run: Path, images: Path, epochs: float) -> None:
    settings = {
        "data": images, "model": MODEL, "image_size": SIZE, "decoder_width": 256, "batch_size": 64, "epochs": epochs,
        "warmup_epochs": epochs / 10, "workers": 0, "picture_every": 0,
    }  # fmt: skip
    complete(run, sparkmim.pretrain, settings)


def score(
    run: Path, start: dict[str, Any], train: dict[str, Path], judged: dict[str, Path], rate: float, steps: int,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """COCO's figures of a detector, in percent."""
    settings = {
        **start, **train, "val_annotations": judged["annotations"], "val_images": judged["images"], "masks": False,
        "iterations": steps, "batch_size": BATCH, "learning_rate": rate, "layer_decay": 1.0,
        "warmup_iterations": steps // 10, "short_sides": [SIZE], "eval_short_side": SIZE, "long_side": 2 * SIZE,
        "regions": 16, "eval_every": 10_000, "workers": 0, "seed": seed,
    }  # fmt: skip
    complete(run, sparkmim.detect, settings)
    figures = json.loads((run / "metrics.json").read_text())
    return {name: 100 * figures[f"bbox/{name}"] for name in ("AP", "AP50")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder that keeps pictures and runs; a temporary one otherwise")
    parser.add_argument("--annotated", type=int, default=200, help="pictures to train a detector on")
    parser.add_argument("--steps", type=int, default=400, help="of a detector's training")
    parser.add_argument("--epochs", type=float, default=30, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.getLogger("sparkmim").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning)

    folder = args.runs or Path(tempfile.mkdtemp())
    counts = {"unlabelled": UNLABELLED, "tuning": TUNING, "test": TEST}
    parts = {name: part(folder, name, count, _SEEDS[name]) for name, count in counts.items()}
    training = [
        part(folder, f"train{seed}", args.annotated, _FIRST_TRAINING_SEED + seed) for seed in range(args.seeds + 1)
    ]
    pretrain(folder / "pretrained", parts["unlabelled"]["images"], args.epochs)

    rows: list[dict[str, Any]] = []
    starts = {"scratch": {"model": MODEL, "weights": "none"}, "pretrained": {"weights": folder / "pretrained"}}
    for name, start in starts.items():
        tried = []
        for rate in RATES:
            run = folder / f"{name}-tuning-{rate:g}"
            tried.append(
                {"learning_rate": rate, **score(run, start, training[0], parts["tuning"], rate, args.steps, 0)}
            )
            print(json.dumps({"start": name, "tuning": tried[-1]}), flush=True)
        best = max(tried, key=lambda row: row["AP"])
        scores = []
        for seed in range(1, args.seeds + 1):
            run = folder / f"{name}-test-{seed}"
            rate = best["learning_rate"]
            scores.append(score(run, start, training[seed], parts["test"], rate, args.steps, seed))
            print(json.dumps({"start": name, "test": scores[-1]}), flush=True)
        rows.append({"start": name, "tried": tried, "chosen": best, "scores": scores})

    table = Table("start", "learning rate", "AP", "AP50", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        for figure in ("AP", "AP50"):
            values = [one[figure] for one in row["scores"]]
            row[figure] = {"mean": statistics.mean(values), "spread": statistics.stdev(values) if values[1:] else 0.0}
        cells = (f"{row[figure]['mean']:.1f} ± {row[figure]['spread']:.1f}" for figure in ("AP", "AP50"))
        table.add_row(row["start"], f"{row['chosen']['learning_rate']:g}", *cells)
    Console(width=100).print(table)
    if args.json:
        report = {
            **provenance(), "annotated": args.annotated, "steps": args.steps,
            "pretraining_epochs": args.epochs, "pictures": counts,
            "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
