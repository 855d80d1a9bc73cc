"""The definition: masked tensors equal plain ones where all is visible, and nothing hidden is ever seen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from agreement import assert_close, random_mask, randomised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparkmim.sparse import MaskedTensor, PatchLayout, UnsupportedOperation, mask_map
from sparkmim.sparse.masked import is_on_grid

HYBRIDS = {
    "fastvit_sa12": (64, 96), "caformer_s18": (64, 96), "edgenext_small": (64, 96), "pvt_v2_b0": (64, 96),
    "mobilevit_xxs": (64, 64), "mobilevitv2_050": (64, 64), "efficientformerv2_s0": (64, 64), "gcvit_xxtiny": (64, 64),
    "swin_tiny_patch4_window7_224": (64, 64), "coatnet_pico_rw_224": (64, 64), "botnet26t_256": (64, 64),
    "maxvit_tiny_rw_224": (64, 64), "levit_conv_128s": (128, 128), "efficientvit_m0": (128, 128),
    "halonet26t": (256, 256),
}  # fmt: skip
"""Networks of convolutions and attention, and sizes of images that they take."""

OPTIONS: dict[str, dict[str, Any]] = {
    "maxvit_tiny_rw_224": {"img_size": 64, "depths": (1, 1, 1, 1)},
    **{name: {"img_size": HYBRIDS[name]} for name in (
        "efficientformerv2_s0", "gcvit_xxtiny", "swin_tiny_patch4_window7_224", "levit_conv_128s", "efficientvit_m0",
        "coatnet_pico_rw_224", "botnet26t_256",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_networks_with_attention(name: str) -> None:
    """Whole, they are the plain network, forward and backward; masked, nothing depends on hidden pixels."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's remarks on renamed models
        network: Any = timm.create_model(name, num_classes=0, **OPTIONS.get(name, {}))
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, timm.layers.DropPath)):
            module.eval()
    sizes = HYBRIDS[name]
    patch = 64 if sizes[0] == 128 else 32
    grid = [size // patch for size in sizes]
    images = torch.randn(2, 3, *sizes, dtype=torch.float64)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        copied = copy.deepcopy(network)
        out = copied.forward_features(x)
        if isinstance(out, MaskedTensor) and not bool(x.mask.all()):
            last = out if out.ndim < 4 or is_on_grid(out) else out.permute(0, 3, 1, 2)
            assert last.ndim < 4 or is_on_grid(last)
        values = out.values if isinstance(out, MaskedTensor) else out
        values.square().sum().backward()
        grads = [parameter.grad.flatten() for parameter in copied.parameters() if parameter.grad is not None]
        return values.detach(), torch.cat(grads)

    plain = run(images)
    whole = run(mask_map(images, PatchLayout(torch.ones(2, *grid, dtype=torch.bool))))
    for ours, theirs in zip(whole, plain, strict=True):
        assert_close(ours, theirs, name, 1e-9)

    layout = PatchLayout(random_mask(2, grid, ragged=True, seed=3))
    pixels = layout.upsampled((patch, patch)).unsqueeze(1)
    seen = run(mask_map(images, layout))
    other = run(mask_map(torch.where(pixels, images, images.flip(0) + 1), layout))
    for ours, theirs in zip(seen, other, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)


LAYOUT = PatchLayout(torch.tensor([[[True, False], [False, True]], [[True, True], [False, True]]]))


def dense(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def masked(channels: int = 4) -> MaskedTensor:
    return mask_map(dense(channels), LAYOUT)


def test_a_window_off_the_grid_and_back() -> None:
    """Average pooling of stride 1 gives one position less; the next convolution is on the grid again."""
    x: Any = masked()
    off: Any = F.avg_pool2d(x, 2, 1)
    assert off.mask.all()
    assert_close(off.values, F.avg_pool2d(x.values, 2, 1), "off the grid")
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    back: Any = F.conv2d(off * 2, weight, stride=2, padding=1)
    assert is_on_grid(back)
    expected = mask_map(F.conv2d(2 * F.avg_pool2d(x.values, 2, 1), weight, stride=2, padding=1), LAYOUT)
    assert torch.equal(back.values, expected.values)
    gone: Any = F.conv2d(F.conv2d(x, weight), torch.ones(1, 3, 3, 3).double())  # 8 to 6 to 4: no grid of 2 by chance
    assert not is_on_grid(gone)


def test_padding_and_cropping() -> None:
    x: Any = masked()
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    for mode in ("constant", "reflect", "replicate", "circular"):
        out: Any = F.conv2d(F.pad(x, (1, 1, 1, 1), mode), weight)
        expected = F.conv2d(F.pad(x.values, (1, 1, 1, 1), mode), weight)
        assert is_on_grid(out)
        assert torch.equal(out.values, mask_map(expected, LAYOUT).values)
    shifted: Any = F.conv2d(x[:, :, 1:, 1:], weight[:, :, :1, :1], stride=2)
    assert is_on_grid(shifted)
    channels: Any = F.pad(x, (0, 0, 0, 0, 1, 2))
    assert is_on_grid(channels)
    assert channels.shape == (2, 7, 8, 8)


class Coincidences(nn.Module):
    """At each level, as many channels as positions; blocks in either order of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 4, 4)
        self.norm = nn.LayerNorm(64)
        self.expand, self.reduce = nn.Linear(64, 256), nn.Linear(256, 64)
        self.down = nn.Conv2d(64, 16, 2, 2)
        self.batch_norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 4, 2, 2)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)  # [B, 64, 8, 8] of 32 pixels
        y = self.expand(self.norm(x.permute(0, 2, 3, 1)))  # [B, 8, 8, 256]
        energy = y.norm(p=2, dim=(1, 2), keepdim=True)
        x = x + self.reduce(y * energy / (energy.mean(-1, keepdim=True) + 1e-6)).permute(0, 3, 1, 2)
        deeper = self.batch_norm(self.down(x))  # [B, 16, 4, 4]
        scaled = deeper * deeper.mean((2, 3), keepdim=True).sigmoid() + deeper.mean(1, keepdim=True)
        return [x, scaled, self.last(scaled)]  # the last one [B, 4, 2, 2]


def test_as_many_channels_as_positions() -> None:
    """Every level has shapes that could be read in two ways; packed and masked read them alike."""
    from sparkmim.sparse.verify import verify_packed

    torch.manual_seed(0)
    for grid in ((2, 2), (1, 2)):
        report = verify_packed(Coincidences(), (2, 3, 32, 32 * grid[1] // 2 * 2 // grid[0]), grid)
        assert report.exact, report.message


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x.add_(1.0),
    "operator": lambda x: _multiplied(x),
    "relu": lambda x: F.relu(x, inplace=True),
    "silu": nn.SiLU(inplace=True),
    "dropout": lambda x: F.dropout(x, 0.0, True),
}


def _multiplied(x: Tensor) -> Tensor:
    x *= 3.0
    return x


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str) -> None:
    """Views see the change, hidden entries stay zero, and values and gradients are those of plain tensors."""
    inputs, outputs = [dense().requires_grad_() for _ in range(2)], []
    for images in inputs:
        x: Any = (mask_map(images, LAYOUT) if images is inputs[0] else images) * 1.5
        view = x[:, :2]
        out: Any = IN_PLACE[name](x)
        assert (out is x) == (name != "dropout" or not isinstance(x, MaskedTensor))
        for part in (view, out[:, :2]):
            assert torch.equal(part.detach().as_subclass(Tensor), out.detach().as_subclass(Tensor)[:, :2])
        outputs.append(out)
    found, plain = outputs
    assert torch.equal(found.values, plain * found.mask)
    assert not found.values[~found.mask].any()
    (found.values**2).sum().backward()
    ((plain * found.mask) ** 2).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_writing_a_part() -> None:
    x: Any = masked() * 1.0
    other: Any = masked(2) * 2.0
    x[:, :2] = other
    assert torch.equal(x[:, :2].values, other.values)
    assert is_on_grid(x)
    with pytest.raises(UnsupportedOperation, match="cannot be written into a dense tensor"):
        torch.zeros(2, 4, 8, 8, dtype=torch.float64)[:, :2] = other


def test_checkpoints_and_autocast() -> None:
    network = randomised(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    x: Any = masked()
    plain = network(x).sum()
    saved = checkpoint(network, x, use_reentrant=False).sum()
    assert torch.equal(plain, saved)
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = network[0](x.float())
    assert out.dtype == torch.bfloat16
    assert is_on_grid(out)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "mixer": (lambda x: F.linear(x.flatten(2), torch.ones(3, 64).double()), "each by parameters of its own"),
    "fixed matrix": (lambda x: torch.ones(64, 64).double() @ x.flatten(2).mT, "by fixed weights, as MLP-Mixers do"),
    "einsum": (lambda x: torch.einsum("bcn,nm->bcm", x.flatten(2), torch.ones(64, 2).double()), "by fixed weights"),
    "cumsum": (lambda x: x.cumsum(2), "over the positions of a masked map"),
    "norm of positions": (lambda x: F.layer_norm(x, [8, 8]), "each by parameters of its own"),
    "grid": (lambda x: F.interpolate(x, size=(5, 5)), "which the grid of 2×2 patches does not divide"),
    "stride": (lambda x: F.avg_pool2d(x, 8), "does not divide the patches"),
    "pool": (lambda x: F.adaptive_avg_pool2d(x, 2), "only global pooling"),
    "unknown": (lambda x: torch.linalg.svd(x), "has no definition on masked images"),
    "kernel": (lambda x: F.conv2d(torch.ones(1, 4, 8, 8).double(), x), "by a masked kernel"),
    "out": (lambda x: torch.add(x, 1, out=torch.empty(0).double()), "with out= has no rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=message):
        function(masked())


def test_products_and_attention_see_visible_positions_alone() -> None:
    x: Any = masked()
    tokens: Any = x.flatten(2).mT  # [B, 64, 4]
    attended: Any = F.scaled_dot_product_attention(tokens, tokens, tokens)
    by_einsum: Any = torch.einsum("bij,bjc->bic", (tokens @ tokens.mT / 2).softmax(-1), tokens)
    for sample in range(2):
        seen = tokens.mask[sample, :, 0]
        own = tokens.values[sample][seen][None]
        expected = F.scaled_dot_product_attention(own, own, own)[0]
        for found in (attended, by_einsum):
            assert_close(found.values[sample][seen], expected, "attention")
            assert not found.values[sample][~seen].any()


def test_windows_cut_from_a_map() -> None:
    """Neighbourhoods by `unfold` keep what is hidden in them hidden; beyond the border is visible, as zeros."""
    x: Any = masked(1)
    blocks: Any = F.unfold(x, 3, padding=1).view(2, 9, 8, 8)
    centre: Any = blocks[:, 4:5]
    assert torch.equal(centre.mask, x.mask)
    assert blocks[:, 0, 0].mask.all()
    assert torch.equal(x.unfold(2, 2, 2).mask, x.mask.unfold(2, 2, 2))
