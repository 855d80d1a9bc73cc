"""The main job on real data that needs no download: scikit-learn's 1,797 handwritten digits.

    python examples/demo.py --out demo

Writes the digits as PNG files, pretrains a small network on those for training without their labels, and asks
a nearest-neighbour classifier how good its frozen features are on the others, beside those of the same network
at random. The run's report shows all of it; a picture shows the loss and what the network rebuilds of the others.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import sparkmim
from sparkmim.runs.history import read_history

MODEL = str(Path(__file__).with_name("small_cnn.py")) + ":small_cnn"
SIZE = 32
TRAIN = 1300


def write_digits(folder: Path) -> Path:
    """8×8 digits, enlarged to 32×32, as PNG files in train/ and test/; and a table of path, label and split."""
    digits = load_digits()
    rows = []
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):  # 0 … 16
        split = "train" if index < TRAIN else "test"
        path = folder / split / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9375).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
        rows.append((path.relative_to(folder), label, split))
    table = folder / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return table


def draw(run: Path, images: list[Path], file: Path) -> None:
    """The loss over the steps, and what the network rebuilds of a few images."""
    losses = [event for event in read_history(run / "history.jsonl") if event.kind == "step"]
    shown = sparkmim.reconstruct(weights=run, images=[str(path) for path in images])

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5.2), width_ratios=[1.7, 1], layout="constrained")
    left.plot([event.step for event in losses], [event.fields["loss"] for event in losses], color="#1f6f8b")
    left.set(xlabel="step", ylabel="loss on masked patches", title="Pretraining")
    left.spines[["top", "right"]].set_visible(False)
    left.grid(alpha=0.3)
    columns = [shown.inputs, shown.masked[:, 0], shown.pasted[:, 0]]  # [n, H, W, 3] each
    framed = np.pad(np.stack(columns, 1), ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1)
    right.imshow(np.vstack([np.hstack(row) for row in framed]), interpolation="nearest")
    right.set_title("input · visible · rebuilt")
    right.axis("off")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--epochs", type=float, default=30)
    args = parser.parse_args()
    start = time.perf_counter()
    if args.out.exists():  # the demo's own folder: made anew each time
        shutil.rmtree(args.out)
    labels = write_digits(args.out / "digits")

    run = args.out / "run"
    result = sparkmim.pretrain(
        data=str(labels.parent / "train"), out=run, model=MODEL, channels=1, image_size=SIZE, patch_size=8,
        decoder_width=64, batch_size=64, epochs=args.epochs, warmup_epochs=2, flip=0.0, mean=[0.3], std=[0.37],
        log_every=5,
    )  # fmt: skip
    if not result.finished:
        raise SystemExit(130)
    found = sparkmim.evaluate(data=str(labels), weights=run, protocol="knn", crop=0.0)
    picture = args.out / "demo.png"
    draw(run, sorted((labels.parent / "test").iterdir())[:6], picture)

    print("\nnearest-neighbour accuracy on unseen digits, features frozen:")
    for name, network in (("random", "random"), ("pretrained", "weights")):
        print(f"  {name:<12} {found.deepest(network).accuracy:6.1%}")
    print(f"took {time.perf_counter() - start:.0f} s")
    print(f"run folder: {run} (weights/encoder.safetensors is the network)")
    print(f"picture: {picture}")
    print(f"report: {run / 'report.html'}")


if __name__ == "__main__":
    main()
