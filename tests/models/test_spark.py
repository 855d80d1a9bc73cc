"""The SparK model: shapes in every rank, what is pasted, the loss, and what must stay the user's."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import timm
import torch
import torchvision
from small_networks import PlainCNN, signal_network, volume_network
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._python_dispatch import TorchDispatchMode

from sparkmim.models import SparK, create_encoder
from sparkmim.models.decoder import from_patches, to_patches
from sparkmim.models.spark import DecoderKind, encoder_norm, patch_statistics, reconstruction_loss
from sparkmim.sparse import PatchLayout

CASES: dict[str, tuple[Callable[[], SparK], tuple[int, ...], tuple[int, ...]]] = {
    "square": (lambda: SparK(PlainCNN(), 32, decoder_width=16), (3, 32, 32), (4, 4)),
    "not square": (lambda: SparK(PlainCNN(), (16, 40), decoder_width=16), (3, 16, 40), (2, 5)),
    "fcmae": (lambda: SparK(PlainCNN(), 32, decoder="fcmae", decoder_width=16), (3, 32, 32), (4, 4)),
    "fcmae, larger patches": (lambda: SparK(PlainCNN(), 32, patch_size=16, decoder="fcmae", decoder_width=16),
                              (3, 32, 32), (2, 2)),
    "fcmae of a volume": (lambda: SparK(volume_network(), 16, channels=1, decoder="fcmae", decoder_width=16),
                          (1, 16, 16, 16), (4, 4, 4)),
    "fewer stages": (lambda: SparK(PlainCNN(), (16, 32), stages=2, decoder_width=16), (3, 16, 32), (4, 8)),
    "larger patches": (lambda: SparK(PlainCNN(), 48, patch_size=16, decoder_width=16), (3, 48, 48), (3, 3)),
    "other channels": (lambda: SparK(PlainCNN(5), 32, decoder_width=16, channels=5), (5, 32, 32), (4, 4)),
    "by name": (lambda: SparK("resnet18", 64, decoder_width=32), (3, 64, 64), (2, 2)),
    "signal": (lambda: SparK(signal_network(), (64,), decoder_width=16, channels=2), (2, 64), (8,)),
    "volume": (
        lambda: SparK(volume_network(), (8, 8, 16), decoder_width=16, channels=1), (1, 8, 8, 16), (2, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str) -> None:
    factory, shape, grid = CASES[name]
    torch.manual_seed(0)
    model = factory()
    assert model.grid == grid
    images = torch.randn(3, *shape)
    out = model(images)
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    assert torch.isfinite(out.loss)
    assert out.visible.shape == (3, *grid)
    assert out.visible.dtype == torch.bool
    assert out.prediction.shape == out.reconstruction.shape == out.images.shape == images.shape
    assert not out.reconstruction.requires_grad
    out.loss.backward()
    unreached = set(model.unreached_parameters)
    assert {n for n, p in model.named_parameters() if p.grad is None} == unreached

    maps = model.encode(images, out.visible)
    for map_, stride, channels in zip(maps, model.hierarchy.strides, model.hierarchy.channels, strict=True):
        assert map_.shape == (3, channels, *(size // stride for size in shape[1:]))
        mask = out.visible
        for axis, (size, cells) in enumerate(zip(map_.shape[2:], grid, strict=True), start=1):
            mask = mask.repeat_interleave(size // cells, axis)
        assert not map_.movedim(1, -1)[~mask].any()
        assert map_.movedim(1, -1)[mask].any()

    pixels = out.visible
    for axis, (size, cells) in enumerate(zip(shape[1:], grid, strict=True), start=1):
        pixels = pixels.repeat_interleave(size // cells, axis)
    pasted = (out.reconstruction == images).all(1)
    assert torch.equal(pasted, pixels)  # to the bit where visible, and nowhere else


@pytest.mark.parametrize("name", ["not square", "larger patches", "signal", "volume"])
def test_naive_loss_and_reconstruction(name: str) -> None:
    factory, shape, grid = CASES[name]
    torch.manual_seed(1)
    model = factory().double()
    images = 3 * torch.randn(2, *shape, dtype=torch.float64) + 1
    out = model(images)
    patch = model.patch_size
    errors = []
    reconstruction = images.clone()
    for sample, *cell in (~out.visible).nonzero().tolist():
        where = (sample, slice(None), *(slice(at * patch, (at + 1) * patch) for at in cell))
        target, prediction = images[where], out.prediction[where].detach()
        mean = target.mean()
        deviation = ((target - mean).square().sum() / (target.numel() - 1) + 1e-6).sqrt()
        errors.append((prediction - (target - mean) / deviation).square().mean())
        reconstruction[where] = prediction * deviation + mean
    assert out.loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-8)
    torch.testing.assert_close(out.reconstruction, reconstruction)


def test_patches_round_trip() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = to_patches(images, (4, 4))
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].flatten())
    assert torch.equal(from_patches(patches, (2, 3), (4, 4)), images)
    mean, deviation = patch_statistics(patches)
    assert mean.shape == deviation.shape == (2, 6, 1)


def test_the_loss_is_computed_in_full_precision() -> None:
    patches = PatchLayout(torch.tensor([[[True, False]]]))
    images, prediction = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 8)
    half = reconstruction_loss(prediction.bfloat16(), images, patches)
    assert half.dtype == torch.float32
    full = reconstruction_loss(prediction.bfloat16().float(), images, patches)
    assert half.item() == pytest.approx(full.item(), rel=1e-6)


def test_a_uniform_patch_is_no_trouble() -> None:
    model = SparK(PlainCNN(), 32, decoder_width=16)
    out = model(torch.zeros(2, 3, 32, 32))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_encoder_is_the_users() -> None:
    encoder = timm.create_model("resnet18", num_classes=0)
    keys = list(encoder.state_dict())
    classes = [type(module) for module in encoder.modules()]
    weights = copy.deepcopy(encoder.state_dict())
    model = SparK(encoder, 64, decoder_width=32)
    assert model.encoder is encoder
    assert model.hierarchy.encoder is encoder
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name])
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    assert list(encoder.state_dict()) == keys
    assert [type(module) for module in encoder.modules()] == classes
    assert encoder(torch.randn(1, 3, 50, 70)).shape == (1, 512)
    # The hierarchy holds no second name for any weight.
    names = list(model.state_dict())
    assert len({tensor.data_ptr() for tensor in model.parameters()}) == len(list(model.parameters()))
    assert {name.partition(".")[0] for name in names} == {"encoder", "decoder", "densify"}


def test_given_and_drawn_masks() -> None:
    model = SparK(PlainCNN(), 32, decoder_width=16).eval()
    images = torch.randn(2, 3, 32, 32)
    visible = model.draw_visible(2, torch.Generator().manual_seed(3))
    assert visible.flatten(1).sum(1).tolist() == [round(16 * 0.4)] * 2
    given = model(images, visible)
    assert torch.equal(given.visible, visible)
    drawn = model(images, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn.visible, visible)
    assert drawn.loss.item() == given.loss.item()
    ragged = visible.clone()
    ragged[0] = False
    ragged[0, 0, 0] = True
    assert torch.isfinite(model(images, ragged).loss)
    torch.manual_seed(5)
    first = model(images).visible
    torch.manual_seed(5)
    assert torch.equal(model(images).visible, first)


class SynchronisationCounter(TorchDispatchMode):
    """Counts operations for which a CPU would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.calls.append(name)
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder", get_args(DecoderKind))
def test_a_step_reads_nothing_back(decoder: DecoderKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the layout is built, no operation makes a CPU wait for a GPU."""
    pools = nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1))
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), pools, nn.Conv2d(8, 8, 3, 2, 1, groups=8))
    model = SparK(network, 32, decoder=decoder, decoder_width=16)
    images, visible = torch.randn(2, 3, 32, 32), model.draw_visible(2)
    model(images, visible).loss.backward()  # tables that all layouts share are made on the CPU once
    with SynchronisationCounter() as counter:
        layout = PatchLayout(visible)
    assert counter.calls == ["nonzero", "nonzero"]
    monkeypatch.setattr("sparkmim.models.spark.PatchLayout", lambda *_: layout)
    with SynchronisationCounter() as counter:
        model(images, visible).loss.backward()
    assert not counter.calls


def test_masked_pixels_do_not_matter() -> None:
    """Neither maps nor prediction depend on what is hidden."""
    model = SparK(PlainCNN(), 32, decoder_width=16).eval()
    images = torch.randn(2, 3, 32, 32)
    visible = model.draw_visible(2)
    hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    other = torch.where(hidden, 100 * torch.randn_like(images), images)
    assert torch.equal(model(images, visible).prediction, model(other, visible).prediction)


def test_mask_ratio() -> None:
    for ratio, expected in ((0.6, 6), (0.75, 4), (0.01, 15), (0.99, 1)):
        model = SparK(PlainCNN(), 32, mask_ratio=ratio, decoder_width=16)
        assert model.draw_visible(1).sum() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 33}, "image_size 33×33 is not a multiple of the patch size 8; use 32×32 or 40×40"),
        (
            {"image_size": 32, "patch_size": 12},
            "patch_size 12 is not a multiple of the encoder's stride 8; use 8 or 16",
        ),
        ({"image_size": 8}, "holds a single patch of 8"),
        ({"image_size": 32, "mask_ratio": 1.0}, r"mask_ratio is 1\.0"),
        (
            {"image_size": 32, "decoder_width": 7},
            "decoder_width 7, halved 3 times, leaves no channel; use 8",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparK(PlainCNN(), **{"decoder_width": 16, **settings})


def test_inputs_that_do_not_fit() -> None:
    model = SparK(PlainCNN(), (32, 48), decoder_width=16)
    with pytest.raises(ValueError, match="images are 32×32, but this model was built for 32×48"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"boolean of shape \[2, 4, 6\]"):
        model(torch.randn(2, 3, 32, 48), torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="sample 0 hides nothing"):
        model.encode(torch.randn(2, 3, 32, 48), torch.ones(2, 4, 6, dtype=torch.bool))


def test_the_module_at_fault_is_named() -> None:
    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    network = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Sequential(Flip(), nn.Conv2d(4, 8, 2, 2)))
    model = SparK(network, 16, decoder_width=8)
    with pytest.raises(RuntimeError, match=r"in module `1\.0`: `flip` of a masked map"):
        model(torch.randn(2, 3, 16, 16))


def test_a_copy_trains_on_its_own() -> None:
    model = SparK(PlainCNN(), 32, decoder_width=16)
    twin = copy.deepcopy(model)
    assert twin.encoder is not model.encoder
    assert twin.hierarchy.encoder is twin.encoder
    images, visible = torch.randn(2, 3, 32, 32), model.draw_visible(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    first = twin(images, visible).loss
    first.backward()
    optimiser.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert twin(images, visible).loss.item() != first.item()
    assert model(images, visible).loss.item() == pytest.approx(first.item(), rel=1e-6)


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = SparK(PlainCNN(), 32, decoder_width=16)
    images = torch.nn.functional.interpolate(torch.randn(8, 3, 5, 5), size=(32, 32), mode="bilinear")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        loss = model(images, generator=generator).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_norm_of_the_encoder() -> None:
    assert encoder_norm(create_encoder("resnet18")) == "batch"
    assert encoder_norm(create_encoder("convnext_atto")) == "layer"
    assert encoder_norm(torchvision.models.convnext_tiny()) == "layer"
    assert encoder_norm(volume_network()) == "batch"
    assert encoder_norm(signal_network()) == "none"
    assert encoder_norm(nn.Conv2d(3, 3, 1)) == "none"
    assert encoder_norm(nn.SyncBatchNorm.convert_sync_batchnorm(create_encoder("resnet18"))) == "batch"
    norms = [type(part.norm).__name__ for part in SparK("resnet18", 64, decoder_width=32).densify]
    assert norms == ["BatchNorm2d"] * 4
    norms = [type(part.norm).__name__ for part in SparK("convnext_atto", 64, decoder_width=32).densify]
    assert norms == ["ChannelLayerNorm"] * 4


def test_state_dict_round_trip() -> None:
    model, other = (SparK(PlainCNN(), 32, decoder_width=16).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    images, visible = torch.randn(2, 3, 32, 32), model.draw_visible(2)
    assert torch.equal(model(images, visible).prediction, other(images, visible).prediction)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch.compile itself
@pytest.mark.parametrize("decoder", get_args(DecoderKind))
def test_torch_compile(decoder: DecoderKind) -> None:
    """The encoder stays eager, whose graph depends on the mask; the decoder is compiled once."""
    torch.manual_seed(0)
    model = SparK(PlainCNN(), 32, decoder=decoder, decoder_width=16).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for seed in range(3):
        visible = model.draw_visible(2, torch.Generator().manual_seed(seed))
        model.zero_grad()
        expected = model(images, visible).loss
        expected.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        found = compiled(images, visible).loss
        found.backward()
        torch.testing.assert_close(found, expected)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name])
        if seed == 0:
            first = graphs
    assert graphs == first > 0
    torch._dynamo.reset()
