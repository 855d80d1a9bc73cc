"""Which settings suit thousands of images on one machine: pretrain with each, compare frozen features.

    python benchmarks/recipe.py --data cifar10/ --json benchmarks/results/recipe.json

`--data` holds `train/<class>/` and `test/<class>/` folders; labels are used for the comparison alone. The
network is the small one of `examples/small_cnn.py`, with 32×32 images in patches of 8. Features are judged by
k-NN, and by ridge regression onto the classes, a linear probe without settings of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sparkmim
from measure import provenance
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.decoding import decode
from sparkmim.data.discovery import find_images
from sparkmim.evaluation import knn_accuracy, pooled_features
from sparkmim.models import Hierarchy, create_encoder

MODEL = str(Path(__file__).parents[1] / "examples" / "small_cnn.py") + ":small_cnn"

CANDIDATES: dict[str, dict[str, Any]] = {
    "lamb 2e-4, the paper's": {"learning_rate": 2e-4, "optimizer": "lamb"},
    "lamb 4e-3": {"learning_rate": 4e-3, "optimizer": "lamb"},
    "lamb 1.6e-2": {"learning_rate": 1.6e-2, "optimizer": "lamb"},
    "adamw 5e-4": {"learning_rate": 5e-4, "optimizer": "adamw"},
    "adamw 2e-3": {"learning_rate": 2e-3, "optimizer": "adamw"},
    "adamw 8e-3": {"learning_rate": 8e-3, "optimizer": "adamw"},
}
"""Each in turn, everything else being the default recipe."""


def load(folder: Path, limit: int | None) -> tuple[list[Tensor], Tensor]:
    """Batches of normalised images, and their labels by class folder."""
    paths = find_images(folder, progress=False)
    if limit:
        paths = paths[:: max(1, len(paths) // limit)]
    classes = sorted({Path(path).parent.name for path in paths})
    transform = eval_transform((32, 32))
    images = torch.stack([transform(decode(path)) for path in paths])
    labels = torch.tensor([classes.index(Path(path).parent.name) for path in paths])
    return list(images.split(256)), labels


def ridge_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Accuracy of a linear classifier of features `[n, C]`, fitted by ridge regression in closed form."""
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    known, asked = (torch.nn.functional.pad((x - mean) / std, (0, 1), value=1.0).double() for x in (bank, queries))
    classes = torch.nn.functional.one_hot(bank_labels).double()
    gram = known.t() @ known + 1e-3 * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    predicted = (asked @ torch.linalg.solve(gram, known.t() @ classes)).argmax(1)
    return (predicted == query_labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--only", nargs="*", help="names of candidates")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings, for all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    extra = {name: json.loads(value) for name, value in (item.split("=") for item in args.set)}

    bank, bank_labels = load(args.data / "train", 5000)
    queries, query_labels = load(args.data / "test", 2000)

    def accuracies(encoder: torch.nn.Module) -> dict[str, float]:
        hierarchy = Hierarchy(encoder)
        found = pooled_features(hierarchy, bank), bank_labels, pooled_features(hierarchy, queries), query_labels
        return {"knn": knn_accuracy(*found), "linear": ridge_accuracy(*found)}

    torch.manual_seed(0)
    rows: list[dict[str, Any]] = [{"name": "random network", **accuracies(create_encoder(MODEL))}]
    for name, settings in CANDIDATES.items():
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = sparkmim.pretrain(
                data=str(args.data / "train"), out=f"{folder}/run", model=MODEL, image_size=32, patch_size=8,
                epochs=args.epochs, batch_size=args.batch_size, warmup_epochs=args.epochs / 10, picture_every=0,
                **{**settings, **extra},
            )  # fmt: skip
        if not result.finished:  # interrupted: so is the comparison
            raise SystemExit(130)
        rows.append({
            "name": name, **settings, **extra, "loss": result.loss, **accuracies(result.model.encoder),
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    table = Table("candidate", "loss", "k-NN", "linear", "time")
    for row in sorted(rows, key=lambda row: -row["linear"]):
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        seconds = f"{row['seconds']:.0f} s" if "seconds" in row else ""
        table.add_row(row["name"], loss, f"{row['knn']:.1%}", f"{row['linear']:.1%}", seconds)
    Console(width=100).print(table)
    if args.json:
        report = {
            **provenance(), "epochs": args.epochs, "batch_size": args.batch_size,
            "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
