"""Features of unmasked images from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparkmim.data.inference import Batch
from sparkmim.data.problems import counted
from sparkmim.errors import UserError
from sparkmim.interop.weights import Weights
from sparkmim.models import Hierarchy
from sparkmim.models.encoders import own_module


@torch.no_grad()
def stage_features(hierarchy: Hierarchy, images: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
    """Computes feature maps of unmasked images, averaged over positions.

    Args:
        hierarchy: of the encoder, in evaluation mode.
        images: normalised, `[B, C, *S]`, on the hierarchy's device.
        stages: maps to return, counted from 1 at the shallowest; None for all.

    Returns:
        float32 `[B, C_i]` for each map.
    """
    maps = hierarchy(images)
    chosen = maps if stages is None else [maps[stage - 1] for stage in stages]
    return [map_.flatten(2).mean(-1).float() for map_ in chosen]


def pooled_features(hierarchy: Hierarchy, batches: Iterable[Tensor]) -> Tensor:
    """Computes the deepest feature map of unmasked images, averaged over positions.

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


@dataclass
class StageFeatures:
    """Features of the readable images in a data source.

    Attributes:
        stages: float32 `[n, C_i]` by stage, counted from 1 at the shallowest.
        places: long `[n]`, indices of these images in the source.
        unreadable: path and reason of each unreadable image.
    """

    stages: dict[int, Tensor]
    places: Tensor
    unreadable: list[str]


def features_of(networks: Sequence[tuple[Hierarchy, Sequence[int]]], batches: Iterable[Batch]) -> list[StageFeatures]:
    """Computes pooled features of several frozen encoders in one pass over the images.

    Args:
        networks: encoders, each with the stages wanted.
        batches: images with their places.

    Raises:
        UserError: if no image can be read.
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


def frozen_hierarchy(weights: Weights, model: str | nn.Module | None, device: torch.device) -> Hierarchy:
    """Returns the pretrained encoder's feature maps in evaluation mode, without gradients.

    Args:
        weights: of the encoder.
        model: its name, or a module, which is copied; None for the name in the file.
        device: to move it to.
    """
    return weights.encoder_hierarchy(own_module(model)).to(device).requires_grad_(False)


def check_stage(stage: int | None, hierarchy: Hierarchy, name: str) -> int:
    """Returns the stage, or the deepest if None.

    Raises:
        UserError: if the network has no such stage.
    """
    count = len(hierarchy.strides)
    if stage is not None and not 1 <= stage <= count:
        raise UserError(
            f"stage is {stage}, but {name} has {counted(count, 'stage')}; choose 1 to {count} (1 is the shallowest)"
        )
    return stage or count
