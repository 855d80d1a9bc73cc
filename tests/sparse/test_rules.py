"""Every rule against the definition, on random masks, in 1, 2 and 3 dimensions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from agreement import agree, assert_close, dense_of, examples, masks, random_mask, randomised, upsample
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from sparkmim.sparse import PackedTensor, PatchLayout, pack, unpack, windows
from sparkmim.sparse.rules import kernels

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
RAGGED = random_mask(3, (2, 3), ragged=True, seed=1)
UNIFORM = random_mask(2, (2, 2), seed=2)
BOTH = pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])


class Apply(nn.Module):
    """Module from a function of modules, so that their parameters and buffers are compared too."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(*self.parts, x)


# Convolution


@st.composite
def convolutions(draw: st.DrawFn, rank: int) -> tuple[Tensor, list[int], nn.Module, int]:
    """Draws a mask, a block, and a convolution that divides the size by its stride."""
    visible = draw(masks(rank))
    largest = {1: 7, 2: 7, 3: 3}[rank]
    kernel, stride, dilation, padding, block = [], [], [], [], []
    same = draw(st.sampled_from([False, False, True]))
    for cells in visible.shape[1:]:
        k = draw(st.integers(1, largest))
        s = 1 if same else draw(st.integers(1, 3 if rank < 3 else 2))
        d = draw(st.integers(1, 2))
        b = s * draw(st.integers(1, 3 if rank < 3 else 2))
        span = d * (k - 1)
        # Symmetric padding p keeps correspondence iff floor((size + 2 p - span - 1) / s) + 1 == size / s.
        fitting = [p for p in range(span + 1) if (cells * b + 2 * p - span - 1) // s + 1 == cells * b // s]
        if not same:
            assume(fitting and cells * b + 2 * fitting[-1] > span)
            padding.append(draw(st.sampled_from(fitting)))
        kernel.append(k)
        stride.append(s)
        dilation.append(d)
        block.append(b)
    channels, out, groups = draw(
        st.sampled_from([
            (3, 4, 1),  # few channels
            (10, 3, 1),  # many
            (6, 4, 2),  # grouped
            (4, 4, 4),  # depthwise
            (4, 8, 4),  # and with a multiplier
        ])
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 10**6)))
    module = CONV[rank](
        channels, out, tuple(kernel), tuple(stride), "same" if same else tuple(padding), tuple(dilation), groups,
        bias=draw(st.booleans()),
    )  # fmt: skip
    return visible, block, module.double(), channels


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution(rank: int) -> None:
    @given(convolutions(rank))
    @examples({1: 60, 2: 80, 3: 30}[rank])
    def check(case: tuple[Tensor, list[int], nn.Module, int]) -> None:
        visible, block, module, channels = case
        agree(module, visible, block, channels)

    check()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("groups", [1, 3])
def test_same_padding(kernel: int, dilation: int, channels: int, groups: int) -> None:
    module = nn.Conv2d(channels, 6, kernel, padding="same", dilation=dilation, groups=groups).double()
    agree(module, RAGGED, (2, 2), channels)
    # With the smallest patches, windows are larger than the map, so the dense kernel runs on the map.
    agree(module, torch.ones(2, 3, 3, dtype=torch.bool), (1, 1), channels)


