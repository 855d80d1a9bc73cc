"""The main job on real data that needs no download: scikit-learn's 1,797 handwritten digits.

    python examples/demo.py --out demo

Writes the digits as a folder of PNG files, pretrains a small network on those for training without their
labels, and asks a nearest-neighbour classifier how good its frozen features are on the others, beside
those of the same network at random. A picture shows the loss and what the network rebuilds.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparkmim
from sparkmim.data import decode, eval_transform
from sparkmim.evaluation import knn_accuracy, pooled_features
from sparkmim.models import Hierarchy, SparK, create_encoder
from sparkmim.visualize import reconstruction_grid

MODEL = str(Path(__file__).with_name("small_cnn.py")) + ":small_cnn"
SIZE = 32
MEAN, STD = [0.3], [0.37]


def write_digits(folder: Path) -> tuple[list[Path], list[Path], np.ndarray]:
    """8×8 digits, enlarged to 32×32, as PNG files: paths for training, paths for testing, and all labels."""
    digits = load_digits()
    paths = []
    for index, pixels in enumerate(digits.images):  # 0 … 16
        part = "train" if index < 1300 else "test"
        path = folder / part / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9375).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths[:1300], paths[1300:], digits.target


def features(encoder: torch.nn.Module, paths: list[Path]) -> torch.Tensor:
    transform = eval_transform((SIZE, SIZE), MEAN, STD, crop=1.0)
    images = torch.stack([transform(decode(path, channels=1)) for path in paths])
    return pooled_features(Hierarchy(encoder, channels=1), images.split(256))


def draw(model: SparK, run: Path, paths: list[Path], file: Path) -> None:
    """The loss over the steps, and six test digits: input, masked input, reconstruction."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    transform = eval_transform((SIZE, SIZE), MEAN, STD, crop=1.0)
    images = torch.stack([transform(decode(path, channels=1)) for path in paths[:6]])
    with torch.no_grad():
        output = model(images, generator=torch.Generator().manual_seed(0))

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5.2), width_ratios=[1.7, 1], layout="constrained")
    left.plot([event.step for event in losses], [event.value for event in losses], color="#1f6f8b")
    left.set(xlabel="step", ylabel="loss on masked patches", title="Pretraining")
    left.spines[["top", "right"]].set_visible(False)
    left.grid(alpha=0.3)
    right.imshow(reconstruction_grid(output, MEAN, STD).permute(1, 2, 0), interpolation="nearest")
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
    train, test, labels = write_digits(args.out / "digits")

    result = sparkmim.pretrain(
        data=str(args.out / "digits" / "train"), out=args.out / "run", model=MODEL, channels=1, image_size=SIZE,
        patch_size=8, decoder_width=64, batch_size=64, epochs=args.epochs, warmup_epochs=2, flip=0.0,
        mean=MEAN, std=STD, log_every=5,
    )  # fmt: skip
    if not result.finished:
        raise SystemExit(130)

    torch.manual_seed(0)
    known, asked = torch.from_numpy(labels[: len(train)]), torch.from_numpy(labels[len(train) :])
    accuracies = {}
    for name, encoder in (("random", create_encoder(MODEL, channels=1)), ("pretrained", result.model.encoder)):
        accuracies[name] = knn_accuracy(features(encoder, train), known, features(encoder, test), asked)
    picture = args.out / "demo.png"
    draw(result.model, args.out / "run", test, picture)

    print(f"\nnearest-neighbour accuracy on {len(test)} unseen digits, features frozen:")
    for name, accuracy in accuracies.items():
        print(f"  {name:<12} {accuracy:6.1%}")
    print(f"picture: {picture}")
    print(f"run folder: {args.out / 'run'} (weights/encoder.safetensors is the network)")
    print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
