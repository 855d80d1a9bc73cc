"""Features of whole images from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparkmim.models import Hierarchy


@torch.no_grad()
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
        pooled = [hierarchy(images.to(device))[-1].flatten(2).mean(-1).float().cpu() for images in batches]
    finally:
        hierarchy.train(training)
    return torch.cat(pooled)
