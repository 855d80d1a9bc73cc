"""Operations not defined on visible patches are refused with advice."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import random_mask
from torch import Tensor, nn

from sparkmim.sparse import PackedTensor, PatchLayout, UnsupportedOperation, naming_modules, pack

VISIBLE = random_mask(3, (2, 2), seed=4)


def packed(channels: int = 3, block: int = 4) -> PackedTensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, 2 * block, 2 * block, generator=generator)
    return pack(images, PatchLayout(VISIBLE))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    # windows that do not map patches to patches
    "valid convolution": (nn.Conv2d(3, 4, 3), "`conv2d` with kernel 3, stride 1, padding 0 and dilation 1 turns 8 "
                          "positions into 6, not 8.* Pad it by 1"),
    "even kernel": (nn.Conv2d(3, 4, 2, padding=1), "turns 8 positions into 9, not 8"),
    "stride does not divide": (nn.Conv2d(3, 4, 3, stride=3, padding=1), "stride 3, which does not divide the 4"),
    "valid pooling": (nn.MaxPool2d(3, 1), "`max_pool2d` with kernel 3, stride 1.* turns 8 positions into 6"),
    "pooling with a stride that does not divide": (nn.AvgPool2d(3), "`avg_pool2d` has stride 3"),
    "global convolution": (nn.Conv2d(3, 4, 8), "turns 8 positions into 1, not 8"),
    "wrong rank": (lambda x: F.conv1d(x.flatten(2), torch.zeros(4, 3, 1)), "`conv1d`.* 2 spatial axes"),
    "channels last": (lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.zeros(4, 8, 1, 1)), "after the channels"),
    "transposed map": (lambda x: F.conv2d(x.transpose(2, 3), torch.zeros(4, 3, 1, 1)), "after the channels"),
    "pooling with positions": (nn.MaxPool2d(2, return_indices=True), "`max_pool2d_with_indices` has no rule"),
    "adaptive pooling": (nn.AdaptiveAvgPool2d(2), "only global pooling"),
    "adaptive pooling to one axis": (nn.AdaptiveMaxPool2d((1, None)), "only global pooling"),
    # unknown operations
    "something pointwise after padding": (lambda x: F.pad(x, (1, 1, 1, 1)).relu(), "`relu` of a masked map that was"),
    "windows of a padded map": (lambda x: F.pad(x, (0, 4, 0, 4)).view(3, 3, 3, 4, 3, 4), "`view` of a masked map that"),
    "padding the batch": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "pad its spatial axes"),
    "padding map and channels": (lambda x: F.pad(x, (1, 1, 1, 1, 1, 0)), "pad its spatial axes"),
    "two ways of padding": (lambda x: F.pad(F.pad(x, (1, 1), value=1.0), (1, 1)), "padded in another way"),
    "padding too little": (lambda x: nn.Conv2d(3, 4, 5)(F.pad(x, (1, 1, 1, 1))), "turns 8 positions into 6, not 8"),
    "reflection too little": (lambda x: nn.Conv2d(3, 4, 4)(F.pad(x, (1, 1, 1, 1), "reflect")), "does not divide"),
    "fft": (lambda x: torch.fft.fft2(x), r"`(fft_)?fft2` has no rule.*register_rule"),
    "interpolate to a size that does not divide": (nn.Upsample(9), r"into \[3, 3, 9, 9\], which the grid of 2×2"),
    "interpolation of tokens": (lambda x: F.interpolate(x.flatten(2), 8), "channels are not second"),
    "pixel unshuffle across patches": (lambda x: F.pixel_unshuffle(x, 8), "does not divide the 4 position"),
    "grid_sample": (lambda x: F.grid_sample(x, torch.zeros(3, 2, 2, 2), align_corners=False), "`grid_sample` has no"),
    "transposed convolution": (nn.ConvTranspose2d(3, 3, 2), r"into \[3, 3, 9, 9\], which the grid of 2×2"),
    "attention among rows": (lambda x: F.scaled_dot_product_attention(x, x, x), "all positions of a sample with each"),
    "attention with a bias": (lambda x: F.scaled_dot_product_attention(*(x.flatten(2).mT,) * 3, torch.zeros(64, 64)),
                              "without a bias by position"),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), "`einsum` has no rule"),
    "unfold": (lambda x: F.unfold(x, 3), "`(unfold|im2col)` has no rule"),
    "numpy": (lambda x: x.numpy(), "`numpy` has no rule"),
    "iteration": (lambda x: list(x), "cuts the batch"),
    "assignment": (lambda x: x.__setitem__((slice(None), 0), 0.0), "`__setitem__` has no rule"),
    # reductions
    "rows": (lambda x: x.mean(2), r"`mean` over axes \[2\].* reduces part of the map"),
    "columns": (lambda x: x.amax(-1, keepdim=True), r"`amax` over axes \[3\].* reduces part of the map"),
    "rows and channels": (lambda x: x.sum((1, 2)), "reduces part of the map"),
    "batch": (lambda x: x.mean(0), "`mean` over the batch axis"),
    "largest of the batch with positions": (lambda x: x.logsumexp((0, 2, 3)), "`logsumexp` over the batch axis"),
    "everything": (lambda x: x.std(), "`std` over a whole masked batch"),
    "softmax over rows": (lambda x: x.softmax(2), "reduces part of the map"),
    "sorting positions": (lambda x: x.flatten(2).sort(-1), "`sort` over the positions"),
    "cumsum over rows": (lambda x: x.cumsum(2), "reduces part of the map"),
    "maximum with positions": (lambda x: x.flatten(2).max(-1), "use amax"),
    "norm over rows": (lambda x: x.norm(dim=2), "reduces part of the map"),
    "normalize over positions": (lambda x: F.normalize(x, dim=2), "`normalize` over part of"),
    "layer norm over positions": (lambda x: F.layer_norm(x, (3, 8, 8)), "normalise channels only"),
    "batch norm of tokens": (lambda x: F.batch_norm(x.flatten(2).transpose(1, 2), None, None, training=True),
                             "second axis is spatial"),
    "group norm of tokens": (lambda x: F.group_norm(x.permute(0, 2, 3, 1), 2), "channels not second"),
    # axes
    "flattening everything": (lambda x: x.flatten(1), r"to \[3, 192\] mixes"),
    "batch into channels": (lambda x: x.view(1, 9, 8, 8).relu(), "`relu` of a masked map that"),
    "batch into channels, convolved": (lambda x: F.conv2d(x.view(1, 9, 8, 8), torch.zeros(1, 9, 1, 1)), "needs groups"),
    "batch into channels, elsewhere": (lambda x: x.view(1, 9, 8, 8).view(9, 8, 8), "`view` of a masked map that"),
    "channels into batch": (lambda x: x.reshape(9, 1, 8, 8), "mixes the batch"),
    "shuffle with channels last": (lambda x: F.pixel_shuffle(x.permute(0, 2, 3, 1), 2), "channels not second"),
    "windows that cross patches": (lambda x: x[..., :6, :6], "takes part of the map"),
    "channels into map": (lambda x: x.reshape(3, 1, 24, 8), "mixes part of the map"),
    "one map axis into channels": (lambda x: x.reshape(3, 24, 8), "mixes part of the map"),
    "size is not preserved": (lambda x: x.view(3, 4, 8, 8), "does not preserve the number"),
    "batch moves": (lambda x: x.permute(1, 0, 2, 3), "moves the batch axis"),
    "batch axis is transposed": (lambda x: x.transpose(0, 1), "moves the batch axis"),
    "axis before the batch": (lambda x: x.unsqueeze(0), "axis before the batch"),
    "new axis before the batch": (lambda x: x[None], "axis before the batch"),
    "half the batch": (lambda x: x[:2], "part of the batch"),
    "one sample": (lambda x: x[0], "part of the batch"),
    "crop": (lambda x: x[:, :, 1:, :], "takes part of the map"),
    "crop at the end": (lambda x: x[..., :-1], "takes part of the map"),
    "step that does not divide": (lambda x: x[..., ::3], "takes part of the map"),
    "one row": (lambda x: x[:, :, 0], "takes part of the map"),
    "mask index": (lambda x: x[torch.ones(3, dtype=torch.bool)], "index tensor"),
    "chunk of the batch": (lambda x: x.chunk(3), "cuts the batch or the map"),
    "split of the map": (lambda x: x.split(4, dim=2), "cuts the batch or the map"),
    "flip": (lambda x: x.flip(-1), "cuts the batch or the map"),
    "roll of the map": (lambda x: torch.roll(x, (1, 1), (2, 3)), "cuts the batch or the map"),
    "cat along the batch": (lambda x: torch.cat([x, x]), "extends the batch or the map"),
    "cat along the map": (lambda x: torch.cat([x, x], -1), "extends the batch or the map"),
    "stack in front": (lambda x: torch.stack([x, x]), "extends the batch or the map"),
    "expanding the batch": (lambda x: x.expand(2, -1, -1, -1, -1), "changes the batch or the map"),
    "flip of channels and map": (lambda x: x.flip(1, 3), "cuts the batch or the map"),
    "roll of everything": (lambda x: torch.roll(x, 1, ()), "without axes"),
    "transposing in place": (lambda x: x.transpose_(2, 3), "in place has no rule"),
    "an axis in place": (lambda x: x.unsqueeze_(1), "in place has no rule"),
    "index by a truth value": (lambda x: x[:, True], "index tensor"),
    "tokens split in another way": (lambda x: x.flatten(2).view(3, 3, 4, 16), "mixes part of the map"),
    "another buffer": (lambda x: torch.add(x, 1, out=torch.zeros(3, 3, 8, 8)), "with out="),
    "linear to a number": (lambda x: F.linear(x.permute(0, 2, 3, 1), torch.zeros(3)), "channels last"),
    "dropout of rows": (lambda x: F.dropout2d(x.permute(0, 2, 3, 1)), "channels not second"),
    "2-D pooling of tokens": (lambda x: F.adaptive_avg_pool2d(x.flatten(2), 1), "only global pooling"),
    "3-D pooling of images": (lambda x: F.max_pool3d(x, 2), "it must have 2 spatial axes"),
    "padding what was cropped": (lambda x: F.pad(F.pad(x, (-1, 0)), (1, 0)), "that was cropped"),
    "pooling a folded batch": (lambda x: F.avg_pool2d(x.view(1, 9, 8, 8), 2), "must be convolved, and unfolded"),
    # operands
    "axes in another order": (lambda x: x + x.transpose(2, 3), "another order"),
    "a map without channels": (lambda x: x * x.mean(1), "another order"),
    "two kinds of windows": (lambda x: F.max_pool2d(x, (1, 2)).flatten(2) + F.max_pool2d(x, (2, 1)).flatten(2), "size"),
    "another size": (lambda x: x + torch.zeros(1, 3, 4, 4), "does not fit the masked map"),
    "another batch": (lambda x: x * torch.zeros(2, 1, 1, 1), "does not fit the masked map"),
    "rows only": (lambda x: x + torch.zeros(1, 1, 8, 1), "does not fit the masked map"),
    "more axes": (lambda x: x + torch.zeros(1, 1, 3, 8, 8), "more axes than the masked map"),
    "maps of two sizes": (lambda x: x + F.max_pool2d(x, 2), "different sizes"),
    "maps of two sizes, one position each": (lambda x: x + F.max_pool2d(x, 4), "different sizes"),
    "two layouts": (lambda x: x + packed(), "masked differently"),
    "cat of two layouts": (lambda x: torch.cat([x, packed()], 1), "masked differently"),
    "two orders of axes": (lambda x: x + x.permute(0, 2, 3, 1), "another order"),
    "writing into a dense tensor": (lambda x: torch.zeros(3, 3, 8, 8).add_(x), "into a smaller or a dense tensor"),
    "matmul of maps": (lambda x: x @ x, "compares positions with each other"),
    "attention by hand": (lambda x: x.flatten(2).mT @ x.flatten(2), "compares positions with each other"),
    "linear over rows": (lambda x: F.linear(x, torch.zeros(8, 8)), "channels last"),
    "feature alpha dropout": (nn.FeatureAlphaDropout(0.5), "use dropout"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    function, message = REFUSED[case]
    with pytest.raises(UnsupportedOperation, match=message):
        function(packed())


def test_the_advice_helps() -> None:
    """The padding advised by the message works."""
    for kernel, dilation in ((3, 1), (5, 1), (3, 2), (7, 1)):
        with pytest.raises(UnsupportedOperation) as refusal:
            nn.Conv2d(3, 4, kernel, dilation=dilation)(packed())
        padding = int(re.findall(r"Pad it by (\d+)", str(refusal.value))[0])
        assert nn.Conv2d(3, 4, kernel, dilation=dilation, padding=padding)(packed()).shape == (3, 4, 8, 8)


def test_a_refusal_outside_any_module_names_the_network() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(2)

    with pytest.raises(UnsupportedOperation, match="^in module `Network`"), naming_modules(network := Network()):
        network(packed())


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 2)


def test_naming_modules() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), Inner()))
    with (
        pytest.raises(UnsupportedOperation, match=r"^in module `1\.1`: `cumsum` over axes \[2\]"),
        naming_modules(network),
    ):
        network(packed())
    network = nn.Sequential(nn.Conv2d(3, 3, 3))
    with pytest.raises(UnsupportedOperation, match="^in module `0`: `conv2d` with kernel 3"), naming_modules(network):
        network(packed())
    with (
        pytest.raises(UnsupportedOperation, match="^in module `Sequential`: `cumsum`"),
        naming_modules(nn.Sequential()),
    ):
        torch.cumsum(packed(), 2)
    with pytest.raises(RuntimeError, match="another"), naming_modules(network):  # others pass through
        raise RuntimeError("another")
