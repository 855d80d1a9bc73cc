"""Classes and features of unlabelled images. The public functions are in `sparkmim.commands`."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkmim.data.inference import Batch, still_batches
from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.evaluation.features import check_stage, frozen_hierarchy, stage_features
from sparkmim.files import new_file, replacing
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models.encoders import own_module
from sparkmim.results import EmbedResult, PredictResult

MOST_COLUMNS = 100
"""With more classes than this, a table names the likeliest instead of having a column for each."""

TOP = 5


# Classes


@torch.no_grad()
def run_prediction(settings: Mapping[str, Any]) -> PredictResult:
    """Runs `sparkmim.predict`.

    Args:
        settings: its arguments, as given.
    """
    out = new_file(settings["out"], settings["overwrite"])
    device = device_named(settings["accelerator"])
    weights = open_weights(settings["weights"])
    classes = weights.classes
    top = settings["top"]
    if top is not None and not 1 <= top <= len(classes):
        raise UserError(f"top is {top}, but the classifier knows {len(classes)} classes; choose 1 to {len(classes)}")
    if top is None and len(classes) > MOST_COLUMNS:
        top = TOP
    preparation = weights.preparation(settings["image_size"], settings["crop"])
    source = images_source(settings["images"], preparation.channels, preparation.rank)
    classifier = weights.classifier(own_module(settings["model"])).to(device)
    batches = still_batches(source, preparation, settings["batch_size"], settings["workers"], device, "predicting")

    columns = ["path", "class", "probability", "error"]
    if top is None:
        columns += [f"p_{name}" for name in classes]
    else:
        columns += [f"{what}_{place}" for place in range(2, top + 1) for what in ("class", "probability")]
    read, unreadable = 0, []
    with replacing(out) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for batch in batches:
            rows: dict[int, list[str]] = {}
            for place, name, reason in batch.unreadable:
                unreadable.append(f"{name}: {reason}")
                rows[place] = [name, "", "", reason, *[""] * (len(columns) - 4)]
            if batch.images is not None:
                probabilities = classifier(batch.images).float().softmax(1).cpu()  # [b, classes]
                for place, name, of_image in zip(batch.places, batch.names, probabilities, strict=True):
                    rows[place] = _row(name, of_image, classes, top)
                read += len(batch.places)
            table.writerows(rows[place] for place in sorted(rows))
    return PredictResult(out, read, unreadable)


def _row(name: str, probabilities: torch.Tensor, classes: list[str], top: int | None) -> list[str]:
    """Columns of an image with probabilities `[classes]`."""
    likeliest, order = probabilities.topk(top or 1)
    named = [text for p, place in zip(likeliest.tolist(), order.tolist(), strict=True)
             for text in (classes[place], _digits(p))]  # fmt: skip
    rest = [_digits(p) for p in probabilities.tolist()] if top is None else named[2:]
    return [name, *named[:2], "", *rest]


def _digits(probability: float) -> str:
    return f"{probability:.6f}"


# Features


def run_embedding(settings: Mapping[str, Any]) -> EmbedResult:
    """Runs `sparkmim.embed`.

    Args:
        settings: its arguments, as given.
    """
    out = new_file(settings["out"], settings["overwrite"])
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"out is {out}; its name should end in .npy or .parquet")
    if out.suffix == ".parquet" and not settings["pooled"]:
        raise UserError(f"{out} would hold a list per image, which whole maps are not; write them to a .npy file")
    names_file = None if out.suffix == ".parquet" else new_file(out.with_suffix(".txt"), settings["overwrite"])
    if names_file is None:
        _pyarrow()
    device = device_named(settings["accelerator"])
    weights = open_weights(settings["weights"])
    preparation = weights.preparation(settings["image_size"], settings["crop"])
    source = images_source(settings["images"], preparation.channels, preparation.rank)
    hierarchy = frozen_hierarchy(weights, own_module(settings["model"]), device)
    stage = check_stage(settings["stage"], hierarchy, str(weights.path))
    batches = still_batches(source, preparation, settings["batch_size"], settings["workers"], device, "embedding")

    unreadable: list[str] = []

    def found() -> Iterator[tuple[list[str], Any]]:
        """Names of some images, and their features `[b, C]` or `[b, C, *S]`."""
        for batch in batches:
            unreadable.extend(f"{name}: {reason}" for _, name, reason in batch.unreadable)
            if batch.images is not None:
                yield batch.names, _features(batch, hierarchy, stage, settings["pooled"])
        if len(unreadable) == len(source.items):
            raise UserError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")

    if names_file is not None:
        shape = _write_npy(out, names_file, found(), len(source.items))
    else:
        shape = _write_parquet(out, found(), _pyarrow())
    return EmbedResult(out, shape, stage, unreadable)


@torch.no_grad()
def _features(batch: Batch, hierarchy: Any, stage: int, pooled: bool) -> Any:
    assert batch.images is not None
    if pooled:
        return stage_features(hierarchy, batch.images, [stage])[0].cpu().numpy()
    return hierarchy(batch.images)[stage - 1].float().cpu().numpy()


def _write_npy(out: Path, names_file: Path, parts: Iterator[tuple[list[str], Any]], most: int) -> tuple[int, ...]:
    """Writes batches as they come, so that memory holds one of them; returns the shape."""
    rows: Any = None
    count = 0
    with replacing(out) as partial, replacing(names_file) as partial_names:
        with partial_names.open("w", encoding="utf-8") as lines:
            for names, features in parts:
                if rows is None:
                    rows = np.lib.format.open_memmap(partial, "w+", np.float32, (most, *features.shape[1:]))
                rows[count : count + len(features)] = features
                lines.writelines(f"{name}\n" for name in names)
                count += len(features)
        rows.flush()
        if count < most:  # the header says how many there are: written anew without those that were unreadable
            shorter = partial.with_suffix(".shorter")
            with shorter.open("wb") as file:
                np.save(file, rows[:count])
            shorter.replace(partial)
        return (count, *rows.shape[1:])


def _write_parquet(out: Path, parts: Iterator[tuple[list[str], Any]], arrow: Any) -> tuple[int, ...]:
    """Columns `path` and `feature`, a row group per batch."""
    writer: Any = None
    count = width = 0
    with replacing(out) as partial:
        for names, features in parts:
            width = features.shape[1]
            lists = arrow.FixedSizeListArray.from_arrays(arrow.array(features.reshape(-1)), width)
            table = arrow.table({"path": arrow.array(names, arrow.string()), "feature": lists})
            if writer is None:
                writer = arrow.parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            count += len(names)
        writer.close()
    return count, width


def _pyarrow() -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError("writing .parquet needs `pip install 'sparkmim[parquet]'`; or choose .npy") from error
