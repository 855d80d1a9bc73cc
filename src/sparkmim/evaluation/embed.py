"""Writing the features of images to a file. The public function is `sparkmim.embed`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparkmim.data.inference import still_batches
from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.evaluation.features import check_stage, frozen_hierarchy, stage_features
from sparkmim.files import replacing
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models import Hierarchy
from sparkmim.results import EmbedResult
from sparkmim.terminal import written


def run_embedding(
    *,
    images: Any,
    weights: str | Path,
    out: str | Path,
    stage: int | None,
    pooled: bool,
    model: str | nn.Module | None,
    image_size: int | Sequence[int] | None,
    crop: float | None,
    batch_size: int,
    workers: int | None,
    accelerator: str,
) -> EmbedResult:
    """Runs `sparkmim.embed`."""
    out = Path(out)
    if out.suffix == ".parquet" and not pooled:
        raise UserError(f"{out} can hold pooled features only; write whole maps to a .npy file")
    names_file = None if out.suffix == ".parquet" else out.with_suffix(".txt")
    arrow = _pyarrow() if names_file is None else None
    device = device_named(accelerator)
    opened = open_weights(weights)
    preparation = opened.preparation(image_size, crop)
    source = images_source(images, preparation.channels, preparation.rank)
    hierarchy = frozen_hierarchy(opened, model, device)
    stage = check_stage(stage, hierarchy, str(opened.path))
    batches = still_batches(source, preparation, batch_size, workers, device, "embedding")

    unreadable: list[str] = []

    def found() -> Iterator[tuple[list[str], Any]]:
        """Yields names and features `[b, C]` or `[b, C, *S]` of each batch."""
        for batch in batches:
            unreadable.extend(f"{name}: {reason}" for _, name, reason in batch.unreadable)
            if batch.images is not None:
                yield batch.names, _features(batch.images, hierarchy, stage, pooled)
        if len(unreadable) == len(source.items):
            raise UserError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")

    if names_file is None:
        shape = _write_parquet(out, found(), arrow)
    else:
        shape = _write_npy(out, names_file, found())
    return EmbedResult(out, shape, stage, unreadable)


@torch.no_grad()
def _features(images: Tensor, hierarchy: Hierarchy, stage: int, pooled: bool) -> Any:
    if pooled:
        return stage_features(hierarchy, images, [stage])[0].cpu().numpy()
    return hierarchy(images)[stage - 1].float().cpu().numpy()


def _write_npy(out: Path, names_file: Path, parts: Iterator[tuple[list[str], Any]]) -> tuple[int, ...]:
    """Writes features batch by batch, so that memory holds one batch; returns the shape of all."""
    shape = [0]
    with (
        replacing(out) as partial, replacing(names_file) as partial_names,
        partial.open("wb") as rows, partial_names.open("w", encoding="utf-8") as lines,
    ):  # fmt: skip
        for names, features in parts:
            if len(shape) == 1:
                shape += features.shape[1:]
                _write_header(rows, shape)
            shape[0] += len(features)
            rows.write(features.tobytes())
            lines.writelines(f"{written(name)}\n" for name in names)
        rows.seek(0)
        _write_header(rows, shape)
    return tuple(shape)


def _write_header(file: Any, shape: Sequence[int]) -> None:
    """Writes the header of a float32 array; numpy leaves room in it for any number of rows."""
    kind = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": tuple(shape)})


def _write_parquet(out: Path, parts: Iterator[tuple[list[str], Any]], arrow: Any) -> tuple[int, ...]:
    """Writes columns `path` and `feature`, a row group per batch; returns the shape of all features."""
    writer: Any = None
    count = width = 0
    with replacing(out) as partial:
        for names, features in parts:
            width = features.shape[1]
            lists = arrow.FixedSizeListArray.from_arrays(arrow.array(features.reshape(-1)), width)
            table = arrow.table(
                {"path": arrow.array([written(name) for name in names], arrow.string()), "feature": lists}
            )
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
