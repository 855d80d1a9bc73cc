"""Linear classifiers of frozen features: the probe with its sweep of learning rates, and logistic regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.data.labelled import Labelled

RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Learning rates of the sweep, for features of mean square norm 1."""

HELD_OUT = 0.2
"""Share of every class of the training features that the rate is chosen on."""

_MOMENTUM = 0.9
_FEWEST_STEPS = 1000


@dataclass(frozen=True)
class Standardiser:
    """Subtracts the mean of features and divides by their deviation, so that their mean square norm is 1.

    Attributes:
        mean: `[C]`.
        scale: `[C]`, the deviation times `sqrt(C)`; a feature that does not vary is only shifted.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardiser:
        """That of training features `[n, C]`."""
        std = features.std(0, correction=0)
        mean = features.mean(0)
        varies = std > 1e-6 * mean.abs()  # else it is rounding
        return cls(mean, torch.where(varies, std, 1.0) * math.sqrt(features.shape[1]))

    def __call__(self, features: Tensor) -> Tensor:
        """`[m, C]` to `[m, C]`."""
        return (features - self.mean) / self.scale


def fit_logistic(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression, solved to its optimum by L-BFGS in double precision.

    Minimises the mean cross-entropy plus `weight_decay / 2 · ‖weight‖²`; the bias is not decayed. In scikit-learn's
    terms, `LogisticRegression(C=1 / (weight_decay · n))`.

    Args:
        features: `[n, C]`, best standardised.
        labels: long `[n]`.
        classes: how many there are.
        weight_decay: above 0, for without it separable classes have no optimum.

    Returns:
        Weight `[classes, C]` and bias `[classes]`, in the precision of the features.
    """
    x = features.double()
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(x @ weight.t() + bias, labels) + weight_decay / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach().to(features.dtype), bias.detach().to(features.dtype)


def fit_by_rates(
    features: Tensor, labels: Tensor, classes: int, rates: Sequence[float], epochs: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """One linear classifier for each learning rate, trained side by side on the same batches.

    Stochastic gradient descent on the cross-entropy with Nesterov momentum 0.9 and a cosine from the rate to zero,
    without weight decay, as linear probes usually are. All classifiers are columns of one matrix product, so that a
    sweep costs little more than one of them.

    Args:
        features: standardised, `[n, C]`.
        labels: long `[n]`.
        classes: how many there are.
        rates: `r` learning rates.
        epochs: passes over the features; there are more where these make fewer than 1000 steps.
        batch_size: features per step.
        seed: of their order.

    Returns:
        Weights `[r, C, classes]` and biases `[r, classes]`; not finite where a rate was too high.
    """
    n, width = features.shape
    device = features.device
    steps_per_epoch = math.ceil(n / batch_size)
    steps = max(epochs * steps_per_epoch, _FEWEST_STEPS)
    generator = torch.Generator().manual_seed(seed)
    x = F.pad(features, (0, 1), value=1.0)  # [n, C + 1], the last for the bias
    weight = torch.zeros(width + 1, len(rates), classes, device=device)
    velocity = torch.zeros_like(weight)
    rate_of = torch.tensor(rates, device=device)[:, None]  # [r, 1]
    order = torch.empty(0)
    for step in range(steps):
        place = step % steps_per_epoch
        if place == 0:
            order = torch.randperm(n, generator=generator).to(device)
        chosen = order[place * batch_size : (place + 1) * batch_size]
        rows, targets = x[chosen], labels[chosen]  # [b, C + 1], [b]
        error = (rows @ weight.flatten(1)).view(-1, len(rates), classes).softmax(-1)  # [b, r, classes]
        error[torch.arange(len(chosen), device=device), :, targets] -= 1
        slope = (rows.t() @ error.flatten(1)).view_as(weight) / len(chosen)
        velocity.mul_(_MOMENTUM).add_(slope)
        rate = rate_of * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        weight -= rate * (slope + _MOMENTUM * velocity)
    weight = weight.transpose(0, 1)  # [r, C + 1, classes]
    return weight[:, :-1], weight[:, -1]


@dataclass(frozen=True)
class Probe:
    """What a linear probe came to.

    Attributes:
        accuracy: share of the test features that it classifies rightly.
        learning_rate: the rate that was best on held-out training features.
        held_out: the accuracy there, by rate.
    """

    accuracy: float
    learning_rate: float
    held_out: dict[float, float]


def linear_probe(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, classes: Sequence[str],
    epochs: int = 100, batch_size: int = 256, seed: int = 0,
) -> Probe:  # fmt: skip
    """Accuracy of a linear classifier of frozen features.

    A fifth of every class of the training features is set apart; the learning rate that does best there is used to
    train once more on all of them. Test features are seen by the result alone.

    Args:
        bank: features `[n, C]` to train on.
        bank_labels: their classes, long `[n]`.
        queries: test features `[m, C]`.
        query_labels: long `[m]`.
        classes: names.
        epochs: passes over the features.
        batch_size: features per step.
        seed: of what is set apart, and of the order.

    Raises:
        ValueError: if a class has a single training feature.
    """
    kept, apart = (
        torch.tensor(part.items, device=bank.device)
        for part in Labelled(list(range(len(bank))), bank_labels.cpu(), list(classes)).split(HELD_OUT, seed)
    )
    standard = Standardiser.of(bank[kept])
    heads = fit_by_rates(
        standard(bank[kept]), bank_labels[kept], len(classes), RATES, epochs, batch_size, seed
    )  # fmt: skip
    scores = _accuracies(standard(bank[apart]), bank_labels[apart], *heads)
    best = RATES[scores.index(max(scores))]  # the lowest of equals

    standard = Standardiser.of(bank)
    heads = fit_by_rates(standard(bank), bank_labels, len(classes), [best], epochs, batch_size, seed)
    accuracy = _accuracies(standard(queries), query_labels, *heads)[0]
    return Probe(accuracy, best, dict(zip(RATES, scores, strict=True)))


def _accuracies(features: Tensor, labels: Tensor, weights: Tensor, biases: Tensor) -> list[float]:
    """Of each classifier in weights `[r, C, classes]` and biases `[r, classes]`; 0 for those that diverged."""
    logits = torch.einsum("nc,rck->rnk", features, weights) + biases[:, None]
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return [float(share) for share in right.double().mean(-1)]
