"""Linear classifiers, against scikit-learn and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sparkmim.evaluation import few_shot, fit_logistic, linear_probe
from sparkmim.evaluation.linear import RATES, Standardiser, fit_by_rates


def problem(n: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three overlapping classes in ten dimensions of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.randn(3, 10, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + 1.5 * torch.randn(n, 10, generator=generator)
    return features * torch.logspace(-3, 3, 10) + 5, labels


def halves(n: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Features to train on, features to test on, each with labels, and names of the classes."""
    return *problem(n), *problem(n, seed=1), ["a", "b", "c"]


def objective(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float) -> float:
    return (F.cross_entropy(x @ weight.t() + bias, labels) + decay / 2 * weight.square().sum()).item()


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_logistic_regression_is_that_of_scikit_learn(decay: float) -> None:
    features, labels = problem()
    x = Standardiser.of(features)(features).double()
    weight, bias = fit_logistic(x, labels, 3, decay)
    theirs = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, rtol=1e-4, atol=1e-5)
    shift = bias - bias.mean()  # a constant on all biases changes nothing
    np.testing.assert_allclose(shift.numpy(), theirs.intercept_ - theirs.intercept_.mean(), rtol=1e-4, atol=1e-5)


def test_the_probe_descends_to_the_optimum() -> None:
    features, labels = problem()
    x = Standardiser.of(features)(features)
    best = objective(x.double(), labels, *fit_logistic(x.double(), labels, 3, 1e-9), 0.0)
    weights, biases = fit_by_rates(x, labels, 3, [3.0, 10.0], epochs=400, batch_size=64, seed=0)
    for weight, bias in zip(weights, biases, strict=True):
        assert objective(x, labels, weight.t(), bias, 0.0) == pytest.approx(best, rel=2e-2)


def test_a_step_is_sgd_with_nesterov_momentum() -> None:
    features, labels = problem(50)
    x = Standardiser.of(features)(features)
    weights, biases = fit_by_rates(x, labels, 3, [0.5, 2.0], epochs=2, batch_size=32, seed=3)
    for rate, weight, bias in zip((0.5, 2.0), weights, biases, strict=True):
        layer = torch.nn.Linear(10, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, nesterov=True)
        generator = torch.Generator().manual_seed(3)
        for step in range(1000):
            if step % 2 == 0:
                order = torch.randperm(50, generator=generator)
            chosen = order[:32] if step % 2 == 0 else order[32:]
            optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / 1000)) / 2
            optimiser.zero_grad()
            F.cross_entropy(layer(x[chosen]), labels[chosen]).backward()
            optimiser.step()
        torch.testing.assert_close(weight.t(), layer.weight.detach(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-3, atol=1e-3)


def test_the_probe_is_as_good_as_scikit_learn_on_new_features_and_repeats() -> None:
    split = features, labels, queries, answers, _ = halves(600)
    probe = linear_probe(*split, epochs=20)
    standard = Standardiser.of(features)
    theirs = LogisticRegression(C=10.0, max_iter=1000).fit(standard(features).numpy(), labels.numpy())
    assert probe.accuracy >= theirs.score(standard(queries).numpy(), answers.numpy()) - 0.02
    assert probe == linear_probe(*split, epochs=20)


def test_the_rate_is_chosen_without_the_test_features() -> None:
    split = halves()
    right = linear_probe(*split, epochs=1)
    wrong = linear_probe(*split[:3], (split[3] + 1) % 3, split[4], epochs=1)
    assert (right.learning_rate, right.held_out) == (wrong.learning_rate, wrong.held_out)
    assert list(right.held_out) == list(RATES)
    assert right.held_out[right.learning_rate] == max(right.held_out.values())


def test_standardised_features_have_mean_square_norm_one_even_if_some_never_vary() -> None:
    features, _ = problem()
    features = torch.cat([features, torch.full((300, 2), 7.0)], 1)
    x = Standardiser.of(features)(features)
    torch.testing.assert_close(x.mean(0), torch.zeros(12), rtol=0, atol=2e-4)  # the first varies by 0.001 around 5
    assert x.square().sum(1).mean().item() == pytest.approx(10 / 12, rel=1e-4)
    assert x.isfinite().all()


def test_few_shot_draws_depend_on_the_seed_alone_and_are_fitted_as_by_scikit_learn() -> None:
    split = features, labels, queries, answers, _ = halves()
    found = few_shot(*split, shots=5, draws=6, seed=1)
    assert found == few_shot(*split, shots=5, draws=6, seed=1)
    assert len(found) == 6
    assert len(set(found)) > 1
    # As many shots as there are images leave nothing to draw.
    every = few_shot(*split, shots=100, draws=2)
    standard = Standardiser.of(features)
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(standard(features).numpy(), labels.numpy())
    assert every == pytest.approx([theirs.score(standard(queries).numpy(), answers.numpy())] * 2)
