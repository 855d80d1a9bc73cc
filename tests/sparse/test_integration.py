"""Packed tensors with features of PyTorch: copies, checkpointing, autocast, threads, processes."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from agreement import assert_close, random_mask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from sparkmim.models import SparK
from sparkmim.sparse import PackedTensor, PatchLayout, pack, unpack

VISIBLE = random_mask(2, (2, 2), seed=1)


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GELU(),
        nn.Conv2d(12, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.MaxPool2d(3, 2, 1),
    )  # fmt: skip


def run(network: nn.Module, seed: int = 0, visible: Tensor = VISIBLE) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the dense output, and the gradients by name."""
    network.zero_grad()
    dtype = next(network.parameters()).dtype
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    out = unpack(network(pack(images, PatchLayout(visible))))
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert torch.equal(ours[1][name], grad), name


def test_deepcopy_before_and_after_a_run() -> None:
    network = small_network()
    before = copy.deepcopy(network)
    first = run(network)
    after = copy.deepcopy(network)
    assert_same(run(before), first)
    assert_same(run(after), run(network))


def test_the_network_is_left_as_it_was() -> None:
    network = small_network().eval()
    kept = copy.deepcopy(network.state_dict())
    hooks = [len(module._forward_hooks) for module in network.modules()]
    run(network)
    assert network.state_dict().keys() == kept.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, kept[name])
        assert type(tensor) is Tensor
    for parameter in network.parameters():
        assert type(parameter) is nn.Parameter
        assert type(parameter.grad) is Tensor
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    images = torch.randn(2, 3, 16, 16)  # and dense images still work
    assert type(network(images)) is Tensor


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network().double()
            self.stem = nn.Conv2d(3, 3, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if not self.training:
                return self.network(x)
            # Batch norm counts each batch twice, as on dense images: leave its statistics out.
            return checkpoint(self.network, x, use_reentrant=reentrant)

    model = Checkpointed()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    plain = run(model.eval())
    ours = run(model.train())
    assert_same(ours, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_as_timm_does_it(reentrant: bool) -> None:
    network = small_network().double()
    network[1], network[2] = nn.Identity(), nn.ReLU()

    class Model(nn.Module):
        def __init__(self, pieces: int) -> None:
            super().__init__()
            self.network, self.pieces = network, pieces

        def forward(self, x: Tensor) -> Tensor:
            x = self.network[0](x)
            if not self.pieces:
                return self.network[1:](x)
            return checkpoint_sequential(self.network[1:], self.pieces, x, use_reentrant=reentrant)

    assert_same(run(Model(3)), run(Model(0)))


def test_checkpointed_timm_encoder_trains_the_same() -> None:
    losses, grads = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = timm.create_model("convnext_atto", num_classes=0)
        model = SparK(encoder, image_size=64, decoder_width=32)
        encoder.set_grad_checkpointing(checkpointing)
        out = model(torch.randn(2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
        out.loss.backward()
        losses.append(out.loss.item())
        grads.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == losses[1]
    assert_close(grads[1], grads[0], "the gradients", 1e-6)


def test_an_encoder_may_be_checkpointed_already() -> None:
    encoder = timm.create_model("convnext_atto", num_classes=0)
    encoder.set_grad_checkpointing(True)
    SparK(encoder, image_size=64, decoder_width=32)


def test_autocast() -> None:
    """Outputs have the dtypes of dense images, and similar values."""
    types: dict[bool, list[torch.dtype]] = {True: [], False: []}
    maps: dict[bool, list[Tensor]] = {True: [], False: []}
    network = small_network()
    images = torch.randn(2, 3, 16, 16)
    everything = torch.ones_like(VISIBLE)
    for is_packed in (True, False):
        x: Tensor = pack(images, PatchLayout(everything)) if is_packed else images
        with torch.autocast("cpu", torch.bfloat16):
            for layer in network:
                x = layer(x)
                types[is_packed].append(x.dtype)
                maps[is_packed].append(unpack(x).float() if isinstance(x, PackedTensor) else x.float())
            gate = x.mean((2, 3), keepdim=True)
            types[is_packed] += [gate.dtype, (x * gate).dtype, x.permute(0, 2, 3, 1).softmax(-1).dtype]
    assert types[True] == types[False]
    assert torch.bfloat16 in types[True]
    for ours, theirs in zip(maps[True], maps[False], strict=True):
        assert_close(ours, theirs, "a map", 0.05)


def test_autocast_gradients() -> None:
    network = small_network()
    exact = run(network)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = unpack(network(pack(images, PatchLayout(VISIBLE))))
    out.float().square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        if name != "0.bias":  # zero by construction: a normalisation follows
            error = (parameter.grad - exact[1][name]).norm() / exact[1][name].norm()
            assert error < 0.1, name


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_gradients_in_half_precision(stride: int) -> None:
    """They match float32 up to the rounding of the inputs; on CPUs some are computed in float32."""
    conv = nn.Conv2d(6, 6, 3, stride, padding=1, groups=6)
    images = torch.randn(2, 6, 16, 16)
    layout = PatchLayout(random_mask(2, (2, 2), seed=3))
    grads = []
    for enabled in (False, True):
        inputs = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = conv(pack(inputs, layout))
        out.values.float().sin().sum().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0.05, atol=0.02)


def test_two_threads() -> None:
    visible = [random_mask(2, (2, 2), seed=seed) for seed in (1, 7)]
    expected = [run(small_network(i).double(), i, visible[i]) for i in range(2)]
    networks = [small_network(i).double() for i in range(2)]
    found: list[Any] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(10):
            found[i].append(run(networks[i], i, visible[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 10
        for result in found[i]:
            assert_same(result, expected[i])


# Several processes: a group of one


@pytest.fixture
def _one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel() -> None:
    torch.manual_seed(0)
    model = SparK("resnet18", image_size=64, decoder_width=32)
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64)
    visible = model.draw_visible(2)
    wrapped = DistributedDataParallel(model)
    for network in (wrapped, twin):
        network(images, visible).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None, name
        assert torch.equal(ours.grad, theirs.grad), name


def test_sync_batch_norm_outside_of_a_group() -> None:
    plain = small_network().double()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synced[1], nn.SyncBatchNorm)
    assert_same(run(synced), run(plain))
    assert_same(run(synced.eval()), run(plain.eval()))


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("visible", [VISIBLE, random_mask(2, (2, 2), ragged=True, seed=9)])
def test_sync_batch_norm_in_a_group(monkeypatch: pytest.MonkeyPatch, visible: Tensor) -> None:
    """With CUDA's five kernels written in PyTorch, its autograd function gives the same as BatchNorm."""
    for name, kernel in SYNC_KERNELS.items():
        monkeypatch.setattr(torch, name, dispatching(name, kernel))

    class Synced(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            function = torch.nn.modules._functions.SyncBatchNorm
            settings = (self.running_mean, self.running_var, self.eps, self.momentum, dist.group.WORLD, 1)
            out: Tensor = function.apply(x, self.weight, self.bias, *settings)
            return out

    networks = []
    for norm in (Synced, nn.BatchNorm2d):
        torch.manual_seed(0)
        networks.append(nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), norm(9), nn.ReLU(), nn.Conv2d(9, 4, 1)).double())
    ours, theirs = (run(network, visible=visible) for network in networks)
    assert_close(ours[0], theirs[0], "the output")
    for name, grad in theirs[1].items():
        assert_close(ours[1][name], grad, f"the gradient of {name}")
    assert_close(networks[0][1].running_mean, networks[1][1].running_mean, "the running mean")
    assert_close(networks[0][1].running_var, networks[1][1].running_var, "the running variance")


def dispatching(name: str, kernel: Any) -> Any:
    """Makes a function dispatch on its arguments' types, as PyTorch functions do."""

    def function(*args: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(function, args, *args)
        return kernel(*args)

    function.__name__ = name
    return function


def _over_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    return x.view(1, -1, *(1,) * (like.ndim - 2))


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, _over_channels(x), correction=0)
    return mean, (var + eps).rsqrt()


def _gather_stats(
    x: Tensor, means: Tensor, invstds: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = counts.sum()
    weight = (counts / total).unsqueeze(1)
    mean = (weight * means).sum(0)
    var = (weight * (invstds.pow(-2) - eps + (means - mean).square())).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def _elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return (x - _shaped(mean, x)) * _shaped(invstd * weight, x) + _shaped(bias, x)


def _backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *_: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axes = _over_channels(x)
    sum_dy, sum_dy_xmu = grad.sum(axes), (grad * (x - _shaped(mean, x))).sum(axes)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def _backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:  # fmt: skip
    total = count.sum()
    centred = grad - _shaped(sum_dy / total, x) - (x - _shaped(mean, x)) * _shaped(invstd**2 * sum_dy_xmu / total, x)
    return centred * _shaped(invstd * weight, x)


SYNC_KERNELS = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather_stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}


# Custom autograd functions


class SwishFunction(torch.autograd.Function):
    """Activation like the memory-efficient ones of older timm versions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.mul(torch.sigmoid(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return grads[0] * (sigmoid * (1 + x * (1 - sigmoid)))


@pytest.mark.parametrize(
    "visible",
    [VISIBLE, random_mask(2, (2, 2), ragged=True, seed=9), torch.tensor([[[True, False]], [[False, True]]])],
    ids=["uniform", "ragged", "one each"],
)
def test_a_custom_pointwise_function(visible: Tensor) -> None:
    """Its backward mixes stored gradients with packed tensors."""
    shape = (2, 3, *(2 * cells for cells in visible.shape[1:]))
    images = [torch.randn(shape, dtype=torch.float64).requires_grad_()]
    images.append(images[0].detach().clone().requires_grad_())
    weight = torch.randn(shape, dtype=torch.float64)
    outs = [
        unpack(function(pack(x, PatchLayout(visible)) * 1))
        for function, x in zip((SwishFunction.apply, nn.functional.silu), images, strict=True)
    ]
    assert_close(outs[0], outs[1], "the output")
    grads = [torch.autograd.grad((out * weight).sum(), x)[0] for out, x in zip(outs, images, strict=True)]
    assert_close(grads[0], grads[1], "the gradient")


def test_a_compiled_encoder_is_refused() -> None:
    encoder = torch.compile(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(ValueError, match=r"wrapped by torch\.compile; pass the module itself"):
        SparK(encoder, image_size=64)
