"""The transforms give the promised shapes, ranges and crops."""

from __future__ import annotations

import pytest
import torch
from pictures import checker
from torchvision.transforms import v2

from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, eval_transform, normalisation, pretrain_transform


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
