"""Evaluating frozen features by k-NN, linear probe and few-shot. The public function is `sparkmim.evaluate`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparkmim._version import __version__
from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.labelled import Labelled, open_labelled
from sparkmim.data.problems import counted
from sparkmim.data.source import Source
from sparkmim.errors import UserError
from sparkmim.evaluation.features import StageFeatures, check_stage, features_of, frozen_hierarchy
from sparkmim.evaluation.fewshot import few_shot
from sparkmim.evaluation.knn import knn_accuracy
from sparkmim.evaluation.linear import HELD_OUT, linear_probe
from sparkmim.files import replacing
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models import Hierarchy, create_encoder
from sparkmim.models.encoders import own_module
from sparkmim.results import EvaluationResult, Score
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.report import renew_report


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Arguments of `sparkmim.evaluate`."""

    data: Any
    weights: str | Path
    protocol: Literal["knn", "linear", "fewshot"]
    model: str | nn.Module | None
    compare: str | Path | None
    val_data: Any
    val_split: float | None
    stage: int | None
    image_size: int | Sequence[int] | None
    crop: float | None
    k: int
    temperature: float
    epochs: int
    shots: Sequence[int]
    draws: int
    batch_size: int
    workers: int | None
    max_megapixels: float
    accelerator: str
    seed: int
    out: str | Path | None
    overwrite: bool


@dataclass(frozen=True)
class FrozenNetwork:
    """A network under comparison, and the stages to evaluate, counted from 1 at the shallowest."""

    name: str  # `weights`, `random` or `compare`
    hierarchy: Hierarchy
    preparation: Preparation
    stages: list[int]


def run_evaluation(settings: EvaluateSettings) -> EvaluationResult:
    """Runs `sparkmim.evaluate`."""
    out = _out_of(settings)
    device = device_named(settings.accelerator)
    networks = _networks(settings, device)
    seen = networks[0].preparation
    train, test = open_labelled(
        settings.data, settings.val_data, settings.val_split, settings.seed, seen.channels, seen.rank
    )
    if test is None:
        named = settings.data if isinstance(settings.data, (str, Path)) else "the data set"
        raise UserError(
            f"{named} holds no images to test on; name some with --val-data, or set a share apart with --val-split 0.2"
        )
    _check_counts(train, settings)

    rows: list[Score] = []
    unreadable: dict[str, None] = {}
    known_of = _features(networks, train, settings, device)
    asked_of = _features(networks, test, settings, device)
    for network, known, asked in zip(networks, known_of, asked_of, strict=True):
        unreadable.update(dict.fromkeys([*known.unreadable, *asked.unreadable]))
        labels = train.labels[known.places].to(device), test.labels[asked.places].to(device)
        for stage in network.stages:
            found = known.stages[stage].to(device), labels[0], asked.stages[stage].to(device), labels[1]
            rows += _scores(network, stage, found, train.classes, settings)
    result = EvaluationResult(settings.protocol, rows, train.classes, list(unreadable), out)
    if out is not None:
        _write(out, result, settings, networks, device, len(train), len(test))
        if settings.out is None and RunFolder(settings.weights).config.is_file():
            renew_report(settings.weights)
    return result


def _networks(settings: EvaluateSettings, device: torch.device) -> list[FrozenNetwork]:
    """Builds the networks `weights`, `random` and, if asked for, `compare`, in this order."""
    weights = open_weights(settings.weights)
    model = settings.model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        random: Any = own_module(model)  # a module stands for the random network as it is passed
        if not isinstance(random, nn.Module):
            random = create_encoder(random or weights.model, weights.channels)
    found = [
        ("weights", weights, frozen_hierarchy(weights, model, device)),
        ("random", weights, weights.hierarchy_of(random).to(device).eval().requires_grad_(False)),
    ]
    if settings.compare is not None:
        other = open_weights(settings.compare)
        named = model if other.metadata.model is None else None
        found.append(("compare", other, frozen_hierarchy(other, named, device)))
    networks = []
    for name, opened, hierarchy in found:
        preparation = opened.preparation(settings.image_size, settings.crop)
        deepest = check_stage(settings.stage, hierarchy, str(opened.path))
        every = settings.stage is None and settings.protocol != "fewshot"
        stages = list(range(1, deepest + 1)) if every else [deepest]
        networks.append(FrozenNetwork(name, hierarchy, preparation, stages))
    return networks


