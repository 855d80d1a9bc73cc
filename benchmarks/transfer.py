"""Does pretraining pay? Few labels: fine-tuned from pretrained weights, from scratch, both tuned; and frozen.

    python benchmarks/transfer.py --data cifar10-mini/ --json benchmarks/results/transfer.json --plot docs/transfer.png

`--data` holds `train/<class>/` and `test/<class>/` folders. One network is pretrained on all training images without
labels. Then, for each number of labels per class and each kind of start, a learning rate is chosen on images that are
neither trained nor tested on, one run per candidate; the chosen one is run with several seeds, each with other labelled
images, and scored on the test images. Both starts have the same candidates, steps and augmentation, and no layer decay.

The pretraining run is kept in `--runs`, and taken from there when it is complete.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

import sparkmim
from measure import provenance
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.decoding import decode
from sparkmim.data.labelled import Labelled, open_labelled
from sparkmim.evaluation import pooled_features
from sparkmim.evaluation.linear import Standardiser, fit_logistic
from sparkmim.interop.weights import open_weights
from sparkmim.models import Hierarchy, create_encoder
from sparkmim.runs.history import read_history

MODEL = str(Path(__file__).parents[1] / "examples" / "small_cnn.py") + ":small_cnn"
SIZE = 32
STEPS = {10: 200, 50: 400, 200: 600}
"""Optimiser steps of a fine-tuning run, by labels per class."""

RATES = (1e-3, 3e-3, 1e-2)
"""Candidates, per 256 images."""

PER_CLASS_FOR_TUNING = 50


class InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded images with their labels."""

    def __init__(self, images: list[Tensor], labels: Tensor, classes: list[str]) -> None:
        self.images, self.targets, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.images[place], int(self.targets[place])

    def take(self, chosen: list[int]) -> InMemory:
        return InMemory([self.images[i] for i in chosen], self.targets[chosen], self.classes)


def in_memory(images: Labelled) -> InMemory:
    return InMemory([decode(path) for path in images.items], images.labels, images.classes)


