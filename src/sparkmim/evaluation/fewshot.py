"""Few-shot classification: how far a handful of labelled images goes, over several draws of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparkmim.data import counted_seed
from sparkmim.data.labelled import Labelled
from sparkmim.evaluation.linear import Standardiser, fit_logistic


def few_shot(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, classes: Sequence[str],
    shots: int, draws: int = 10, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Accuracy of logistic regression on so many images of each class, for each of several draws.

    Features are standardised by the mean and deviation of those drawn, and the decay is that of scikit-learn's
    `LogisticRegression(C=1)`: one over the number of images. Nothing is tuned, for a few images leave none to tune on.
    A draw depends on (seed, shots, its number) alone, so that networks are compared on the same images.

    Args:
        bank: features `[n, C]` to draw from.
        bank_labels: their classes, long `[n]`.
        queries: test features `[m, C]`.
        query_labels: long `[m]`.
        classes: names.
        shots: images per class; all of a class that has fewer.
        draws: how many.
        seed: of the draws.

    Returns:
        Share of the test features classified rightly, by draw.
    """
    every = Labelled(list(range(len(bank))), bank_labels.cpu(), list(classes))
    accuracies = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(counted_seed(seed, shots, draw, "few-shot"))
        drawn = torch.tensor(every.draw(shots, generator).items, device=bank.device)
        standard = Standardiser.of(bank[drawn])
        weight, bias = fit_logistic(standard(bank[drawn]), bank_labels[drawn], len(classes), 1 / len(drawn))
        predicted = (standard(queries) @ weight.t() + bias).argmax(1)
        accuracies.append((predicted == query_labels).double().mean().item())
    return accuracies