def _features(
    networks: Sequence[FrozenNetwork], images: Labelled, settings: EvaluateSettings, device: torch.device
) -> list[StageFeatures]:
    """Returns the features of each network; networks with the same preparation share one pass over the images."""
    found: dict[str, StageFeatures] = {}
    for network in networks:
        if network.name in found:
            continue
        seen = network.preparation
        alike = [other for other in networks if other.preparation == seen]
        source = Source.of(images.items, seen.channels, seen.rank)
        doing = counted(len(images), "image")
        batches = still_batches(source, seen, settings.batch_size, settings.workers, device, doing)
        parts = features_of([(other.hierarchy, other.stages) for other in alike], batches)
        found.update(zip((other.name for other in alike), parts, strict=True))
    return [found[network.name] for network in networks]


def _scores(
    network: FrozenNetwork, stage: int, found: tuple[Tensor, Tensor, Tensor, Tensor], classes: Sequence[str],
    settings: EvaluateSettings,
) -> list[Score]:  # fmt: skip
    """Scores one stage of a network: one row, or one for each number of shots."""
    stride = network.hierarchy.strides[stage - 1]
    if settings.protocol == "knn":
        return [Score(network.name, stage, stride, knn_accuracy(*found, settings.k, settings.temperature))]
    if settings.protocol == "linear":
        probe = linear_probe(*found, classes, settings.epochs, seed=settings.seed)
        details = {"learning_rate": probe.learning_rate, "held_out": probe.held_out}
        return [Score(network.name, stage, stride, probe.accuracy, details=details)]
    rows = []
    for shots in settings.shots:
        draws = few_shot(*found, classes, shots, settings.draws, settings.seed)
        mean, spread = statistics.fmean(draws), statistics.stdev(draws) if len(draws) > 1 else None
        rows.append(Score(network.name, stage, stride, mean, spread, shots, {"draws": draws}))
    return rows


def _check_counts(train: Labelled, settings: EvaluateSettings) -> None:
    """Checks that every class has enough training images: few-shot draws without replacement, the probe splits."""
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    name, fewest = min(zip(train.classes, counts, strict=True), key=lambda pair: pair[1])
    if settings.protocol == "fewshot" and fewest < max(settings.shots):
        raise UserError(
            f"shots asks for {max(settings.shots)} images per class, but class {name!r} has {fewest} to train on; "
            f"ask for at most {fewest}"
        )
    if settings.protocol == "linear" and fewest < 2:
        raise UserError(
            f"class {name!r} has {counted(fewest, 'image')} to train on; the linear probe needs 2 or more of every "
            "class, one to choose its learning rate on"
        )


def _out_of(settings: EvaluateSettings) -> Path | None:
    """Returns the file to write; None without `out` and without a run folder."""
    if settings.out is None:
        folder = Path(settings.weights)
        return folder / "evaluation" / f"{settings.protocol}.json" if folder.is_dir() else None
    return Path(settings.out)


def _write(
    out: Path, result: EvaluationResult, settings: EvaluateSettings, networks: Sequence[FrozenNetwork],
    device: torch.device, train: int, test: int,
) -> None:  # fmt: skip
    """Writes the result with everything needed to repeat it."""
    report = {
        "protocol": result.protocol,
        "rows": [asdict(row) for row in result.rows],
        "images": {"train": train, "test": test, "unreadable": result.unreadable},
        "classes": result.classes,
        "settings": {name: _plain(value) for name, value in vars(settings).items()},
        "networks": [
            {"name": network.name, "strides": network.hierarchy.strides, "channels": network.hierarchy.channels,
             "input": asdict(network.preparation)}
            for network in networks
        ],
        "method": _METHODS[result.protocol],
        "device": device.type,
        "versions": {"sparkmim": __version__, "torch": torch.__version__},
    }  # fmt: skip
    with replacing(out) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


_METHODS = {
    "knn": "vote of the nearest training features by cosine similarity, weighted by exp(cosine / temperature)",
    "linear": "softmax regression on standardised features by SGD with Nesterov momentum and a cosine schedule; of "
    f"several learning rates, the best on a held-out {HELD_OUT:.0%} of the training features",
    "fewshot": "logistic regression (C=1) on the standardised features of the images drawn; mean and standard "
    "deviation over the draws",
}


def _plain(value: Any) -> Any:
    """Returns a setting as JSON can hold it; a Python object, such as a data set, becomes the name of its type."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__