def test_all_four_ways_to_convolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, gathered rows, windows and whole maps are each used for the cases above."""
    called = []
    for place, name in (
        (kernels, "multiply_rows"),
        (kernels, "gather_convolution"),
        (windows._Windows, "images"),
        (windows._Maps, "images"),
    ):
        original, label = getattr(place, name), f"{place.__name__.rpartition('.')[2]}.{name}"
        monkeypatch.setattr(place, name, lambda *args, _f=original, _label=label: (called.append(_label), _f(*args))[1])
    sparse = torch.zeros(1, 4, 4, dtype=torch.bool)
    sparse[0, 1, 1] = sparse[0, 2, 2] = True
    full = torch.ones(1, 4, 4, dtype=torch.bool)
    for channels, groups, kernel, visible, block, expected in (
        (12, 1, 3, sparse, 2, "kernels.gather_convolution"),
        (12, 1, 1, sparse, 2, "kernels.multiply_rows"),
        (3, 1, 3, sparse, 2, "_Windows.images"),
        (12, 12, 7, sparse, 4, "_Windows.images"),
        (3, 1, 3, full, 2, "_Maps.images"),
        (12, 12, 7, full, 1, "_Maps.images"),
    ):
        called.clear()
        x = pack(torch.randn(1, channels, 4 * block, 4 * block), PatchLayout(visible))
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups)(x)
        assert called == [expected]
    called.clear()
    nn.Conv2d(3, 8, 4, stride=4)(pack(torch.randn(1, 3, 16, 16), PatchLayout(sparse)))
    assert called == ["kernels.gather_convolution"]  # patches that do not overlap: few channels are enough


def test_linear_and_matmul() -> None:
    def network(linear: nn.Module, x: Tensor) -> Any:
        x = linear(x.permute(0, 2, 3, 1))
        return (
            x,
            x @ torch.arange(10.0, dtype=torch.float64).view(5, 2),
            torch.matmul(x, torch.ones_like(linear.weight).double()),
        )

    agree(Apply(network, nn.Linear(3, 5).double()), RAGGED, (2, 2))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(16, 8, 1),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Conv2d(16, 8, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, 7, padding=3, groups=16),
    ],
    ids=str,
)
def test_float32(module: nn.Module) -> None:
    """Float32 has its own kernels, which agree with the dense convolution, forward and backward."""
    visible = random_mask(2, (4, 4), seed=5)
    dense = torch.randn(2, 16, 64, 64)
    inputs = [dense.clone().requires_grad_() for _ in range(2)]
    ours = unpack(module(pack(inputs[0], PatchLayout(visible))))
    theirs = module(inputs[1] * upsample(visible, (16, 16)).unsqueeze(1))
    theirs = theirs * upsample(visible, [size // 4 for size in theirs.shape[2:]]).unsqueeze(1)
    assert_close(ours, theirs, "the convolution", 1e-5)
    grads = [
        torch.autograd.grad(out.square().sum(), (*module.parameters(), x))
        for out, x in zip((ours, theirs), inputs, strict=True)
    ]
    for index, (our_grad, their_grad) in enumerate(zip(*grads, strict=True)):
        assert_close(our_grad, their_grad, f"gradient {index}", 1e-5)


# Pooling


@st.composite
def pools(draw: st.DrawFn, rank: int, dilated: bool) -> tuple[Tensor, list[int], dict[str, Any]]:
    visible = draw(masks(rank))
    ceil_mode = draw(st.booleans())
    settings: dict[str, list[int]] = {"kernel_size": [], "stride": [], "padding": [], "dilation": []}
    block = []
    for cells in visible.shape[1:]:
        k = draw(st.integers(1, 5 if rank < 3 else 3))
        s = draw(st.integers(1, 3 if rank < 3 else 2))
        d = draw(st.integers(1, 2)) if dilated else 1
        b = s * draw(st.integers(1, 3 if rank < 3 else 2))
        size = cells * b

        def fits(p: int, k: int = k, s: int = s, d: int = d, size: int = size) -> bool:
            span = size + 2 * p - d * (k - 1) - 1
            if span < 0:
                return False
            out = -(-span // s) + 1 if ceil_mode else span // s + 1
            if ceil_mode and (out - 1) * s >= size + p:
                out -= 1
            # PyTorch reads and writes out of bounds where a window lies entirely in the padding.
            somewhere = all(any(0 <= o * s - p + t * d < size for t in range(k)) for o in range(out))
            return out == size // s and somewhere

        fitting = [p for p in range(k // 2 + 1) if fits(p)]
        assume(fitting)
        for name, value in zip(settings, (k, s, draw(st.sampled_from(fitting)), d), strict=True):
            settings[name].append(value)
        block.append(b)
        assume(rank < 3 or dilated or size >= k)  # avg_pool3d needs maps as large as its kernel
    if not dilated:
        del settings["dilation"]
    return visible, block, {**settings, "ceil_mode": ceil_mode}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_max_pool(rank: int) -> None:
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[rank]

    @given(pools(rank, dilated=True))
    @examples({1: 40, 2: 50, 3: 20}[rank])
    def check(case: tuple[Tensor, list[int], dict[str, Any]]) -> None:
        visible, block, settings = case
        agree(pool(**settings), visible, block)

    check()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_avg_pool(rank: int) -> None:
    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[rank]

    @given(pools(rank, dilated=False), st.booleans(), st.sampled_from([None, None, 5]))
    @examples({1: 40, 2: 60, 3: 20}[rank])
    def check(case: tuple[Tensor, list[int], dict[str, Any]], include: bool, divisor: int | None) -> None:
        visible, block, settings = case
        if rank > 1:
            settings["divisor_override"] = divisor
        agree(pool(count_include_pad=include, **settings), visible, block)

    check()


def test_pooling_by_default_steps_by_its_kernel() -> None:
    for function in (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.max_pool2d(x, (2, 4)),
        lambda x: F.avg_pool2d(x, kernel_size=2, stride=2),
        lambda x: torch.max_pool2d(x, 2),
    ):
        agree(function, RAGGED, (4, 4))


@BOTH
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("padding", ["", "same"])
def test_conditional_convolution(visible: Tensor, groups: int, padding: str) -> None:
    """Every sample has separate weights, for which timm folds the batch into the channels."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routing = nn.Linear(3, 2)
            self.conv = timm.layers.CondConv2d(3, 6, 3, 2, padding, groups=groups, bias=True, num_experts=2)

        def forward(self, x: Tensor) -> Tensor:
            routing = self.routing(x.mean((2, 3))).sigmoid()
            out: Tensor = self.conv(x, routing)
            return out.relu()

    agree(randomised(Conditional()), visible, (4, 4))


# Normalisation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm(rank: int, training: bool) -> None:
    @given(masks(rank), st.booleans(), st.sampled_from([0.1, None]), st.booleans())
    @examples(15)
    def check(visible: Tensor, affine: bool, momentum: float | None, tracks: bool) -> None:
        module = BATCH_NORM[rank](3, affine=affine, momentum=momentum, track_running_stats=tracks)
        agree(randomised(module).train(training), visible, (2,) * rank)

    check()


@BOTH
def test_batch_norm_momentum_is_counted(visible: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(inplace=True))
    agree(randomised(network).train(), visible, (2, 2))


@BOTH
def test_layer_norm(visible: Tensor) -> None:
    norm = randomised(nn.LayerNorm(6))
    agree(Apply(lambda norm, x: norm(x.permute(0, 2, 3, 1)), norm), visible, (2, 2), 6)
    agree(Apply(lambda norm, x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm), visible, (2, 2), 6)
    agree(Apply(lambda norm, x: norm(x.flatten(2).transpose(1, 2)), norm), visible, (2, 2), 6)
    agree(randomised(timm.layers.LayerNorm2d(6)), visible, (2, 2), 6)
    agree(Apply(lambda norm, x: norm(x.movedim(1, -1)), randomised(nn.RMSNorm(6))), visible, (2, 2), 6)
    agree(randomised(timm.layers.RmsNorm2d(6)), visible, (2, 2), 6)


