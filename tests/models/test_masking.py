"""Masks: how many patches, how random, and what is no mask."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparkmim.models import random_visible
from sparkmim.models.masking import check_visible, patch_grid, visible_per_sample

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=3).filter(lambda grid: torch.Size(grid).numel() > 1),
    st.floats(0.001, 0.999),
    st.integers(1, 4),
)
@EXAMPLES
def test_counts(grid: list[int], ratio: float, batch: int) -> None:
    patches = torch.Size(grid).numel()
    expected = min(max(round(patches * (1 - ratio)), 1), patches - 1)
    assert visible_per_sample(grid, ratio) == expected
    visible = random_visible(batch, grid, ratio)
    assert visible.dtype == torch.bool
    assert visible.shape == (batch, *grid)
    assert visible.flatten(1).sum(1).tolist() == [expected] * batch
    check_visible(visible, batch, grid)


def test_the_papers_mask() -> None:
    assert visible_per_sample((7, 7), 0.6) == 20
    assert visible_per_sample((12, 12), 0.75) == 36


def test_uniform_and_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    visible = random_visible(4000, (3, 3), 0.6, generator).flatten(1).double()
    assert ((visible.mean(0) - 4 / 9).abs() < 0.035).all()  # 4.5 standard deviations
    together = (visible.T @ visible) / 4000
    pairs = together[~torch.eye(9, dtype=torch.bool)]
    assert ((pairs - 4 / 9 * 3 / 8).abs() < 0.03).all()  # drawn without replacement
    repeats = (visible[::2] == visible[1::2]).all(1).double().mean()  # of 126 masks, neighbours share one at times
    assert repeats < 0.02


def test_a_generator_decides() -> None:
    first, again = (random_visible(3, (5, 5), 0.6, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    other = random_visible(3, (5, 5), 0.6, torch.Generator().manual_seed(8))
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    random_visible(3, (5, 5), 0.6, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 60])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mask_ratio is {ratio}; it must lie between 0 and 1, .*0\.6"):
        visible_per_sample((7, 7), ratio)


def test_a_single_patch() -> None:
    with pytest.raises(ValueError, match="a grid of 1×1 patches leaves nothing to hide; use images of at least two"):
        visible_per_sample((1, 1), 0.6)


def test_grids() -> None:
    assert patch_grid((224, 224), 32, 32) == (7, 7)
    assert patch_grid((64, 96), 32, 16) == (2, 3)
    assert patch_grid((128,), 8, 8) == (16,)
    assert patch_grid((8, 8, 16), 4, 4) == (2, 2, 4)


@pytest.mark.parametrize(
    ("size", "patch", "stride", "message"),
    [
        ((224, 224), 48, 32, "patch_size 48 is not a multiple of the encoder's stride 32; use 32 or 64$"),
        ((224, 224), 16, 32, "patch_size 16 is not a multiple of the encoder's stride 32; use 32$"),
        ((224, 224), 0, 32, "patch_size 0 .* use 32$"),
        ((224, 224), -32, 32, "patch_size -32 "),
        ((225, 225), 32, 32, "image_size 225×225 is not a multiple of the patch size 32; use 224×224 or 256×256$"),
        ((224, 250), 32, 32, "image_size 224×250 is not a multiple of the patch size 32; use 224×224 or 224×256$"),
        ((20, 80), 32, 32, "image_size 20×80 is not a multiple of the patch size 32; use 32×96$"),
        ((32, 32), 32, 32, "image_size 32×32 holds a single patch of 32, .* use images of 64 or more$"),
        ((64, 64), 64, 32, "holds a single patch of 64, .* use images of 128 or more, or a patch_size of 32$"),
    ],
)
def test_sizes_that_do_not_fit(size: tuple[int, ...], patch: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_grid(size, patch, stride)


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 32))
@EXAMPLES
def test_what_errors_name_would_do(size: int, patch: int, stride: int) -> None:
    """Whichever sizes a message proposes are accepted."""
    assume(size > patch)
    try:
        patch_grid((size, size), patch, stride)
    except ValueError as error:
        advice = str(error).rpartition("use ")[2].split(" or ")
        if str(error).startswith("patch_size"):
            for near in advice:
                patch_grid((int(near) * 4,) * 2, int(near), stride)
        elif "is not a multiple" in str(error):
            for near in advice:
                patch_grid(tuple(map(int, near.split("×"))), patch, stride)


@pytest.mark.parametrize("size", [(20, 20), (0, 64), (1, 1)])
def test_an_image_smaller_than_a_patch_is_told_what_to_use(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not a multiple of the patch size 32; use \d+×\d+"):
        patch_grid(size, 32, 32)


def test_given_masks() -> None:
    visible = torch.zeros(2, 3, 3, dtype=torch.bool)
    visible[:, 0] = True
    check_visible(visible, 2, (3, 3))
    with pytest.raises(ValueError, match=r"boolean of shape \[2, 3, 3\], not torch\.float32 of \[2, 3, 3\]"):
        check_visible(visible.float(), 2, (3, 3))
    with pytest.raises(ValueError, match=r"boolean of shape \[3, 3, 3\], not torch\.bool of \[2, 3, 3\]"):
        check_visible(visible, 3, (3, 3))
    visible[1] = False
    with pytest.raises(ValueError, match="the mask of sample 1 hides every patch; show between 1 and 8 patches"):
        check_visible(visible, 2, (3, 3))
    visible[1] = True
    with pytest.raises(ValueError, match="the mask of sample 1 hides nothing; show between 1 and 8 patches"):
        check_visible(visible, 2, (3, 3))
