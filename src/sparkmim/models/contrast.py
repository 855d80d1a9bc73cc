"""A contrastive loss between two views of each image, beside the reconstruction (CAN, arXiv:2210.16870)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128
"""Features that are compared, per image (SimCLR, arXiv:2002.05709, section 4.2)."""

TEMPERATURE = 0.2
"""Of the softmax over cosines; SimCLR does best between 0.1 and 0.5 (table 5)."""


class Contrast(nn.Module):
    """Projects the features of views, and tells how well the two views of an image find each other.

    The loss is InfoNCE (SimCLR, equation 1): for each view, the cross-entropy of its partner among all other views of
    the batch, by cosine over `TEMPERATURE`.

    Args:
        channels: number of features `C` per view.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.project = nn.Sequential(
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, WIDTH)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features `[2 · images, C]`, the two views of an image in a row, to the loss, a scalar in float32 or finer."""
        projected = self.project(features)
        projected = F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)
        cosines = projected @ projected.t()  # [2 · images, 2 · images]
        cosines = cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool, device=cosines.device), -torch.inf)
        partners = torch.arange(len(cosines), device=cosines.device) ^ 1  # 1, 0, 3, 2, …
        return F.cross_entropy(cosines / TEMPERATURE, partners)
