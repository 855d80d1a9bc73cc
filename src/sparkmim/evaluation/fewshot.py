"""Few-shot classification: accuracy with a few labelled images per class, over several draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparkmim.data.labelled import Labelled
from sparkmim.data.samplers import counted_seed
from sparkmim.evaluation.linear import Standardiser, fit_logistic


def few_shot(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, classes: Sequence[str],
    shots: int, draws: int = 10, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Returns the accuracy of logistic regression on `shots` images per class, or all of fewer, for each draw.

    Takes features `[n, C]` to draw from, and test features `[m, C]`. They are standardised by the mean and deviation of
    the drawn ones. The weight decay is that of scikit-learn's `LogisticRegression(C=1)`, one over the number of images;
    nothing is tuned. A draw depends only on (seed, shots, its number), so networks are compared on the same images.
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
