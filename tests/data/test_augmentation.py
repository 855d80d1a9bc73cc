"""The transforms give the promised shapes, ranges and crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import checker
from torch import Tensor
from torchvision.transforms import v2

from sparkmim.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ChangeColours,
    adjust,
    eval_transform,
    normalisation,
    pretrain_transform,
)


def image(height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.from_numpy(checker(height, width).copy()).permute(2, 0, 1)


def test_constants() -> None:
    assert normalisation(3) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = normalisation(1)
    assert mean == pytest.approx([0.449], abs=1e-3)
    assert std == pytest.approx([0.226], abs=1e-3)


@pytest.mark.parametrize("make", [pretrain_transform, eval_transform])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16)])
def test_shape_type_and_normalisation(make: object, size: tuple[int, int]) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    white = torch.full((3, 40, 30), 255, dtype=torch.uint8)
    found = make(size, mean, std)(white)  # type: ignore[operator]
    assert found.shape == (3, *size)
    assert found.dtype == torch.float32
    expected = (1 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(found, expected[:, None, None].expand_as(found))


def test_one_channel() -> None:
    assert pretrain_transform((8, 8), *normalisation(1))(image()[:1]).shape == (1, 8, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (2000, 3)])
def test_odd_sizes(shape: tuple[int, int]) -> None:
    for make in (pretrain_transform, eval_transform):
        assert make((8, 8))(torch.zeros(3, *shape, dtype=torch.uint8)).shape == (3, 8, 8)


def test_is_the_papers_augmentation() -> None:
    """Draw by draw what torchvision's own steps give."""
    for seed in range(8):
        torch.manual_seed(seed)
        found = pretrain_transform((24, 24))(image())
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(24, scale=(0.67, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        cropped = v2.RandomHorizontalFlip(0.5)(crop(image())).float() / 255
        expected = (cropped - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        torch.testing.assert_close(found, expected)


def test_flip_and_crop_can_be_set() -> None:
    plain = pretrain_transform((48, 48), crop_scale=(1.0, 1.0), flip=0.0)
    mirrored = pretrain_transform((48, 48), crop_scale=(1.0, 1.0), flip=1.0)
    square = image(48, 48)
    torch.testing.assert_close(mirrored(square), plain(square).flip(-1))
    unnormalised = (
        plain(square) * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    )
    differs = (unnormalised * 255 - square).abs().mean()
    assert differs < 60  # all of it, up to the aspect ratio


def test_eval_takes_the_centre() -> None:
    picture = torch.zeros(3, 64, 128, dtype=torch.uint8)
    picture[:, :, 32:96] = 255
    found = eval_transform((64, 64), (0, 0, 0), (1, 1, 1), crop=1.0)(picture)
    assert torch.equal(found, torch.ones(3, 64, 64))
    # 7/8 of the shorter side: 64 of it is resized to 64, of which the centre 56 is kept
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    found = eval_transform((56, 56), (0, 0, 0), (1, 1, 1))(ramp)
    torch.testing.assert_close(found[0, 0] * 255, torch.arange(4.0, 60.0))


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"crop_scale is \(0.9, 0.5\)"):
        pretrain_transform((8, 8), crop_scale=(0.9, 0.5))
    with pytest.raises(ValueError, match="flip is 2"):
        pretrain_transform((8, 8), flip=2)
    with pytest.raises(ValueError, match="crop is 0"):
        eval_transform((8, 8), crop=0)
    with pytest.raises(ValueError, match="mean has 3 values and std 1"):
        eval_transform((8, 8), std=[1.0])


def test_colours_change_with_jitter_alone() -> None:
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = grey = 0
    for seed in range(40):
        both = []
        for jitter in (0.0, 0.5):
            torch.manual_seed(seed)  # the crop is drawn first, and so the same
            both.append(pretrain_transform((32, 32), (0, 0, 0), (1, 1, 1), jitter=jitter)(picture))
        before, found = both
        assert ((found >= 0) & (found <= 1)).all()
        changed += not torch.equal(before, found)
        grey += bool((found[0] - found[1]).abs().max() < 1e-6)
    assert 24 <= changed < 40  # 0.8, and those of the rest that become grey: 0.84
    assert 2 <= grey <= 16  # one in five


def adjusted(image: Tensor, kind: str, amount: float) -> Tensor:
    """An image of any colours, `[C, H, W]`, by `adjust`."""
    channels = len(image)
    found = torch.from_numpy(adjust(np.eye(channels, channels + 1), kind, amount, image.mean((1, 2)).numpy()))
    return (found[:, :-1] @ image.flatten(1) + found[:, -1:]).view_as(image)


@pytest.mark.parametrize("amount", [-1.0, -0.3, 0.2])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_changes_of_colours_are_torchvisions(kind: str, amount: float) -> None:
    """Colours in the middle, so that torchvision clamps none."""
    image = 0.3 + 0.4 * torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = getattr(v2.functional, f"adjust_{kind}")(image, 1 + amount)
    # Its weights of grey are rounded to four digits.
    torch.testing.assert_close(adjusted(image, kind, amount), expected, rtol=0, atol=2e-4)


def test_hue_turns_colours_about_the_greys() -> None:
    image = torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = adjusted(image, "hue", 1 / 3)
    # A third of a turn permutes the channels; torchvision's computes in float32.
    torch.testing.assert_close(turned, v2.functional.adjust_hue(image, 1 / 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(turned, image[[2, 0, 1]])
    little = adjusted(image, "hue", 0.05)
    torch.testing.assert_close(little.sum(0), image.sum(0))
    torch.testing.assert_close(little.square().sum(0), image.square().sum(0))
    assert not torch.allclose(little, image, atol=0.01)


def test_changes_of_colours_follow_one_another() -> None:
    """The composed map is each in turn; contrast knows the average of what comes before it."""
    image = torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changes = [("hue", 0.1), ("brightness", 0.4), ("saturation", -0.5), ("contrast", 0.3), ("hue", -0.2)]
    expected, colours = image, np.eye(3, 4)
    for kind, amount in changes:
        expected = adjusted(expected, kind, amount)
        colours = adjust(colours, kind, amount, image.mean((1, 2)).numpy())
    found = torch.from_numpy(colours)
    torch.testing.assert_close((found[:, :3] @ image.flatten(1) + found[:, 3:]).view_as(image), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_without_colours_change_in_brightness_and_contrast(channels: int) -> None:
    torch.manual_seed(1)
    image = 0.4 + 0.1 * torch.rand(channels, 5, 7)
    found = ChangeColours(0.5)(image)
    slope, _ = np.polyfit(image.flatten(), found.flatten(), 1)
    assert abs(slope - 1) > 0.01
    torch.testing.assert_close(found - found.mean(), float(slope) * (image - image.mean()), atol=1e-5, rtol=0)


LINE = torch.arange(640, dtype=torch.float32).mul(255 / 639).round().to(torch.uint8).expand(3, 64, 640)
"""A picture of a line-scan camera, whose columns can be told by their grey."""


@pytest.mark.parametrize("size", [(32, 32), (64, 640)])
@pytest.mark.parametrize("turned", [False, True])
def test_crops_of_long_images_reach_all_of_it(size: tuple[int, int], turned: bool) -> None:
    """The usual crop would be their middle seventh."""
    image = LINE.transpose(1, 2) if turned else LINE
    transform = pretrain_transform(size, [0.0] * 3, [1.0] * 3, flip=0.0)
    torch.manual_seed(0)
    shown = [transform(image)[0] for _ in range(40)]
    assert all(each.shape == size for each in shown)
    assert min(each.min() for each in shown) < 0.04
    assert max(each.max() for each in shown) > 0.96
    widths = [(each.max() - each.min()).item() for each in shown]
    assert 0.6 < min(widths) < max(widths) <= 1.0


@pytest.mark.parametrize("crop", [None, 0.875, 1.0])
def test_evaluation_sees_all_of_long_images(crop: float | None) -> None:
    found = eval_transform((32, 32), [0.0] * 3, [1.0] * 3, crop)(LINE)
    assert found.min() < 0.05
    assert found.max() > 0.95
    line = eval_transform((64, 640), [0.0] * 3, [1.0] * 3, 1.0)(LINE)
    torch.testing.assert_close(line, LINE / 255)  # the input has the picture's proportions
    usual = eval_transform((32, 32), [0.0] * 3, [1.0] * 3, 1.0)(LINE[:, :, :190])
    assert (usual.max() - usual.min()).item() == pytest.approx(63 / 639, abs=0.02)  # not long: the centre, as ever
