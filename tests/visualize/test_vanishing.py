"""The vanishing mask: what the picture says is measured, and true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import sparkmim
from sparkmim.cli import main
from sparkmim.drawing.pixels import at_pixels
from sparkmim.models import Hierarchy, create_encoder, random_visible
from sparkmim.sparse import PatchLayout, mask_map
from sparkmim.visualize.vanishing import LAYERS, calibrate, drift, kolmogorov_smirnov, masked_shapes, through_layers

SMALL: dict[str, Any] = {"image_size": 32, "accelerator": "cpu"}
VALUES = st.lists(st.integers(-3, 3), min_size=1, max_size=9)


# A mask under convolutions


@pytest.mark.parametrize("shape", ["star", "ring", "patches"])
def test_dense_masks_grow_by_a_pixel_per_layer_and_sparse_ones_stay(shape: str) -> None:
    visible = masked_shapes(0.6, torch.Generator().manual_seed(0))[shape]
    at_start = at_pixels(visible[None], (64, 64))  # [1, 1, 64, 64]
    found = through_layers(visible, 64)
    for place, layers in enumerate(LAYERS):
        grown = F.max_pool2d(at_start.float(), 2 * layers + 1, 1, layers)[0, 0].bool()
        assert np.array_equal(found["dense"][place], grown)
        assert np.array_equal(found["sparse"][place], at_start[0, 0])
    assert found["dense"][0].sum() < found["dense"][1].sum() < found["dense"][-1].sum()


def test_shapes_are_what_they_are_called() -> None:
    shapes = masked_shapes(0.75, torch.Generator().manual_seed(0))
    assert int(shapes["patches"].sum()) == 16
    assert torch.equal(shapes["ring"], shapes["ring"].T)
    assert not shapes["ring"][32, 32]
    star = shapes["star"]
    assert star[32, 32]
    assert torch.equal(star, star.flip(1))
    rows = star.any(1).nonzero()
    assert star[int(rows[0])].sum() <= 2  # it stands on two points and ends in one
    assert star[int(rows[-1])].sum() < star[32].sum()
    assert not star[int(rows[-1]), 32]


# Values that a network computes


@given(VALUES, VALUES)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_kolmogorov_smirnov_by_its_definition(first: list[int], second: list[int]) -> None:
    expected = max(
        abs(sum(v <= x for v in first) / len(first) - sum(v <= x for v in second) / len(second)) for x in range(-3, 4)
    )
    found = kolmogorov_smirnov(torch.tensor([first]).double(), torch.tensor([second]).double())
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_kolmogorov_smirnov_goes_channel_by_channel() -> None:
    first = torch.tensor([[3.0, 3], [1, 1], [2, 2]]).T  # [2, 3], not in the order of memory
    second = torch.tensor([[1.0, 2, 3, 1, 2, 3], [4, 4, 4, 5, 6, 7]])
    assert kolmogorov_smirnov(first, second).tolist() == [0.0, 1.0]


def test_drift_of_an_even_image_is_the_share_that_is_hidden() -> None:
    """Where every patch is alike and no layer looks beside it, visible patches alone tell all."""
    network = nn.Sequential(nn.Conv2d(3, 4, 2, 2, bias=False), nn.Conv2d(4, 8, 2, 2, bias=False)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) % 5 + 1)
    visible = random_visible(4, (4, 4), 0.75, torch.Generator().manual_seed(0))
    distances = drift(Hierarchy(network), torch.ones(3, 16, 16), visible)
    assert distances["sparse"].tolist() == [0.0, 0.0, 0.0]
    assert distances["dense"].tolist() == [0.75, 0.75, 0.75]


@torch.no_grad()
def test_drift_is_that_of_the_masked_definition(network: str) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(network).double().eval()
    hierarchy = Hierarchy(encoder)
    image = torch.randn(3, 32, 32, dtype=torch.float64)
    images = image.expand(2, -1, -1, -1)
    visible = random_visible(2, (4, 4), 0.6, torch.Generator().manual_seed(1))
    found = drift(hierarchy, image, visible)

    masked = [images, *(map_.values for map_ in hierarchy(mask_map(images, PatchLayout(visible))))]
    zeroed = [images * at_pixels(visible, (32, 32))]
    zeroed += hierarchy(zeroed[0])
    whole = [image[None], *hierarchy(image[None])]
    for stage, (of_masked, of_zeroed, of_whole) in enumerate(zip(masked, zeroed, whole, strict=True)):
        at_visible = at_pixels(visible, of_masked.shape[2:])[:, 0]
        expected = {"sparse": of_masked.movedim(1, -1)[at_visible].T, "dense": of_zeroed.movedim(1, 0).flatten(1)}
        for kind, values in expected.items():
            distance = kolmogorov_smirnov(values.round(decimals=3), of_whole[0].flatten(1).round(decimals=3)).mean()
            assert found[kind][stage].item() == pytest.approx(distance.item(), abs=0.003), (kind, stage)  # by rounding
    assert (found["dense"] > found["sparse"]).all()


@torch.no_grad()
def test_a_calibrated_network_is_normalised_on_these_images(network: str) -> None:
    encoder: Any = create_encoder(network).eval()
    images = 5 + 3 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hierarchy = Hierarchy(encoder).eval()
    for of_images in (2 - images, images):  # nothing is left of what was before
        calibrate(hierarchy, of_images)
    assert not any(module.training for module in hierarchy.modules())
    normalised = encoder.stem[:2](images)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)


# The command


def test_the_command_writes_the_picture_and_says_its_numbers(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["explain", "--model", network, "--image-size", "32", "--accelerator", "cpu"])
    said = capsys.readouterr()
    assert said.err == ""
    assert "patches, sparse: " + ", ".join(["40.6%"] * len(LAYERS)) in said.out  # 26 of 64 patches
    assert "star, dense: " in said.out
    assert "distance to the whole image, of the image and each stage of" in said.out
    assert "  dense: " in said.out
    assert "picture: explain.png" in said.out
    with Image.open("explain.png") as picture:
        assert picture.width >= 1000
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "vanishing", "--model", network])
    assert stopped.value.code == 2
    assert "explain.png exists already" in capsys.readouterr().err


def test_the_result_holds_what_was_measured(network: str) -> None:
    result = sparkmim.explain(model=network, mask_ratio=0.75, **SMALL)
    assert result.layers == list(LAYERS)
    assert result.network == "my_network.py:tiny with random weights"
    assert list(result.shapes) == list(result.shares) == ["star", "ring", "patches"]
    for name, visible in result.shapes.items():
        assert visible.shape == (64, 64)
        assert result.shares[name]["sparse"] == [visible.mean()] * len(LAYERS)
        assert result.shares[name]["dense"][0] == visible.mean()
        assert sorted(result.shares[name]["dense"]) == result.shares[name]["dense"]
    pixels = 3 * 32 * 32
    assert result.values["whole"].shape == result.values["zeroed"].shape == (pixels,)
    assert result.values["visible"].shape == (pixels // 4,)
    assert (result.values["zeroed"] == 0).mean() == pytest.approx(0.75, abs=0.01)
    assert np.isin(result.values["visible"], result.values["whole"]).all()
    assert {kind: len(of_stages) for kind, of_stages in result.distances.items()} == {"sparse": 3, "dense": 3}
    assert result.distances["sparse"][0] < 0.1 < 0.35 < result.distances["dense"][0]
    assert result.out is None
    assert result._repr_png_().startswith(b"\x89PNG")
    assert len(repr(result)) < 1000

    again = sparkmim.explain(model=network, mask_ratio=0.75, **SMALL)
    other = sparkmim.explain(model=network, mask_ratio=0.75, seed=1, **SMALL)
    assert (again.shares, again.distances) == (result.shares, result.distances)
    assert other.distances != result.distances


def test_images_that_are_broken_are_left_out_and_named(
    network: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = sorted(photos.rglob("*.jpg"))[:2]
    broken.write_bytes(b"no picture")
    out = tmp_path / "picture.svg"
    main(["explain", "vanishing", "--model", network, "--image-size", "[32, 48]", "--accelerator", "cpu",
          "--out", str(out), "--images", str(good), str(broken)])  # fmt: skip
    said = capsys.readouterr()
    assert "1 unreadable image left out" in said.err
    assert str(broken) in said.err
    assert out.read_text().startswith("<?xml")
    good.write_bytes(b"")
    with pytest.raises(ValueError, match="no image can be read"):
        sparkmim.explain(model=network, images=[str(good), str(broken)], **SMALL)


def test_weights_and_modules_are_looked_at_as_they_are(
    network: str, photos: Path, written: Callable[..., Path]
) -> None:
    encoder = create_encoder(network)
    file = written(encoder, "mine", model=network, image_size=[32, 32])
    of_file = sparkmim.explain(weights=file, images=photos, accelerator="cpu")
    assert of_file.network == "my_network.py:tiny with the weights of mine.safetensors"
    assert of_file.values["whole"].size == 8 * 3 * 32 * 32  # no more than eight images

    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    of_module = sparkmim.explain(model=encoder, **SMALL)
    assert of_module.network == "Tiny"
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_images_of_other_channels(tmp_path: Path) -> None:
    def grey_or_many(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))

    assert sparkmim.explain(model=grey_or_many(1), **SMALL).values["whole"].size == 32 * 32
    np.save(tmp_path / "many.npy", np.random.default_rng(0).normal(3, 2, (5, 40, 40)).astype(np.float32))
    of_array = sparkmim.explain(model=grey_or_many(5), images=tmp_path / "many.npy", **SMALL)
    assert of_array.values["whole"].size == 5 * 32 * 32
    assert of_array._repr_png_()
    with pytest.raises(ValueError, match="Sequential takes 5 channels; name arrays of so many as --images"):
        sparkmim.explain(model=grey_or_many(5), **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topic": "everything"}, r"topic is 'everything'; .* vanishing"),
        ({"out": "picture.gif"}, r"out is picture.gif; its name ends in"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1.0; it must be above 0 and below 1"),
        ({"image_size": 30}, r"image_size 30×30 is not a multiple of the patch size 4; use 28×28 or 32×32"),
        ({"image_size": [32, 32, 32]}, r"image_size \[32, 32, 32\] is for 3 spatial axes, but .* images of two"),
        ({"model": "resnet18x"}, r"timm has no model named 'resnet18x'"),
        ({"model": 3}, r"model is of type int; pass a name or a torch.nn.Module"),
        ({"model": nn.Conv3d(1, 4, 3, 2, 1)}, r"Conv3d is for 3 spatial axes, but .* images of two"),
        ({"weights": "nowhere"}, r"nowhere does not exist"),
        ({"weights": "volumes.safetensors"}, r"volumes.safetensors is for 3 spatial axes, but .* images of two"),
        ({"images": "nowhere"}, r"nowhere does not exist; --"),
        ({"accelerator": "tpu"}, r"accelerator is 'tpu'"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    change: dict[str, Any], message: str, network: str, volumes: dict[str, Any], assert_refused: Callable[..., None]
) -> None:
    assert_refused(sparkmim.explain, message, **{"model": network, "out": "new.png", **SMALL, **change})
