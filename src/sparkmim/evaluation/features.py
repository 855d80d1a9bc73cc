"""Features of unmasked images from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparkmim.data.inference import Batch
from sparkmim.data.problems import counted
from sparkmim.errors import UserError
from sparkmim.evaluation.scores import evaluation_mode
from sparkmim.interop.weights import Weights
from sparkmim.models import Hierarchy
from sparkmim.models.encoders import own_module


@torch.no_grad()
def stage_features(hierarchy: Hierarchy, images: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
    """Computes feature maps of normalised images `[B, C, *S]`, averaged over positions: float32 `[B, C_i]` each.

    `stages` names the maps to return, counted from 1 at the shallowest; None for all.
    """
    maps = hierarchy(images)
    chosen = maps if stages is None else [maps[stage - 1] for stage in stages]
    return [map_.flatten(2).mean(-1).float() for map_ in chosen]


def pooled_features(hierarchy: Hierarchy, batches: Iterable[Tensor]) -> Tensor:
    """Computes the deepest feature map of normalised images, averaged over positions: float32 `[images, C_k]`, CPU."""
    device = next(hierarchy.parameters()).device
    with evaluation_mode(hierarchy):
        return torch.cat([stage_features(hierarchy, images.to(device))[-1].cpu() for images in batches])


@dataclass
class StageFeatures:
    """Features of the readable images in a data source."""

    stages: dict[int, Tensor]  # float32 [n, C_i] by stage, counted from 1 at the shallowest
    places: Tensor  # long [n], indices of these images in the source
    unreadable: list[str]  # path and reason of each


def features_of(networks: Sequence[tuple[Hierarchy, Sequence[int]]], batches: Iterable[Batch]) -> list[StageFeatures]:
    """Computes features of frozen encoders, at the stages given for each, in one pass over the images.

    Raises:
        UserError: if no image can be read.
    """
    found: list[dict[int, list[Tensor]]] = [{stage: [] for stage in stages} for _, stages in networks]
    places: list[int] = []
    unreadable: list[str] = []
    for batch in batches:
        unreadable += [f"{name}: {reason}" for _, name, reason in batch.unreadable]
        places += batch.places
        if batch.images is not None:
            for parts, (hierarchy, stages) in zip(found, networks, strict=True):
                for stage, pooled in zip(stages, stage_features(hierarchy, batch.images, stages), strict=True):
                    parts[stage].append(pooled.cpu())
    if not places:
        raise UserError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    return [
        StageFeatures({stage: torch.cat(each) for stage, each in parts.items()}, torch.tensor(places), unreadable)
        for parts in found
    ]


def frozen_hierarchy(weights: Weights, model: str | nn.Module | None, device: torch.device) -> Hierarchy:
    """Returns the pretrained encoder's feature maps in evaluation mode, without gradients; copies a module."""
    return weights.encoder_hierarchy(own_module(model)).to(device).requires_grad_(False)


def check_stage(stage: int | None, hierarchy: Hierarchy, name: str) -> int:
    """Returns the stage, or the deepest if None; refuses one that the network does not have."""
    count = len(hierarchy.strides)
    if stage is not None and not 1 <= stage <= count:
        stages = counted(count, "stage")
        raise UserError(f"stage is {stage}, but {name} has {stages}; choose 1 to {count} (1 is the shallowest)")
    return stage or count