@BOTH
def test_contiguous_is_a_copy_of_a_part(visible: Tensor) -> None:
    """In-place operations on the copy do not change the whole map."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2].contiguous().relu_()
        y.permute(0, 2, 3, 1).contiguous().mul_(3)
        return y

    agree(function, visible, (2, 2))


@BOTH
def test_local_response_norm(visible: Tensor) -> None:
    agree(nn.LocalResponseNorm(3), visible, (2, 2), 6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_group_norm(rank: int) -> None:
    @given(masks(rank), st.sampled_from([1, 2, 6]), st.booleans())
    @examples(12)
    def check(visible: Tensor, groups: int, affine: bool) -> None:
        agree(randomised(nn.GroupNorm(groups, 6, affine=affine)), visible, (2,) * rank, 6)

    check()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_instance_norm(rank: int) -> None:
    @given(masks(rank), st.booleans())
    @examples(12)
    def check(visible: Tensor, affine: bool) -> None:
        agree(randomised(INSTANCE_NORM[rank](3, affine=affine)), visible, (2,) * rank)

    check()


@BOTH
def test_instance_norm_running_statistics(visible: Tensor) -> None:
    """They average the mean and unbiased variance of each sample's visible positions."""
    norm = randomised(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    images = torch.randn(visible.shape[0], 3, 2 * visible.shape[1], 2 * visible.shape[2], dtype=torch.float64)
    norm(pack(images, PatchLayout(visible)))
    mask = upsample(visible, (2, 2))
    seen = [image[:, shown] for image, shown in zip(images, mask, strict=True)]
    expected_mean = 0.9 * mean + 0.1 * torch.stack([pixels.mean(1) for pixels in seen]).mean(0)
    expected_var = 0.9 * var + 0.1 * torch.stack([pixels.var(1) for pixels in seen]).mean(0)
    assert_close(norm.running_mean, expected_mean, "the running mean")
    assert_close(norm.running_var, expected_var, "the running variance")
    agree(norm.eval(), visible, (2, 2))
    # With every patch visible, they are those of PyTorch.
    twin = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double()
    ours = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double()
    twin(images)
    ours(pack(images, PatchLayout(torch.ones_like(visible))))
    assert_close(ours.running_mean, twin.running_mean, "the running mean")
    assert_close(ours.running_var, twin.running_var, "the running variance")


@BOTH
def test_normalize_over_channels(visible: Tensor) -> None:
    agree(lambda x: F.normalize(x), visible, (2, 2))
    agree(lambda x: F.normalize(x, p=1.0, dim=1), visible, (2, 2))
    agree(lambda x: x / (x.norm(dim=1, keepdim=True) + 1), visible, (2, 2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_global_response_norm(channels_last: bool) -> None:
    """ConvNeXt V2's GRN: a norm over positions, in either layout."""
    grn = randomised(timm.layers.grn.GlobalResponseNorm(4, channels_last=channels_last))
    if channels_last:
        agree(Apply(lambda grn, x: grn(x.permute(0, 2, 3, 1)), grn), RAGGED, (2, 2), 4)
    else:
        agree(grn, RAGGED, (2, 2), 4)


# Reductions


def select_pool(kind: str) -> nn.Module:
    return timm.layers.SelectAdaptivePool2d(pool_type=kind, flatten=True)


GLOBAL_POOLS: dict[str, Callable[[Tensor], Any]] = {
    "mean((2, 3))": lambda x: x.mean((2, 3)),
    "mean([-2, -1], keepdim)": lambda x: x.mean([-2, -1], keepdim=True),
    "mean keepdims": lambda x: x.mean((2, 3), keepdims=True),
    "mean positional keepdim": lambda x: x.mean((2, 3), True),
    "torch.mean(dim=)": lambda x: torch.mean(x, dim=(-1, -2)),
    "sum": lambda x: x.sum((2, 3)),
    "amax": lambda x: x.amax((2, 3)),
    "amax keepdim": lambda x: x.amax((2, 3), keepdim=True),
    "amin": lambda x: torch.amin(x, dim=(2, 3)),
    "AdaptiveAvgPool2d(1)": nn.AdaptiveAvgPool2d(1),
    "AdaptiveAvgPool2d((1, 1))": nn.AdaptiveAvgPool2d((1, 1)),
    "AdaptiveMaxPool2d(1)": nn.AdaptiveMaxPool2d(1),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "NHWC mean": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "NHWC mean keepdim": lambda x: x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True),
    "std": lambda x: x.std((2, 3)),
    "std keepdim": lambda x: x.std(dim=(2, 3), keepdim=True),
    "var": lambda x: x.var((2, 3)),
    "var biased": lambda x: x.var((2, 3), unbiased=False),
    "var correction": lambda x: x.var((2, 3), correction=0, keepdim=True),
    "torch.var_mean": lambda x: torch.var_mean(x, (2, 3)),
    "torch.std_mean": lambda x: torch.std_mean(x, dim=(2, 3), keepdim=True),
    "norm": lambda x: x.norm(dim=(2, 3)),
    "norm(2, dims, keepdim)": lambda x: x.norm(2, (2, 3), True),
    "torch.norm p": lambda x: torch.norm(x, p=2, dim=(2, 3), keepdim=True),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "vector_norm ord": lambda x: torch.linalg.vector_norm(x, 1, (2, 3), True),
    **{f"timm {kind}": select_pool(kind) for kind in ("avg", "max", "avgmax", "catavgmax", "fast", "fastmax",
                                                      "fastavgmax", "fastcatavgmax")},
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("spelling", GLOBAL_POOLS)
def test_global_pooling(spelling: str, visible: Tensor) -> None:
    agree(GLOBAL_POOLS[spelling], visible, (2, 2))


FLATTENED_POOLS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "flatten mean": (lambda x: x.flatten(2).mean(-1), lambda x: x.mean((2, 3))),
    "view mean keepdim": (lambda x: x.view(*x.shape[:2], -1).mean(2, True), lambda x: x.mean((2, 3), True).flatten(2)),
    "tokens mean": (lambda x: x.flatten(2).transpose(1, 2).mean(1), lambda x: x.mean((2, 3))),
    "flatten amax": (lambda x: x.flatten(2).amax(-1), lambda x: x.amax((2, 3))),
    "flatten std": (lambda x: x.flatten(2).std(-1), lambda x: x.std((2, 3))),
    "axes and channels": (lambda x: x.mean((1, 2, 3)), lambda x: x.mean((2, 3)).mean(1)),
    "axes and channels keepdim": (
        lambda x: x.mean((1, 2, 3), keepdim=True), lambda x: x.mean((2, 3), keepdim=True).mean(1, keepdim=True)),
    "axes of groups": (
        lambda x: x.view(x.shape[0], 1, 3, *x.shape[2:]).amax((2, 3, 4)), lambda x: x.amax((2, 3)).amax(1, True)),
    "logsumexp": (lambda x: torch.logsumexp(x, (2, 3)), lambda x: x.exp().sum((2, 3)).log()),
    "AdaptiveAvgPool1d": (lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1), lambda x: x.mean((2, 3)).unsqueeze(-1)),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("spelling", FLATTENED_POOLS)
def test_global_pooling_of_flattened_maps(spelling: str, visible: Tensor) -> None:
    function, reference = FLATTENED_POOLS[spelling]
    agree(function, visible, (2, 2), reference=reference)


SPELLINGS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "var(dim, unbiased)": (lambda x: x.var((2, 3), False), lambda x: x.var((2, 3), unbiased=False)),
    "var(dim, unbiased, keepdim)": (
        lambda x: x.var((2, 3), False, True), lambda x: x.var((2, 3), unbiased=False, keepdim=True)),
    "std(dim, unbiased, keepdim)": (
        lambda x: x.std((2, 3), True, True), lambda x: x.std((2, 3), unbiased=True, keepdim=True)),
    "var_mean(dim, unbiased)": (
        lambda x: torch.var_mean(x, (2, 3), True), lambda x: torch.var_mean(x, dim=(2, 3), unbiased=True)),
    "var_mean(dim, unbiased, keepdim)": (
        lambda x: torch.var_mean(x, (2, 3), False, True),
        lambda x: torch.var_mean(x, dim=(2, 3), unbiased=False, keepdim=True)),
    "conv2d(input=)": (lambda x: F.conv2d(input=x, weight=torch.ones(1, 3, 1, 1).double()), lambda x: x.sum(1, True)),
    "mean(input=)": (lambda x: torch.mean(input=x, dim=(2, 3)), lambda x: x.mean((2, 3))),
    "flatten(input=)": (lambda x: torch.flatten(input=x, start_dim=2).mean(2), lambda x: x.mean((2, 3))),
    "pixel_unshuffle(downscale_factor=)": (
        lambda x: F.pixel_unshuffle(x, downscale_factor=2).mean((2, 3)),
        lambda x: F.pixel_unshuffle(x, 2).mean((2, 3))),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_arguments(spelling: str, visible: Tensor) -> None:
    """Arguments may be positional, in an old signature, or named."""
    function, reference = SPELLINGS[spelling]
    agree(function, visible, (2, 2), reference=reference)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_global_pooling_in_any_rank(rank: int) -> None:
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[rank]
    maximum = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}[rank]

    @given(masks(rank), st.booleans())
    @examples(12)
    def check(visible: Tensor, keepdim: bool) -> None:
        axes = tuple(range(2, 2 + rank))
        agree(lambda x: x.mean(axes, keepdim=keepdim), visible, (2,) * rank)
        agree(pool(1), visible, (2,) * rank)
        agree(maximum(1), visible, (2,) * rank)

    check()


CHANNEL_REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean(1, keepdim=True),
    "mean without axis": lambda x: x.mean(1),
    "amax": lambda x: x.amax(1, keepdim=True),
    "max": lambda x: x.max(1)[0],
    "max values": lambda x: x.max(dim=1, keepdim=True).values,
    "softmax": lambda x: x.softmax(1),
    "F.softmax": lambda x: F.softmax(x, dim=1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "NHWC softmax": lambda x: x.permute(0, 2, 3, 1).softmax(-1),
    "sum of products": lambda x: (x * x).sum(1),
    "argmax": lambda x: x.argmax(1),
    "topk": lambda x: x.topk(2, 1)[0],
    "cumsum": lambda x: x.cumsum(1),
    "var": lambda x: x.var(1, keepdim=True),
    "std_mean": lambda x: torch.std_mean(x, dim=1, keepdim=True),
    "spatial attention": lambda x: x * torch.cat([x.mean(1, True), x.amax(1, True)], 1).sum(1, True).sigmoid(),
}


@pytest.mark.parametrize("name", CHANNEL_REDUCTIONS)
def test_reductions_over_channels(name: str) -> None:
    agree(CHANNEL_REDUCTIONS[name], RAGGED, (2, 2), 4)


def test_reductions_over_everything_cover_what_is_visible() -> None:
    images = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    x = pack(images, PatchLayout(RAGGED))
    seen = images.movedim(1, -1)[upsample(RAGGED, (2, 2))]
    assert_close(x.mean(), seen.mean(), "mean")
    assert_close(x.sum(), seen.sum(), "sum")
    assert_close(x.max(), seen.max(), "max")
    assert bool((x < 100).all())
    assert not bool((x > 100).any())


class SqueezeExcite(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool, self.reduce, self.expand = pool, nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.pool(x)
        gate = gate if gate.ndim == 4 else gate[:, :, None, None]
        return x * self.expand(F.relu(self.reduce(gate))).sigmoid()


@BOTH
@pytest.mark.parametrize(
    "spelling",
    ["mean((2, 3))", "mean([-2, -1], keepdim)", "amax keepdim", "AdaptiveAvgPool2d(1)", "AdaptiveMaxPool2d(1)",
     "timm avg", "timm avgmax"],
)  # fmt: skip
def test_squeeze_and_excite(spelling: str, visible: Tensor) -> None:
    agree(SqueezeExcite(GLOBAL_POOLS[spelling]).double(), visible, (2, 2), 6)


@BOTH
@pytest.mark.parametrize(
    "module",
    [
        lambda: timm.layers.SEModule(8, rd_channels=4),
        lambda: timm.layers.SEModule(8, rd_channels=4, add_maxpool=True),
        lambda: timm.layers.EffectiveSEModule(8),
        lambda: timm.layers.EcaModule(8),
        lambda: timm.layers.cbam.ChannelAttn(8, rd_channels=4),
        lambda: timm.layers.cbam.SpatialAttn(3),
        lambda: timm.layers.cbam.CbamModule(8, rd_channels=4, spatial_kernel_size=3),
        lambda: timm.layers.cbam.LightCbamModule(8, rd_channels=4, spatial_kernel_size=3),
        lambda: timm.layers.GlobalContext(8, use_attn=False, rd_channels=4),
        lambda: timm.layers.SplitAttn(8, radix=2),
        lambda: timm.layers.SelectiveKernel(8, 8),
    ],
    ids=["se", "se max", "ese", "eca", "channel", "spatial", "cbam", "light cbam", "gc", "split",
         "sk"],
)  # fmt: skip
def test_attention_modules_of_timm(module: Callable[[], nn.Module], visible: Tensor) -> None:
    torch.manual_seed(0)
    built = randomised(module())
    agree(built.eval(), visible, (2, 2), 8)


@BOTH
def test_squeeze_and_excite_channels_last(visible: Tensor) -> None:
    """timm pools with `keepdims=`, the name that NumPy uses."""

    def by_hand(se: Any, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return x * se.gate(se.fc2(se.act(se.fc1(x.mean((1, 2), keepdim=True)))))

    se = randomised(timm.layers.squeeze_excite.SqueezeExciteCl(8, rd_channels=4))
    agree(Apply(lambda se, x: se(x.permute(0, 2, 3, 1)), se), visible, (2, 2), 8, reference=Apply(by_hand, se))


# Random draws per sample


@pytest.mark.parametrize("kind", ["timm", "timm module", "torchvision", "dropout2d", "dropout1d", "dropout3d"])
def test_draws_are_per_sample(kind: str) -> None:
    """Drop path keeps or drops whole samples, channel dropout whole channels of one."""
    rank = {"dropout1d": 1, "dropout3d": 3}.get(kind, 2)
    visible = random_mask(32, (2,) * rank, ragged=True, seed=7)
    drop: dict[str, Callable[[Tensor], Tensor]] = {
        "timm": lambda x: timm.layers.drop_path(x, 0.5, training=True),
        "timm module": timm.layers.DropPath(0.5).train(),
        "torchvision": StochasticDepth(0.5, "row").train(),
        "dropout2d": nn.Dropout2d(0.5).train(),
        "dropout1d": lambda x: F.dropout1d(x, 0.5),
        "dropout3d": nn.Dropout3d(0.5).train(),
    }
    x = pack(torch.ones(32, 3, *(4,) * rank), PatchLayout(visible))
    torch.manual_seed(0)
    out = drop[kind](x)
    dense, mask = dense_of(out)
    by_channel = kind.startswith("dropout")
    found = set()
    for sample in range(32):
        for part in (dense[sample, channel] for channel in range(3)) if by_channel else (dense[sample],):
            shown = mask[sample].expand(part.shape) if not by_channel else mask[sample, 0]
            values = part[shown].unique()
            assert len(values) == 1
            found.add(values.item())
    assert found == {0.0, 2.0}


@pytest.mark.parametrize("module", [nn.Dropout2d(0.5), nn.Dropout(0.5), timm.layers.DropPath(0.5)])
def test_nothing_is_dropped_in_evaluation(module: nn.Module) -> None:
    agree(module.eval(), RAGGED, (2, 2))


def test_drop_path_draws_as_on_dense_maps() -> None:
    """With one generator state, packed and dense networks drop the same samples."""
    agree(timm.layers.DropPath(0.5).train(), RAGGED, (2, 2))
    agree(StochasticDepth(0.5, "row").train(), RAGGED, (2, 2))
    agree(StochasticDepth(0.5, "batch").train(), RAGGED, (2, 2))


def test_channel_dropout_in_place() -> None:
    x = pack(torch.ones(2, 8, 4, 4), PatchLayout(UNIFORM))
    assert F.dropout2d(x, 0.5, True, True) is x
    assert set(x.values.unique().tolist()) == {0.0, 2.0}


def test_dropout_is_per_position() -> None:
    x = pack(torch.ones(2, 3, 32, 32), PatchLayout(UNIFORM))
    out = F.dropout(x, 0.5, True)
    assert out.shape == x.shape
    assert 0.4 < (out == 0).float().mean() < 0.6


# Axes


AXES: dict[str, Callable[[Tensor], Any]] = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute tuple": lambda x: torch.permute(x, (0, 2, 3, 1)),
    "permute and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, 3),
    "movedim": lambda x: x.movedim(1, -1),
    "swap height and width": lambda x: x.transpose(2, 3),
    "split channels": lambda x: x.view(x.shape[0], 2, 3, *x.shape[2:]),
    "merge channels": lambda x: x.view(x.shape[0], 2, 3, *x.shape[2:]).flatten(1, 2),
    "unflatten": lambda x: x.unflatten(1, (3, 2)),
    "reshape with -1": lambda x: x.reshape(x.shape[0], -1, 2, *x.shape[2:]),
    "view list": lambda x: x.view([x.shape[0], 6, 1, *x.shape[2:]]),
    "view drops a unit axis": lambda x: x.unsqueeze(2).view(*x.shape),
    "view adds unit axes": lambda x: x.view(x.shape[0], 1, 6, 1, x.shape[2], 1, x.shape[3], 1),
    "view with a unit axis": lambda x: x.view(x.shape[0], 1, 6, *x.shape[2:]),
    "flatten": lambda x: x.flatten(2),
    "flatten kwargs": lambda x: x.flatten(start_dim=2),
    "flatten and back": lambda x: x.flatten(2).view(x.shape),
    "flatten and unflatten": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    "tokens and back": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(*x.shape),
    "NHWC flatten and back": lambda x: (
        x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6).reshape(x.shape[0], *x.shape[2:], 6)
    ),
    "view_as": lambda x: x.flatten(2).view_as(x),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "chunk": lambda x: x.chunk(2, 1),
    "chunk kwargs": lambda x: x.chunk(chunks=2, dim=1),
    "torch.chunk": lambda x: torch.chunk(x, 3, dim=1),
    "uneven chunk": lambda x: x.chunk(4, dim=1),
    "split": lambda x: x.split(2, 1),
    "split sizes": lambda x: torch.split(x, [1, 2, 3], dim=1),
    "split kwargs": lambda x: x.split(split_size=3, dim=-3),
    "tensor_split": lambda x: torch.tensor_split(x, 4, dim=1),
    "unbind": lambda x: x.view(x.shape[0], 2, 3, *x.shape[2:]).unbind(1),
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 3),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1, 1])),
    "flip": lambda x: x.flip(1),
    "flip list": lambda x: torch.flip(x, dims=[1]),
    "roll": lambda x: torch.roll(x, 2, 1),
    "cat": lambda x: torch.cat([x, 2 * x], 1),
    "cat kwargs": lambda x: torch.cat((x, x.chunk(2, 1)[0]), dim=1),
    "cat negative": lambda x: torch.cat([x, x], dim=-3),
    "cat three": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "cat per sample": lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])], 1),
    "cat expand_as": lambda x: torch.cat([x.mean((2, 3), keepdim=True).expand_as(x), x], 1),
    "cat coordinates": lambda x: torch.cat([x, coordinates(x)], 1),
    "stack": lambda x: torch.stack([x, x + 1], 1),
    "stack in the middle": lambda x: torch.stack([x, x + 1], dim=2),
    "stack last": lambda x: torch.stack([x, x + 1], -1),
    "stack and sum": lambda x: torch.stack([x, x + 1, x * 2], 1).sum(1),
    "channel slice": lambda x: x[:, 1:4],
    "channel step": lambda x: x[:, ::2],
    "channel index": lambda x: x[:, 2],
    "negative channel index": lambda x: x[:, -1],
    "ellipsis": lambda x: x.permute(0, 2, 3, 1)[..., :2],
    "new axis": lambda x: x[:, None],
    "new axis last": lambda x: x[..., None],
    "everything": lambda x: x[:],
    "stride 2": lambda x: x[:, :, ::2, ::2],
    "stride 2 odd": lambda x: x[:, :, 1::2, ::2],
    "space to depth": lambda x: torch.cat(
        [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
    ),
    "stride 2 channels last": lambda x: x.permute(0, 2, 3, 1)[:, ::2, ::2, 1:],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "unsqueeze last": lambda x: x.unsqueeze(-1),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(2).squeeze(2),
    "squeeze kwargs": lambda x: x.unsqueeze(2).squeeze(dim=2),
    "squeeze all": lambda x: x.unsqueeze(2).unsqueeze(-1).squeeze(),
    "squeeze nothing": lambda x: x.squeeze(1),
    "squeeze negative": lambda x: x.unsqueeze(-1).squeeze(-1),
    "channel shuffle": lambda x: (
        x.view(x.shape[0], 2, 3, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape[0], -1, *x.shape[2:])
    ),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1),
    "expand sizes": lambda x: x[:, :1].expand(x.shape[0], 4, *x.shape[2:]),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, :1], (x.shape[0], 4, *x.shape[2:])),
}


