"""The nearest-neighbour classifier, against a loop."""

import torch

from sparkmim.evaluation import knn_accuracy, knn_predict, pooled_features
from sparkmim.models import Hierarchy, create_encoder


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thirty features of four classes, and twelve queries."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 5, generator=generator), torch.randn(12, 5, generator=generator)
    labels = torch.randint(0, 4, (30,), generator=generator)
    return bank, labels, queries


def test_votes_are_weighted_as_defined() -> None:
    bank, labels, queries = problem()
    expected = []
    for query in queries:
        cosines = torch.stack([torch.cosine_similarity(query, row, dim=0) for row in bank])
        votes = torch.zeros(4)
        for index in cosines.argsort(descending=True)[:7]:
            votes[labels[index]] += (cosines[index] / 0.07).exp()
        expected.append(votes.argmax())
    assert torch.equal(knn_predict(bank, labels, queries, k=7), torch.stack(expected))


def test_accuracy_is_perfect_on_the_bank_itself() -> None:
    bank = torch.eye(6)
    labels = torch.arange(6)
    assert knn_accuracy(bank, labels, bank, labels, k=1) == 1.0
    assert knn_accuracy(bank, labels, bank, labels.flip(0), k=1) == 0.0


def test_features_do_not_depend_on_the_batch_or_the_mode() -> None:
    hierarchy = Hierarchy(create_encoder("resnet10t")).train()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = pooled_features(hierarchy, [images])
    assert hierarchy.training
    assert whole.shape == (4, hierarchy.channels[-1])
    torch.testing.assert_close(whole, pooled_features(hierarchy, images.split(1)), rtol=1e-4, atol=1e-5)


def test_small_temperatures_do_not_overflow() -> None:
    """The nearest decides, as with one neighbour."""
    bank, labels, queries = problem()
    nearest = knn_predict(bank, labels, queries, k=1)
    assert torch.equal(knn_predict(bank, labels, queries, k=7, temperature=1e-4), nearest)