def places_of(labels: Tensor, per_class: int, seed: int, among: Tensor | None = None) -> list[int]:
    """Places of so many images of each class, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if among is not None:
        order = order[torch.isin(order, among)]
    return [int(i) for label in range(int(labels.max()) + 1) for i in order[labels[order] == label][:per_class]]


def tune_and_run(
    start: str, train: InMemory, pool: Tensor, tuning: InMemory, test: InMemory, per_class: int, seeds: int,
    extra: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Chooses settings on the tuning images, then scores `seeds` runs on the test images."""
    batch = min(64, per_class * len(train.classes))

    def run(subset: InMemory, judged: InMemory, rate: float, seed: int) -> float:
        epochs = STEPS.get(per_class, 600) / (len(subset) // batch)
        with tempfile.TemporaryDirectory() as folder:
            result = sparkmim.finetune(
                data=subset, val_data=judged, out=f"{folder}/run", weights=start, model=MODEL, image_size=SIZE,
                epochs=epochs, warmup_epochs=epochs / 10, eval_every=epochs, batch_size=batch, learning_rate=rate,
                layer_decay=1.0, eval_crop=1.0, workers=0, seed=seed, **extra,
            )  # fmt: skip
        if not result.finished:
            raise SystemExit(130)
        return result.top1["model"]

    tried = []
    subset = train.take(places_of(train.targets, per_class, 0, pool))
    for rate in RATES:
        tried.append({"learning_rate": rate, "tuning": run(subset, tuning, rate, 0)})
        print(json.dumps({"start": Path(start).name, "per_class": per_class, **tried[-1]}), flush=True)
    best = max(tried, key=lambda row: row["tuning"])
    accuracies = []
    for seed in range(1, seeds + 1):
        subset = train.take(places_of(train.targets, per_class, seed, pool))
        accuracies.append(run(subset, test, best["learning_rate"], seed))
        print(json.dumps({"start": Path(start).name, "per_class": per_class, "test": accuracies[-1]}), flush=True)
    return {"tried": tried, "chosen": best, "accuracies": accuracies}


def probe(encoder: torch.nn.Module, train: InMemory, pool: Tensor, test: InMemory, per_class: int, seeds: int) -> Any:
    """Accuracies of a linear classifier of frozen features, on the same labelled images."""
    transform = eval_transform((SIZE, SIZE), crop=1.0)
    hierarchy = Hierarchy(encoder)

    def features(images: list[Tensor]) -> Tensor:
        return pooled_features(hierarchy, torch.stack([transform(image) for image in images]).split(256))

    queries = features(test.images)
    accuracies = []
    for seed in range(1, seeds + 1):
        subset = train.take(places_of(train.targets, per_class, seed, pool))
        bank = features(subset.images)
        standard = Standardiser.of(bank)
        weight, bias = fit_logistic(standard(bank), subset.targets, len(train.classes), 1 / len(bank))
        predicted = (standard(queries) @ weight.t() + bias).argmax(1)
        accuracies.append((predicted == test.targets).float().mean().item())
    return {"accuracies": accuracies}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy over labels per class: mean of the seeds, and each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "pretrained": ("#1f6f8b", "o-", "fine-tuned, pretrained"),
        "scratch": ("#c8553d", "s-", "fine-tuned, from scratch"),
        "probe": ("#1f6f8b", "o:", "frozen, pretrained"),
        "random probe": ("#c8553d", "s:", "frozen, random"),
    }
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, (colour, style, label) in styles.items():
        own = [row for row in rows if row["start"] == name]
        if own:
            counts = [row["per_class"] for row in own]
            axes.plot(counts, [100 * row["mean"] for row in own], style, color=colour, label=label)
            for row in own:
                scores = [100 * a for a in row["accuracies"]]
                axes.plot([row["per_class"]] * len(scores), scores, ".", color=colour, alpha=0.35)
    axes.set_xscale("log")
    counts = sorted({row["per_class"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="labelled images per class", ylabel="test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, help="folder that keeps the pretraining run; a temporary one otherwise")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 200], help="per class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=20, help="of pretraining")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of fine-tuning")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    extra = {name: json.loads(value) for name, value in (item.split("=") for item in args.set)}
    logging.getLogger("sparkmim").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning)

    folder = Path(args.runs or tempfile.mkdtemp())
    run = folder / "pretrained"
    if not (run / "weights" / "spark.safetensors").is_file():
        sparkmim.pretrain(
            data=str(args.data / "train"), out=run, model=MODEL, image_size=SIZE, patch_size=8, decoder_width=64,
            epochs=args.epochs, warmup_epochs=args.epochs / 10, picture_every=0,
        )  # fmt: skip
    first, *_, last = read_history(run / "history.jsonl")
    pretraining = (last.time - first.time).total_seconds()

    begun = time.perf_counter()
    found, other = open_labelled(args.data)
    assert other is not None, "no test folder"
    train, test = in_memory(found), in_memory(other)
    every = torch.arange(len(train))
    apart = torch.tensor(places_of(train.targets, PER_CLASS_FOR_TUNING, 12345))
    pool, tuning = every[~torch.isin(every, apart)], train.take(apart.tolist())

    torch.manual_seed(0)
    random = create_encoder(MODEL)
    pretrained = open_weights(run).encoder()
    rows: list[dict[str, Any]] = []
    for per_class in args.labels:
        for name, start in (("scratch", "none"), ("pretrained", str(run))):
            rows.append({"start": name, "per_class": per_class}
                        | tune_and_run(start, train, pool, tuning, test, per_class, args.seeds, extra))  # fmt: skip
        for name, encoder in (("random probe", random), ("probe", pretrained)):
            rows.append({"start": name, "per_class": per_class}
                        | probe(encoder, train, pool, test, per_class, args.seeds))  # fmt: skip
    for row in rows:
        row["mean"] = statistics.mean(row["accuracies"])
        row["spread"] = statistics.stdev(row["accuracies"]) if args.seeds > 1 else 0.0

    table = Table("labels per class", *("scratch", "pretrained", "random probe", "probe"))
    for per_class in args.labels:
        own = [row for row in rows if row["per_class"] == per_class]
        cells = {row["start"]: f"{row['mean']:.1%} ± {row['spread']:.1%}" for row in own}
        table.add_row(str(per_class), *(cells[name] for name in ("scratch", "pretrained", "random probe", "probe")))
    Console(width=100).print(table)
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        report = {
            **provenance(), "pretraining_epochs": args.epochs, "steps": STEPS,
            "pretraining_seconds": pretraining, "seconds": pretraining + time.perf_counter() - begun,
            "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
