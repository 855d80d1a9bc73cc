"""Gradient checkpointing: the same numbers, from less that is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from small_networks import PlainCNN
from torch import Tensor, nn

from sparkmim.models import SparK
from sparkmim.models.checkpointing import checkpointing
from sparkmim.models.spark import DecoderKind


class DenseBlock(nn.Module):
    """Layers that take a list of maps, which grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Concatenating(nn.Conv2d(8 * (i + 1), 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class Concatenating(nn.Sequential):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return super().forward(torch.cat(maps, 1))


def dense_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), DenseBlock(), nn.Sequential(nn.Conv2d(32, 8, 3, 2, 1), nn.ReLU()))


def trained(factory: Callable[[], Any], decoder: DecoderKind, saving: bool) -> tuple[Tensor, dict[str, Any]]:
    """Returns the loss of a step, and all gradients and buffers after it."""
    torch.manual_seed(0)
    model = SparK(factory(), 64, decoder=decoder, decoder_width=32, checkpoint_gradients=saving).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    loss = model(images, generator=torch.Generator().manual_seed(0)).loss
    loss.backward()
    after = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {**after, **dict(model.named_buffers())}


@pytest.mark.parametrize("decoder", ["spark", "fcmae"])
@pytest.mark.parametrize(
    "factory",
    [
        PlainCNN,
        dense_network,
        lambda: timm.create_model("resnet18", num_classes=0, drop_path_rate=0.3),
        lambda: timm.create_model("convnext_atto", num_classes=0, drop_path_rate=0.3),
    ],
    ids=["plain", "dense", "resnet18", "convnext_atto"],
)
def test_a_step_is_the_same_to_the_bit(factory: Callable[[], Any], decoder: DecoderKind) -> None:
    """Gradients, running statistics, and what drop path and dropout draw."""
    (loss, after), (expected, expected_after) = (trained(factory, decoder, saving) for saving in (True, False))
    assert loss == expected
    for name, value in after.items():
        torch.testing.assert_close(value, expected_after[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("network", ["resnet18", "convnext_atto"])
def test_less_is_kept(network: str) -> None:
    kept = {}
    for saving in (False, True):
        model = SparK(network, 64, decoder_width=32, checkpoint_gradients=saving)
        with torch.profiler.profile(profile_memory=True) as profiler:
            loss = model(torch.zeros(4, 3, 64, 64)).loss
        kept[saving] = sum(
            event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
        )
        assert loss.requires_grad
    assert kept[True] < 0.6 * kept[False]


def test_nothing_is_computed_again_without_gradients() -> None:
    model = SparK(PlainCNN(), 32, decoder_width=16, checkpoint_gradients=True)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.encoder.stem[0].register_forward_hook(count)  # type: ignore[index, operator, union-attr]
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    assert calls == 2
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert calls == 3
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_network_is_left_as_it_was() -> None:
    network = PlainCNN()
    network.stage1.forward = own = network.stage1.forward  # type: ignore[method-assign]
    with checkpointing(network):
        assert network.stage1.forward is not own
        assert "forward" in vars(network.stem)
    assert network.stage1.forward is own
    assert "forward" not in vars(network.stem)


class Mixing(nn.Module):
    """Takes a tensor by keyword, in a dictionary in a list, which it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, *, maps: list[dict[str, Tensor]]) -> Tensor:
        last = maps.pop()
        last["x"] = self.norm(self.conv(last["x"]))
        return last["x"]


class Unusual(nn.Module):
    """Modules under two names, one called twice, and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.layers = nn.ModuleList([self.first, nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.Tanh())])
        self.mixing = Mixing()
        self.last = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[1]):
            x = layer(x)
        x = self.mixing(maps=[{"x": x}])
        out: Tensor = self.last(x)
        return out


def test_unusual_networks() -> None:
    (loss, after), (expected, expected_after) = (trained(Unusual, "spark", saving) for saving in (True, False))
    assert loss == expected
    for name, value in after.items():
        torch.testing.assert_close(value, expected_after[name], rtol=0, atol=0, msg=name)


def test_random_generators_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch restores generators of the devices that it finds among the arguments of a checkpoint."""
    found: list[int] = []
    own = torch.utils.checkpoint.checkpoint

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(sum(isinstance(arg, Tensor) for arg in args))
        return own(function, *args, **kwargs)

    monkeypatch.setattr("sparkmim.models.checkpointing.checkpoint", noted)
    SparK("resnet18", 64, decoder_width=32, checkpoint_gradients=True)(torch.randn(2, 3, 64, 64))
    assert len(found) > 8
    assert min(found) >= 1


def test_a_network_that_checkpoints_itself() -> None:
    def itself() -> nn.Module:
        network = timm.create_model("convnext_atto", num_classes=0)
        network.set_grad_checkpointing(True)
        return network

    (loss, after), (expected, expected_after) = (trained(itself, "spark", saving) for saving in (True, False))
    assert loss == expected
    for name, value in after.items():
        torch.testing.assert_close(value, expected_after[name], rtol=0, atol=0, msg=name)


def test_two_backward_passes() -> None:
    model = SparK("resnet18", 64, decoder_width=32, checkpoint_gradients=True)
    loss = model(torch.randn(2, 3, 64, 64)).loss
    grads = [torch.autograd.grad(loss, model.encoder.conv1.weight, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)


def test_a_part_that_changes_its_input_is_refused() -> None:
    first = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1))
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), first)
    model = SparK(network, 32, decoder_width=16, checkpoint_gradients=True)
    with pytest.raises(ValueError, match="module 1 changes its input in place, .* without inplace=True"):
        model(torch.randn(2, 3, 32, 32))


class Late(nn.Module):
    """Changes the input of a part after the part has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.short = nn.Sequential(nn.Dropout2d(0.3), nn.Conv2d(8, 16, 3, 2, 1))
        self.act, self.out = nn.ReLU(inplace=True), nn.ReLU()
        self.conv = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.short(x)
        out: Tensor = self.out(self.conv(self.act(x)) + y)
        return out


def test_a_change_after_the_part_is_refused() -> None:
    model = SparK(Late(), 32, decoder_width=16, checkpoint_gradients=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(2, 3, 32, 32)).loss.backward()
