"""How fast images are read and augmented, against the usual Pillow pipeline, on one thread.

    python benchmarks/data.py --data folder/of/images --json benchmarks/results/data.json

Without `--data`, it makes JPEGs of the size and detail of photographs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision import transforms

from measure import provenance
from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, pretrain_transform
from sparkmim.data.dataset import PretrainDataset
from sparkmim.data.decoding import decode
from sparkmim.data.discovery import find_images


def make_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Random images with the spectrum of photographs: amplitude falls with frequency."""
    rng = np.random.default_rng(seed)
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))  # [h, w/2 + 1]
    falloff = 1 / np.maximum(frequency, 1 / width)
    for number in range(count):
        spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) * falloff
        image = np.fft.irfft2(spectrum, s=(height, width))  # [3, h, w]
        image = (image - image.mean()) / image.std() * 50 + 120
        pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=92)


def pillow_decode(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def pipelines(paths: list[str], size: int) -> dict[str, Callable[[int], Any]]:
    """What is measured, as functions of the image's number."""
    by_pillow = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.67, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    ours = pretrain_transform((size, size))
    dataset = PretrainDataset(paths, ours, grid=(size // 32, size // 32), mask_ratio=0.6)

    def pillow_all(index: int) -> Tensor:
        tensor: Tensor = by_pillow(pillow_decode(paths[index]))
        return tensor

    return {
        "decode, Pillow": lambda index: pillow_decode(paths[index]),
        "decode, sparkmim": lambda index: decode(paths[index]),
        "decode + transform, Pillow": pillow_all,
        "decode + transform, sparkmim": lambda index: ours(decode(paths[index])),
        "whole sample, sparkmim (with seeds and mask)": lambda index: dataset[0, index],
    }


def measure(paths: list[str], size: int, rounds: int) -> dict[str, float]:
    """Milliseconds per image of each pipeline: the best of `rounds` passes, taken in turns."""
    runs = pipelines(paths, size)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            for index in range(len(paths)):
                run(index)
            best[name] = min(best[name], (time.perf_counter() - begun) / len(paths) * 1000)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; made up when not given")
    parser.add_argument("--count", type=int, default=100, help="images, at most")
    parser.add_argument("--image-size", type=int, default=224, help="side of the crops")
    parser.add_argument("--rounds", type=int, default=5, help="passes, of which the best counts")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            make_photos(Path(folder), arguments.count)
        paths = find_images(arguments.data or folder)[: arguments.count]
        times = measure(paths, arguments.image_size, arguments.rounds)
    ratio = times["decode + transform, Pillow"] / times["decode + transform, sparkmim"]

    table = Table(
        "pipeline", "ms per image", "images/s", title=f"{len(paths)} images, {arguments.image_size}², 1 thread"
    )
    for name, milliseconds in times.items():
        table.add_row(name, f"{milliseconds:.2f}", f"{1000 / milliseconds:.0f}")
    console = Console()
    console.print(table)
    console.print(f"decode + transform: {ratio:.2f} times as fast as Pillow")
    if arguments.json:
        figures = {
            "milliseconds": times,
            "ratio": ratio,
            "images": len(paths),
            "image_size": arguments.image_size,
            "data": str(arguments.data) if arguments.data else "made up",
            **provenance(),
            "torchvision": torchvision.__version__,
            "pillow": pillow_version,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
