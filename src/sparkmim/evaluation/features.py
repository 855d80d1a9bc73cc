"""Features of whole images from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparkmim.data.inference import Batch
from sparkmim.errors import UserError
from sparkmim.models import Hierarchy

if TYPE_CHECKING:
    from sparkmim.interop.weights import Weights


@torch.no_grad()
def stage_features(hierarchy: Hierarchy, images: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
    """Feature maps of unmasked images, averaged over positions.

    Args:
        hierarchy: of the encoder, in evaluation mode.
        images: normalised, `[B, C, *S]`, on the hierarchy's device.
        stages: which maps, counted from 1 at the shallowest; None for all.

    Returns:
        float32 `[B, C_i]` for each of them.
    """
    maps = hierarchy(images)
    chosen = maps if stages is None else [maps[stage - 1] for stage in stages]
    return [map_.flatten(2).mean(-1).float() for map_ in chosen]


def pooled_features(hierarchy: Hierarchy, batches: Iterable[Tensor]) -> Tensor:
    """The deepest feature map of unmasked images, averaged over positions.

    Args:
        hierarchy: of the encoder; put into evaluation mode for the call.
        batches: normalised images `[B, C, *S]` each.

    Returns:
        float32 `[images, C_k]` on the CPU.
    """
    training = hierarchy.training
    hierarchy.eval()
    try:
        device = next(hierarchy.parameters()).device
        pooled = [stage_features(hierarchy, images.to(device))[-1].cpu() for images in batches]
    finally:
        hierarchy.train(training)
    return torch.cat(pooled)


# What the network sees


# Reading, in order, without what is unreadable


@dataclass
class StageFeatures:
    """Features of the readable images of a source.

    Attributes:
        stages: float32 `[n, C_i]` by stage, counted from 1 at the shallowest.
        places: long `[n]`, of these images in the source.
        unreadable: path and reason of the others.
    """

    stages: dict[int, Tensor]
    places: Tensor
    unreadable: list[str]


def features_of(networks: Sequence[tuple[Hierarchy, Sequence[int]]], batches: Iterable[Batch]) -> list[StageFeatures]:
    """Runs frozen encoders, each with the stages wanted of it, over images that are read once for all of them.

    Raises:
        ValueError: if no image could be read.
    """
    found: list[list[list[Tensor]]] = [[] for _ in networks]
    places: list[int] = []
    unreadable: list[str] = []
    for batch in batches:
        unreadable += [f"{name}: {reason}" for _, name, reason in batch.unreadable]
        places += batch.places
        if batch.images is not None:
            for parts, (hierarchy, stages) in zip(found, networks, strict=True):
                parts.append([pooled.cpu() for pooled in stage_features(hierarchy, batch.images, stages)])
    if not places:
        raise UserError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    return [
        StageFeatures(
            {
                stage: torch.cat(list(of_stage))
                for stage, of_stage in zip(stages, zip(*parts, strict=True), strict=True)
            },
            torch.tensor(places),
            unreadable,
        )
        for parts, (_, stages) in zip(found, networks, strict=True)
    ]


# Networks


def frozen_hierarchy(weights: Weights, model: str | torch.nn.Module | None, device: torch.device) -> Hierarchy:
    """Returns the pretrained encoder's feature maps in evaluation mode, without gradients."""
    return weights.encoder_hierarchy(model).to(device).requires_grad_(False)


def check_stage(stage: int | None, hierarchy: Hierarchy, name: str) -> int:
    """The stage meant: the deepest if None.

    Raises:
        ValueError: if there is no such stage.
    """
    count = len(hierarchy.strides)
    if stage is not None and not 1 <= stage <= count:
        raise UserError(f"stage is {stage}, but {name} has {count} stages, 1 the shallowest; choose 1 to {count}")
    return stage or count
