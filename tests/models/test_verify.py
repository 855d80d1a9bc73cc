"""`verify_encoder` finds exact networks exact, and points at the module where one is not."""

from typing import Any

import pytest
import torch
from small_networks import PlainCNN, signal_network, volume_network
from torch import Tensor, nn

from sparkmim.models import create_encoder, verify_encoder
from sparkmim.sparse.packed import RULES, PackedTensor


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_networks_of_timm(name: str) -> None:
    report = verify_encoder(name, image_size=64)
    assert report.exact, report.message
    assert report.error < 1e-6
    assert report.module is None
    assert report.message.startswith("exact")


def test_networks_of_other_ranks() -> None:
    assert verify_encoder(volume_network(), image_size=(8, 8, 8), channels=1).exact
    assert verify_encoder(signal_network(), image_size=(32,), channels=2).exact
    assert verify_encoder(PlainCNN(), image_size=(16, 24)).exact
    assert verify_encoder(PlainCNN(), patch_size=16).exact
    assert verify_encoder(PlainCNN()).exact


class Reducing(nn.Module):
    """Reductions over all that is visible, and in spellings of long ago."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)])
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
            if self.kind == "all":
                x = x - x.mean() + torch.max(x)
            elif self.kind == "channels last":
                x = x - x.permute(0, 2, 3, 1).sum() / 100
            elif self.kind == "logsumexp":
                x = x - x.logsumexp((2, 3), keepdim=True)
            else:
                x = x / (x.var((2, 3), False, True) + 1e-3).sqrt()
        return x


@pytest.mark.parametrize("kind", ["all", "channels last", "logsumexp", "var"])
def test_reductions(kind: str) -> None:
    result = verify_encoder(Reducing(kind))
    assert result.exact, result.message


def test_the_network_is_left_alone() -> None:
    encoder = PlainCNN().eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    verify_encoder(encoder)
    assert not encoder.training
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(module._forward_hooks for module in encoder.modules())


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Shift(nn.Module):
    """Pointwise to the eye, and different on what it should not look at."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1e-3 if isinstance(x, PackedTensor) else 0.0)


class Stash(nn.Module):
    """Right forward, wrong backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]).view(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.detach() if isinstance(x, PackedTensor) else self.scale
        return x * scale.repeat(2, 1, 1)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.Sequential(nn.ReLU(), *layers), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1)
    )


def test_an_operation_without_a_rule() -> None:
    report = verify_encoder(network(Flip()))
    assert not report.exact
    assert report.error == float("inf")
    assert report.module is not None
    assert report.module.endswith("1.1")
    assert "`flip`" in report.message


def test_a_layer_that_behaves_differently_on_packed_maps() -> None:
    assert verify_encoder(network()).exact
    report = verify_encoder(network(Shift()))
    assert not report.exact
    assert report.error > 1e-6
    assert report.module is not None
    assert report.module.endswith("1.1")


def test_a_gradient_that_is_lost() -> None:
    report = verify_encoder(network(Stash()))
    assert not report.exact
    assert report.error > 1e-6
    assert "`1.1.scale`" in report.message


def test_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["max_pool2d"]

    def wrong(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = right(func, x, *args, **kwargs)
        out.mul_(1 + 1e-4)
        return out

    monkeypatch.setitem(RULES, "max_pool2d", wrong)
    report = verify_encoder(network())
    assert not report.exact
    assert 1e-6 < report.error < 1e-2
    assert report.module is not None
    assert report.module.rpartition(".")[2] == "2"


def test_a_rule_that_is_wrong_at_halos_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that do not see their neighbours: right in the middle of a patch, wrong at its edge."""

    def wrong(func: Any, x: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        from sparkmim.sparse.packed import like

        return like(x, func(x.values, weight, *args, **kwargs))

    monkeypatch.setitem(RULES, "conv2d", wrong)
    report = verify_encoder(network())
    assert not report.exact
    assert report.module is not None
    assert report.module.rpartition(".")[2] == "3"


def test_errors() -> None:
    with pytest.raises(ValueError, match="is not a multiple of the patch size"):
        verify_encoder(PlainCNN(), image_size=33)
    with pytest.raises(ValueError, match="timm has no model"):
        verify_encoder("resnet5O")


def test_an_instance_and_a_name_alike() -> None:
    assert verify_encoder(create_encoder("resnet10t"), image_size=64).exact
