"""Linear classifiers on frozen features: the probe with its sweep of learning rates, and logistic regression."""

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
"""Share of the training features of each class that is held out to choose the learning rate."""

_FEWEST_STEPS = 1000


@dataclass(frozen=True)
class Standardiser:
    """Shifts and scales features to mean 0 and mean square norm 1; constant ones are only shifted."""

    mean: Tensor  # [C]
    scale: Tensor  # [C], the standard deviation times sqrt(C)

    @classmethod
    def of(cls, features: Tensor) -> Standardiser:
        """Fits training features `[n, C]`."""
        std = features.std(0, correction=0)
        mean = features.mean(0)
        varies = std > 1e-6 * mean.abs()  # below, the deviation is rounding error
        return cls(mean, torch.where(varies, std, 1.0) * math.sqrt(features.shape[1]))

    def __call__(self, features: Tensor) -> Tensor:
        """Standardises features `[m, C]`."""
        return (features - self.mean) / self.scale


def fit_logistic(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Fits multinomial logistic regression to its optimum by L-BFGS in double precision.

    Minimises the mean cross-entropy plus `weight_decay / 2 · ‖weight‖²`; the bias is not decayed. In scikit-learn's
    terms, `LogisticRegression(C=1 / (weight_decay · n))`. Without weight decay, separable classes have no optimum.

    Takes features `[n, C]`, preferably standardised, and labels, long `[n]`; returns weight `[classes, C]` and bias
    `[classes]`, in the data type of the features.
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
    """Trains a linear classifier for each learning rate, all side by side on the same batches.

    Minimises the cross-entropy by stochastic gradient descent with Nesterov momentum 0.9, a cosine schedule from the
    learning rate to zero, and no weight decay. The classifiers are rows of one matrix. SGD with momentum is linear in
    the gradient, so one optimiser at rate 1 serves them all when each loss is multiplied by its learning rate. Passes
    over the features are repeated beyond `epochs` until they make 1000 steps.

    Takes standardised features `[n, C]` and labels, long `[n]`; returns weights `[r, C, classes]` and biases
    `[r, classes]` for r rates, not finite if a rate was too high.
    """
    n, width = features.shape
    device = features.device
    steps_per_epoch = math.ceil(n / batch_size)
    steps = max(epochs * steps_per_epoch, _FEWEST_STEPS)
    weight = torch.zeros(len(rates) * classes, width, device=device, requires_grad=True)
    bias = torch.zeros(len(rates) * classes, device=device, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    scale = torch.tensor(rates, device=device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0)
    for step in range(steps):
        place = step % steps_per_epoch
        if place == 0:
            order = torch.randperm(n, generator=generator).to(device)
        chosen = order[place * batch_size : (place + 1) * batch_size]
        with torch.enable_grad():
            logits = F.linear(features[chosen], weight, bias).view(-1, classes)  # [b · r, classes]
            losses = F.cross_entropy(logits, labels[chosen].repeat_interleave(len(rates)), reduction="none")
            loss = losses.view(-1, len(rates)).mean(0) @ scale
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        optimiser.step()
        schedule.step()
    return weight.detach().view(len(rates), classes, width).transpose(1, 2), bias.detach().view(len(rates), classes)


@dataclass(frozen=True)
class Probe:
    """Result of a linear probe."""

    accuracy: float  # on the test features
    learning_rate: float  # the one with the highest accuracy on held-out training features
    held_out: dict[float, float]  # that accuracy by learning rate


def linear_probe(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, classes: Sequence[str],
    epochs: int = 100, batch_size: int = 256, seed: int = 0,
) -> Probe:  # fmt: skip
    """Trains a linear classifier on training features `[n, C]` and returns its accuracy on test features `[m, C]`.

    The learning rate is chosen on a held-out fifth of the training features of each class; the classifier is then
    trained on all of them. The test features serve for the final accuracy only.

    Raises:
        UserError: if a class has only one training feature.
    """
    parts = Labelled(list(range(len(bank))), bank_labels.cpu(), list(classes)).split(HELD_OUT, seed)
    kept, held_out = (torch.tensor(part.items, device=bank.device) for part in parts)
    standard = Standardiser.of(bank[kept])
    heads = fit_by_rates(standard(bank[kept]), bank_labels[kept], len(classes), RATES, epochs, batch_size, seed)
    scores = _accuracies(standard(bank[held_out]), bank_labels[held_out], *heads)
    best = RATES[scores.index(max(scores))]  # the lowest of equals

    standard = Standardiser.of(bank)
    heads = fit_by_rates(standard(bank), bank_labels, len(classes), [best], epochs, batch_size, seed)
    accuracy = _accuracies(standard(queries), query_labels, *heads)[0]
    return Probe(accuracy, best, dict(zip(RATES, scores, strict=True)))


def _accuracies(features: Tensor, labels: Tensor, weights: Tensor, biases: Tensor) -> list[float]:
    """Returns the accuracies of classifiers with weights `[r, C, classes]` and biases `[r, classes]`; 0 if diverged."""
    logits = torch.einsum("nc,rck->rnk", features, weights) + biases[:, None]
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return [float(share) for share in right.double().mean(-1)]
