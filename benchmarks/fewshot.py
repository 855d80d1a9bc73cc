"""What pretraining brings with few labels: images, pretraining for a given time, and scores, as jobs on all cores.

A job is done once and leaves a file: what was interrupted goes on where it stood. Jobs run side by side, each on one
core, which for small networks is quicker than one after the other on all.

Images are split in three: those to *test* on (the folder `test/`, or a fifth of each class where there is none), those
to *choose* settings on (15 % of the rest of each class), and the *pool* that labelled images are drawn from.
Pretraining sees pool and choosing images, without labels. Settings are chosen on choosing images alone.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import sparkmim
from masked_dense import masked_dense
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.decoding import decode
from sparkmim.data.labelled import Labelled, open_labelled
from sparkmim.data.loading import die_with_the_parent
from sparkmim.evaluation import few_shot, knn_accuracy, linear_probe, pooled_features
from sparkmim.files import replacing
from sparkmim.models import Hierarchy, create_encoder
from sparkmim.training.recipes import PRETRAIN_RECIPES

NETWORKS = {32: "small_cnn", 64: "small_cnn_s16"}
"""Of `examples/small_cnn.py`, by the side of the images: a grid of 4×4 patches either way."""

RIVALS = ("SimCLR", "BYOL", "DINO")
CHOOSING = 0.15
STEPS = {10: 100, 50: 300, 200: 400}
"""Optimiser steps of a fine-tuning run, by labels per class."""

FINETUNINGS = ((3e-3, False), (1e-2, False), (3e-4, True), (3e-3, True))
"""Candidates: learning rate per 256 images; whether the head is fitted first."""

Score = dict[str, Any]


class InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded images with their labels."""

    def __init__(self, images: list[Tensor], labels: Tensor, classes: list[str]) -> None:
        self.images, self.targets, self.classes = images, labels, classes

    @classmethod
    def of(cls, images: Labelled) -> InMemory:
        return cls([decode(path) for path in images.items], images.labels, images.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.images[place], int(self.targets[place])

    def draw(self, per_class: int, seed: int) -> InMemory:
        """Draws images of each class."""
        every = Labelled(list(range(len(self))), self.targets, self.classes)
        drawn = every.draw(per_class, torch.Generator().manual_seed(seed))
        return InMemory([self.images[i] for i in drawn.items], drawn.labels, self.classes)


@dataclass(frozen=True)
class Images:
    """A data set, split."""

    pool: InMemory
    choosing: InMemory
    test: InMemory

    @property
    def unlabelled(self) -> InMemory:
        """What is pretrained on."""
        labels = torch.cat([self.pool.targets, self.choosing.targets])
        return InMemory(self.pool.images + self.choosing.images, labels, self.pool.classes)

    @property
    def size(self) -> int:
        return int(self.pool.images[0].shape[-1])


@functools.cache
def open_images(folder: Path) -> Images:
    train, test = open_labelled(folder)
    if test is None:
        train, test = train.split(0.2, seed=0)
    rest, choosing = train.split(CHOOSING, seed=1)
    return Images(*map(InMemory.of, (rest, choosing, test)))


def create_network(size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_encoder(f"{Path(__file__).parents[1] / 'examples' / 'small_cnn.py'}:{NETWORKS[size]}")


def load_network(size: int, weights: Path | None, seed: int) -> nn.Module:
    """The network with weights of a file; at random, by the seed, without one."""
    network = create_network(size, seed)
    if weights is not None:
        network.load_state_dict(load_file(weights))
    return network


class Pooled(nn.Module):
    """Computes the deepest feature map, averaged over positions: `[B, 3, H, W]` to `[B, C]`."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.hierarchy = Hierarchy(encoder)

    def forward(self, images: Tensor) -> Tensor:
        deepest: Tensor = self.hierarchy(images)[-1]
        return deepest.mean((2, 3))


def train(
    method: str, settings: Mapping[str, Any], network: nn.Module, images: InMemory, size: int, rate: float | None,
    steps: int, seed: int,
) -> None:  # fmt: skip
    """Pretrains a network in place: by `sparkmim`, by `masked dense`, the same on whole maps, or by a rival."""
    if method in RIVALS:
        from rivals import train_rival  # needs lightly

        assert rate is not None
        encode = Pooled(network)
        width = encode.hierarchy.channels[-1]
        return train_rival(method, encode, width, images.images, size, rate, steps, seed)
    recipe = PRETRAIN_RECIPES[settings.get("recipe", "default")]
    per_epoch = len(images) // min(len(images), settings.get("batch_size", recipe.batch_size))
    with tempfile.TemporaryDirectory() as folder, masked_dense() if method == "masked dense" else nullcontext():
        result = sparkmim.pretrain(
            data=images, out=f"{folder}/run", model=network, image_size=size, epochs=steps / per_epoch,
            warmup_epochs=steps / per_epoch / 10, seed=seed, val_split=0.0, picture_every=0, workers=0,
            **{"learning_rate": rate, **settings},
        )  # fmt: skip
    if not result.finished:
        raise KeyboardInterrupt
    return None


Way = tuple[str, Mapping[str, Any]]
"""A method for `train`, and its settings."""


def seconds_per_step(folder: Path, ways: Mapping[str, Way], rounds: int = 3, steps: int = 8) -> Score:
    """Times a step of each way of pretraining, in seconds of one core; medians.

    They take turns: a machine that slows down slows all.
    """
    images = open_images(folder)
    unlabelled, size = images.unlabelled, images.size

    def seconds(way: str, count: int) -> float:
        network = create_network(size, 0)
        begun = time.process_time()
        train(*ways[way], network, unlabelled, size, 1e-3, count, 0)
        return time.process_time() - begun

    for way in ways:
        seconds(way, 1)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way].append((seconds(way, 3 + steps) - seconds(way, 3)) / steps)
    return {way: statistics.median(found) for way, found in times.items()}


def count_steps(jobs: Jobs, folder: Path, ways: Mapping[str, Way]) -> dict[str, float]:
    """Returns how many steps of each way of pretraining a minute of one core holds, with jobs on all cores."""
    found = jobs.run({f"time {number}": (seconds_per_step, (folder, ways)) for number in range(jobs.workers)}).values()
    return {way: 60 / statistics.mean(times[way] for times in found) for way in ways}


def pretrain(
    folder: Path, weights: Path, method: str, settings: Mapping[str, Any], rate: float | None, steps: int, seed: int
) -> Score:
    """Pretrains for so many steps, and writes the network's weights; the seconds are of one core."""
    images = open_images(folder)
    network = create_network(images.size, seed)
    begun = time.process_time()
    train(method, settings, network, images.unlabelled, images.size, rate, steps, seed)
    taken = time.process_time() - begun
    with replacing(weights) as partial:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, partial)
    return {"steps": steps, "seconds": taken}


def finetune(
    folder: Path, weights: Path | None, per_class: int, steps: int, rate: float, fit_head: bool, seed: int, judged: str
) -> Score:  # fmt: skip
    """Fine-tunes on images of the pool, drawn by the seed; returns the accuracy on `choosing` or `test` images."""
    images = open_images(folder)
    subset = images.pool.draw(per_class, seed)
    batch = min(64, len(subset))
    epochs = steps / (len(subset) // batch)
    network = load_network(images.size, weights, seed)
    with tempfile.TemporaryDirectory() as out:
        result = sparkmim.finetune(
            data=subset, val_data=getattr(images, judged), out=f"{out}/run", model=network,
            image_size=images.size, epochs=epochs, warmup_epochs=epochs / 10, eval_every=epochs, batch_size=batch,
            learning_rate=rate, fit_head=fit_head, layer_decay=1.0, eval_crop=1.0, workers=0, seed=seed,
        )  # fmt: skip
    if not result.finished:
        raise KeyboardInterrupt
    return {"accuracy": result.top1["model"]}


def frozen(folder: Path, weights: Path | None, labels: Sequence[int], seed: int, judged: str) -> Score:
    """Accuracies on frozen features: k-NN and linear with the labels of the whole pool; linear with few, per draw."""
    images = open_images(folder)
    hierarchy = Hierarchy(load_network(images.size, weights, seed))
    transform = eval_transform((images.size, images.size), crop=1.0)

    def features(part: InMemory) -> tuple[Tensor, Tensor]:
        batches = (
            torch.stack([transform(image) for image in part.images[start : start + 256]])
            for start in range(0, len(part), 256)
        )
        return pooled_features(hierarchy, batches), part.targets

    scored = *features(images.pool), *features(getattr(images, judged))
    few = {f"linear {shots}": few_shot(*scored, images.pool.classes, shots, seed=seed) for shots in labels}
    probe = linear_probe(*scored, images.pool.classes, epochs=20, seed=seed)
    return {**few, "k-NN": knn_accuracy(*scored), "linear": probe.accuracy}


class Jobs:
    """Jobs that are done once each, several at a time; a context that ends their processes.

    Args:
        folder: keeps the result of each; the same folder goes on with what is there.
        workers: processes, of one thread each.
        settings: what the results depend on besides the names of the jobs; the same in one folder.
    """

    def __init__(self, folder: Path, workers: int, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.workers = workers
        kept = folder / "settings.json"
        if kept.is_file() and json.loads(kept.read_text()) != json.loads(json.dumps(settings)):
            raise SystemExit(f"{folder} holds results of other settings, {kept.read_text()}; choose another --runs")
        with replacing(kept) as partial:
            partial.write_text(json.dumps(settings))
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_alone)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, jobs: Mapping[str, tuple[Callable[..., Score], Sequence[Any]]]) -> dict[str, Score]:
        """Returns the result of each job, by its name; calls the functions of those that are not done yet."""
        files = {name: self.folder / f"{name}.json" for name in jobs}
        running = {
            self.pool.submit(_keep, files[name], function, arguments): name
            for name, (function, arguments) in jobs.items() if not files[name].is_file()
        }  # fmt: skip
        for future in as_completed(running):
            name, result = running[future], future.result()
            print(f"{time.strftime('%H:%M:%S')} {self.folder.name}: {name}: {result}", flush=True)
        return {name: json.loads(file.read_text()) for name, file in files.items()}


def _keep(file: Path, function: Callable[..., Score], arguments: Sequence[Any]) -> Score:
    """Calls a function and writes its result, which is kept even if another job fails meanwhile."""
    result = function(*arguments)
    with replacing(file) as partial:
        partial.write_text(json.dumps(result) + "\n")
    return result


def _alone() -> None:
    """Sets up a worker: one thread, no life of its own, and nothing on the screen, which shows the results."""
    die_with_the_parent()
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    logging.getLogger("sparkmim").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def choose(scores: Mapping[Any, float]) -> Any:
    """The candidate with the best score; the first of equals."""
    return max(scores, key=lambda candidate: scores[candidate])