def coordinates(x: Tensor) -> Tensor:
    """Returns a dense map that differs for every sample and position."""
    shape = (x.shape[0], 1, *x.shape[2:])
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


@BOTH
@pytest.mark.parametrize("name", AXES)
def test_moving_axes(name: str, visible: Tensor) -> None:
    agree(AXES[name], visible, (4, 2), channels=6)


def test_index_select_of_channels_last() -> None:
    agree(lambda x: x.movedim(1, -1).index_select(-1, torch.tensor([2, 0])), RAGGED, (2, 2))


@given(masks(), st.integers(1, 3), st.data())
@examples(30)
def test_strided_slices(visible: Tensor, step: int, data: st.DataObject) -> None:
    rank = visible.ndim - 1
    start = data.draw(st.integers(0, step - 1))
    agree(lambda x: x[(..., *(slice(start, None, step),) * rank)], visible, (2 * step,) * rank)


# Elementwise


UNARY: dict[str, Callable[[Tensor], Any]] = {
    **{name: getattr(F, name) for name in ("relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "elu",
                                           "selu", "celu", "softplus", "leaky_relu", "hardtanh", "softsign",
                                           "tanhshrink", "logsigmoid", "softshrink", "hardshrink")},
    **{name: getattr(torch, name) for name in ("abs", "exp", "sigmoid", "tanh", "neg", "square", "sin", "cos", "erf",
                                               "sign", "floor", "round")},
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp tensors": lambda x: x.clamp(torch.tensor(-0.2), torch.tensor(0.3)),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "minus": lambda x: -x,
    "prelu": lambda x: F.prelu(x, torch.arange(3.0).double()),
    "prelu single": lambda x: F.prelu(x, torch.tensor([0.2]).double()),
    "glu by hand": lambda x: x[:, :2] * x[:, 1:].sigmoid(),
    "isfinite": lambda x: torch.isfinite(x),
    "zeros_like": lambda x: torch.zeros_like(x),
    "to float32": lambda x: x.float(),
    "detach": lambda x: x * x.detach(),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    agree(UNARY[name], RAGGED, (2, 2), tolerance=1e-6 if name == "to float32" else 1e-10)


def per_sample(x: Tensor, *shape: int) -> Tensor:
    count = x.shape[0] * math.prod(shape)
    return torch.linspace(-1, 2, count, dtype=torch.float64).view(x.shape[0], *shape)


def per_position(x: Tensor, batch: int, channels: int) -> Tensor:
    shape = (batch, channels, *x.shape[2:])
    return torch.linspace(-1, 2, math.prod(shape), dtype=torch.float64).view(shape)


CHANNEL = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
BINARY: dict[str, Callable[[Tensor], Any]] = {
    "scalars": lambda x: 2 * x + 1 - x / 3 + (1 - x) ** 2,
    "reverse": lambda x: 1 / (2 + x * x) - 3 - (2 ** x),
    "zero-dimensional": lambda x: x * torch.tensor(2.0).double() + torch.tensor(1.0).double(),
    "two maps": lambda x: x * x.sigmoid() + x,
    "maximum": lambda x: torch.maximum(x, -x),
    "torch.max of two": lambda x: torch.max(x, x * 2),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where with scalar": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 3.0),
    "comparisons": lambda x: ((x > 0) & (x < 1)) | ~(x <= 2),
    "per channel": lambda x: x * CHANNEL.view(1, 3, 1, 1) + CHANNEL[:, None, None],
    "per channel first": lambda x: CHANNEL.view(-1, 1, 1) * x,
    "per channel last": lambda x: x.permute(0, 2, 3, 1) * CHANNEL,
    "per channel of tokens": lambda x: x.flatten(2).transpose(1, 2) * CHANNEL,
    "torch.add alpha": lambda x: torch.add(x, x * 2, alpha=0.3),
    "per sample": lambda x: x * per_sample(x, 1, 1, 1),
    "per sample and channel": lambda x: x * per_sample(x, 3, 1, 1),
    "per sample first": lambda x: per_sample(x, 3, 1, 1) + x,
    "per sample channels last": lambda x: x.permute(0, 2, 3, 1) * per_sample(x, 1, 1, 3),
    "gate from the map": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "per position": lambda x: x + per_position(x, 1, 3),
    "per position, one channel": lambda x: x * per_position(x, 1, 1),
    "per position and sample": lambda x: x * per_position(x, x.shape[0], 3),
    "per position without batch": lambda x: x + per_position(x, 1, 3)[0],
    "per position channels last": lambda x: x.permute(0, 2, 3, 1) + per_position(x, 1, 3).permute(0, 2, 3, 1),
    "attention over channels": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "normalised by hand": lambda x: (x - x.mean(1, True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt(),
    "grouped gate": lambda x: x.unsqueeze(1) * per_sample(x, 2, 3, 1, 1),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, visible: Tensor) -> None:
    agree(BINARY[name], visible, (2, 2))


def test_gradients_reach_dense_operands() -> None:
    """Parameters that vary by channel, by sample or by position."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = [(3, 1, 1), (1, 3, 1, 1), (3, 3, 1, 1), (1, 3, 4, 6), (3, 1, 4, 6), ()]
            self.scales = nn.ParameterList(nn.Parameter(torch.rand(shape).double()) for shape in shapes)

        def forward(self, x: Tensor) -> Tensor:
            for scale in self.scales:
                x = x * scale + scale
            return x

    agree(Scales(), RAGGED, (2, 2))


# In place


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda y: y.add_(y * 2),
    "relu_": lambda y: torch.relu_(y),
    "F.relu": lambda y: F.relu(y, inplace=True),
    "nn.ReLU": nn.ReLU(inplace=True),
    "nn.SiLU": nn.SiLU(inplace=True),
    "nn.Hardswish": nn.Hardswish(inplace=True),
    "nn.LeakyReLU": nn.LeakyReLU(0.1, inplace=True),
    "nn.ReLU6": nn.ReLU6(inplace=True),
    "nn.ELU": nn.ELU(inplace=True),
    "sigmoid_": lambda y: y.sigmoid_(),
    "mul_ number": lambda y: y.mul_(2),
    "mul_ per sample": lambda y: y.mul_(per_sample(y, 1, 1, 1)),
    "mul_ per channel": lambda y: y.mul_(CHANNEL.view(3, 1, 1)),
    "div_": lambda y: y.div_(1 + per_position(y, 1, 3).abs()),
    "clamp_": lambda y: y.clamp_(min=0),
    "masked_fill_": lambda y: y.masked_fill_(y.detach() > 0.5, 0.1),
    "copy_": lambda y: y.copy_(y.detach() * 3),
    "sub_": lambda y: y.sub_(1, alpha=2),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_returns_and_changes(name: str) -> None:
    """The result is the operand itself, and its aliases see the change."""

    def network(x: Tensor) -> Any:
        y = x * 1.5
        alias, channels = y, y[:, 1:]
        z = IN_PLACE[name](y)
        assert z is y
        return y, alias + 1, channels * 2

    agree(network, RAGGED, (2, 2))


OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "+=": lambda x: add(x),
    "chained": lambda x: chained(x),
    "view": lambda x: through_views(x),
}


def add(x: Tensor) -> Any:
    y = x * 2
    z = y
    y += x
    y *= per_sample(y, 3, 1, 1)
    y -= 1
    y /= 2
    return y, z


def chained(x: Tensor) -> Any:
    out = F.relu(x * 2)
    shortcut = out
    out = out * 3
    out += shortcut
    F.relu(out, inplace=True)
    return out, shortcut


def through_views(x: Tensor) -> Any:
    y = x * 2
    y.permute(0, 2, 3, 1).mul_(CHANNEL)
    y[:, :2].add_(1)
    y[:, 2:].mul_(y[:, :1] + 3)
    y.unsqueeze(2).mul_(2)
    return y


@BOTH
@pytest.mark.parametrize("name", OPERATORS)
def test_in_place_operators(name: str, visible: Tensor) -> None:
    agree(OPERATORS[name], visible, (2, 2))


def test_in_place_keeps_memory() -> None:
    x = pack(torch.randn(2, 3, 4, 4), PatchLayout(UNIFORM)) * 1
    address = x.data_ptr()
    x += 1
    F.relu(x, inplace=True)
    assert x.data_ptr() == address
    assert isinstance(x, PackedTensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("visible", [torch.ones(2, 2, 2, dtype=torch.bool), random_mask(2, (4, 4), seed=3)])
@pytest.mark.parametrize(
    "layer",
    [
        *(
            nn.Conv2d(channels, 16, kernel, stride, padding, groups=groups, bias=bias)
            for channels, groups in ((3, 1), (16, 1), (16, 16))
            for kernel, stride, padding in ((1, 1, 0), (3, 1, 1), (4, 4, 0), (2, 2, 0))
            for bias in (True, False)
        ),
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1),
        nn.BatchNorm2d(16), nn.GroupNorm(2, 16), nn.InstanceNorm2d(16), nn.Identity(),
    ],
    ids=str,
)  # fmt: skip
def test_in_place_after_any_layer(layer: nn.Module, visible: Tensor, dtype: torch.dtype) -> None:
    """Results of rules can be changed in place."""
    channels = getattr(layer, "in_channels", 16)
    images = torch.randn(visible.shape[0], channels, 32, 32, dtype=dtype, requires_grad=True)
    layer = layer.to(dtype)
    grads = []
    for inplace in (True, False):
        out = F.relu(layer(pack(images, PatchLayout(visible))), inplace=inplace)
        dense = unpack(out)
        dense.mul_(2)
        grads.append(torch.autograd.grad((dense * dense).sum(), images)[0])
    assert_close(grads[0], grads[1], "the gradient", 1e-4)


# Networks that use many rules


@BOTH
def test_a_residual_block(visible: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
            self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
            self.down, self.act = nn.Conv2d(12, 12, 1, stride=2), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            shortcut = self.down(x)
            x = self.act(self.bn1(self.conv1(x)))
            x = self.bn2(self.conv2(x))
            x += shortcut
            return self.act(x)

    network = randomised(nn.Sequential(nn.Conv2d(3, 12, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1), Block()))
    agree(network, visible, (16, 16), tolerance=1e-9)


def test_the_gradient_of_a_strided_1x1_convolution_stays_channels_last() -> None:
    """In another memory format, everything before it would take several times as long in the backward pass."""
    visible = torch.tensor([[[True, False], [True, True]]])
    packed = pack(torch.randn(1, 6, 8, 8), PatchLayout(visible, torch.device("cpu")))
    values = packed.values.detach().requires_grad_()
    out = F.conv2d(PackedTensor.wrap(values, packed.patches, packed.axes), torch.randn(5, 6, 1, 1), stride=2)
    with torch._C.DisableTorchFunctionSubclass():
        (grad,) = torch.autograd.grad(out.values.sum(), values)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert not grad.is_contiguous()
