"""Frozen features put to the test. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim._version import __version__
from sparkmim.data import Labelled, open_labelled
from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.source import labelled_source
from sparkmim.errors import UserError
from sparkmim.evaluation.features import StageFeatures, check_stage, features_of
from sparkmim.evaluation.fewshot import few_shot
from sparkmim.evaluation.knn import knn_accuracy
from sparkmim.evaluation.linear import HELD_OUT, linear_probe
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import device_named
from sparkmim.models import Hierarchy, create_encoder
from sparkmim.results import EvaluationResult, Score
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.report import renew_report

PROTOCOLS = ("knn", "linear", "fewshot")


@dataclass
class Network:
    """One of those that are compared.

    Attributes:
        name: `weights`, `random` or `compare`.
        hierarchy: its feature maps.
        preparation: what its input is like.
        stages: those to be judged, counted from 1 at the shallowest.
    """

    name: str
    hierarchy: Hierarchy
    preparation: Preparation
    stages: list[int]


def run_evaluation(settings: Mapping[str, Any]) -> EvaluationResult:
    """Runs `sparkmim.evaluate`.

    Args:
        settings: its arguments, as given.
    """
    _check(settings)
    out = _out_of(settings)
    device = device_named(settings["accelerator"])
    networks = _networks(settings, device)
    train, test = open_labelled(settings["data"], settings["val_data"], settings["val_split"], settings["seed"])
    if test is None:
        raise UserError(
            f"{_said(settings['data'])} holds no images to test on; name some with --val-data, or set a share apart "
            "with --val-split 0.2"
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
    result = EvaluationResult(settings["protocol"], rows, train.classes, list(unreadable), out)
    if out is not None:
        _write(out, result, settings, networks, device, len(train), len(test))
        if settings["out"] is None and RunFolder(settings["weights"]).config.is_file():
            renew_report(settings["weights"])
    return result


# What is compared


def _networks(settings: Mapping[str, Any], device: torch.device) -> list[Network]:
    """The one that was asked for, the same at random, and maybe another, in this order."""
    weights = open_weights(settings["weights"])
    model = settings["model"]
    # A module of the user's is not changed; fresh as it comes, it is the random network.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings["seed"])
        if isinstance(model, nn.Module):
            random = copy.deepcopy(model)
        else:
            random = create_encoder(model or weights.model, weights.channels)
    trained = weights.encoder_hierarchy(copy.deepcopy(model) if isinstance(model, nn.Module) else model)
    found = [
        _network("weights", weights, trained, settings, device),
        _network("random", weights, weights.hierarchy_of(random), settings, device),
    ]
    if settings["compare"] is not None:
        other = open_weights(settings["compare"])
        unnamed = other.metadata.model is None and model is not None
        hierarchy = other.encoder_hierarchy(copy.deepcopy(model) if unnamed else None)
        found.append(_network("compare", other, hierarchy, settings, device))
    return found


def _network(
    name: str, weights: Weights, hierarchy: Hierarchy, settings: Mapping[str, Any], device: torch.device
) -> Network:
    hierarchy = hierarchy.to(device).eval().requires_grad_(False)
    preparation = weights.preparation(settings["image_size"], settings["crop"])
    deepest = check_stage(settings["stage"], hierarchy, str(weights.path))
    every = settings["stage"] is None and settings["protocol"] != "fewshot"
    return Network(name, hierarchy, preparation, list(range(1, deepest + 1)) if every else [deepest])


def _features(
    networks: Sequence[Network], images: Labelled, settings: Mapping[str, Any], device: torch.device
) -> list[StageFeatures]:
    """Of each network; images are read once for those that are given the same input."""
    found: dict[int, StageFeatures] = {}
    for place, network in enumerate(networks):
        if place not in found:
            alike = [i for i, other in enumerate(networks) if other.preparation == network.preparation]
            seen = network.preparation
            source = labelled_source(images, seen.channels, seen.rank)
            doing = f"{len(images):,} images"
            batches = still_batches(source, seen, settings["batch_size"], settings["workers"], device, doing)
            parts = features_of([(networks[i].hierarchy, networks[i].stages) for i in alike], batches)
            found.update(zip(alike, parts, strict=True))
    return [found[place] for place in range(len(networks))]


# How


def _scores(
    network: Network, stage: int, found: tuple[Tensor, Tensor, Tensor, Tensor], classes: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Score]:  # fmt: skip
    """The rows of one network's stage: one, or one for each number of shots."""
    stride = network.hierarchy.strides[stage - 1]
    if settings["protocol"] == "knn":
        return [Score(network.name, stage, stride, knn_accuracy(*found, settings["k"], settings["temperature"]))]
    if settings["protocol"] == "linear":
        probe = linear_probe(*found, classes, settings["epochs"], seed=settings["seed"])
        details = {"learning_rate": probe.learning_rate, "held_out": probe.held_out}
        return [Score(network.name, stage, stride, probe.accuracy, details=details)]
    rows = []
    for shots in settings["shots"]:
        accuracies = few_shot(*found, classes, shots, settings["draws"], settings["seed"])
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        mean = statistics.fmean(accuracies)
        rows.append(Score(network.name, stage, stride, mean, spread, shots, {"draws": accuracies}))
    return rows


