"""The weighted k-nearest-neighbour classifier of Wu et al. (CVPR 2018, arXiv:1805.01978)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 2**26
"""Maximum number of similarities held at a time: 256 MiB."""


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Predicts classes, long `[m]`, by a vote of the nearest neighbours, weighted by `exp(cosine / temperature)`.

    Takes features `[n, C]` and labels, long `[n]`, of the bank, which all vote if they are fewer than `k`, and features
    `[m, C]`.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = int(labels.max()) + 1
    predicted = []
    for part in torch.split(queries, max(1, _SIMILARITIES // len(bank))):
        similarity, nearest = (part @ bank.t()).topk(min(k, len(bank)), dim=1)  # [m, k]
        votes = torch.zeros(len(part), classes, device=part.device)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # [m, k], 1 for the nearest: no overflow
        votes.scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Returns the share of queries that `knn_predict` classifies correctly."""
    return (knn_predict(bank, bank_labels, queries, k, temperature) == query_labels).float().mean().item()