# What is checked first, and what is kept


def _check(settings: Mapping[str, Any]) -> None:
    if settings["protocol"] not in PROTOCOLS:
        raise UserError(f"there is no protocol {settings['protocol']!r}; choose {', '.join(PROTOCOLS)}")
    for name in ("k", "temperature", "batch_size", "epochs", "draws"):
        if settings[name] <= 0:
            raise UserError(f"{name} is {settings[name]}; it must be above 0")
    if not settings["shots"] or min(settings["shots"]) < 1:
        raise UserError(f"shots is {list(settings['shots'])}; give numbers of images per class, such as [1, 5, 10]")
    model = settings["model"]
    if model is not None and not isinstance(model, (str, nn.Module)):
        raise UserError(f"model is a {type(model).__name__}; pass a name or a torch.nn.Module")


def _check_counts(train: Labelled, settings: Mapping[str, Any]) -> None:
    """Few-shot draws without replacement, and the probe sets some of every class apart."""
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    name, fewest = min(zip(train.classes, counts, strict=True), key=lambda pair: pair[1])
    if settings["protocol"] == "fewshot" and fewest < max(settings["shots"]):
        raise UserError(
            f"shots asks for {max(settings['shots'])} images per class, but class {name!r} has {fewest} to train on; "
            f"ask for at most {fewest}"
        )
    if settings["protocol"] == "linear" and fewest < 2:
        raise UserError(
            f"class {name!r} has {fewest} image(s) to train on; the linear probe takes 2 or more of every class, one "
            "to choose its learning rate on"
        )


def _out_of(settings: Mapping[str, Any]) -> Path | None:
    if settings["out"] is None:
        folder = Path(settings["weights"])
        return folder / "evaluation" / f"{settings['protocol']}.json" if folder.is_dir() else None
    out = Path(settings["out"])
    if out.exists() and not settings["overwrite"]:
        raise UserError(f"{out} exists already; choose another --out, or replace it with --overwrite")
    return out


def _write(
    out: Path, result: EvaluationResult, settings: Mapping[str, Any], networks: Sequence[Network],
    device: torch.device, train: int, test: int,
) -> None:  # fmt: skip
    """All that would be needed to do it again, and what it came to."""
    report = {
        "protocol": result.protocol,
        "rows": [asdict(row) for row in result.rows],
        "images": {"train": train, "test": test, "unreadable": result.unreadable},
        "classes": result.classes,
        "settings": {name: _plain(value) for name, value in settings.items()},
        "networks": [
            {"name": network.name, "strides": network.hierarchy.strides, "channels": network.hierarchy.channels,
             "input": asdict(network.preparation)}
            for network in networks
        ],
        "method": _METHODS[result.protocol],
        "device": device.type,
        "versions": {"sparkmim": __version__, "torch": torch.__version__},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(out)


_METHODS = {
    "knn": "the vote of the nearest training features by cosine, weighted by exp(cosine / temperature)",
    "linear": "softmax regression on standardised features by SGD with Nesterov momentum and a cosine schedule; of "
    f"several learning rates, the best on a held-out {HELD_OUT:.0%} of the training features",
    "fewshot": "logistic regression (C=1) on the standardised features of the images drawn; mean and standard "
    "deviation over the draws",
}


def _plain(value: Any) -> Any:
    """A setting as JSON takes it; a Python object, such as a data set, by its type."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _said(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else f"the {type(data).__name__}"
