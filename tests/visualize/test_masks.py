"""Masks of patches from text, pictures and arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparkmim.visualize.masks import mask_given, mask_of_text, mask_text, patches_given

MASK = torch.tensor([[True, False, False], [False, True, True]])


@pytest.mark.parametrize("text", ["x..\n.xx", "X - . / _ 1 #", "100/011\n", "\r\nx..\r\n.xx\r\n"])
def test_text(text: str) -> None:
    assert torch.equal(mask_given(text, (2, 3)), MASK)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**16))
def test_text_comes_back(grid: list[int], seed: int) -> None:
    """Of signals, images and volumes."""
    visible = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.5
    if visible.all() or not visible.any():
        visible.flatten()[0] ^= True
    if visible.numel() > 1:
        assert torch.equal(mask_of_text(mask_text(visible), grid), visible)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "mask.txt").write_text("x..\n.xx\n")
    assert torch.equal(mask_given(tmp_path / "mask.txt", (2, 3)), MASK)
    pixels = np.kron(MASK.numpy(), np.ones((10, 7))) * 255
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mask.png")
    assert torch.equal(mask_given(str(tmp_path / "mask.png"), (2, 3)), MASK)


def test_array() -> None:
    assert torch.equal(mask_given(MASK.numpy(), (2, 3)), MASK)
    assert torch.equal(mask_given([[1, 0, 0], [0, 1, 1]], (2, 3)), MASK)


def test_patches() -> None:
    assert torch.equal(patches_given("0,0 1,1 1,2", (2, 3)), MASK)
    assert torch.equal(patches_given([(0, 0), (1, 1), (1, 2)], (2, 3)), MASK)
    assert patches_given("2", (4,)).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("mask", "grid", "message"),
    [
        ("x.?\n.xx", (2, 3), r"holds '\?'; write x for visible"),
        ("", (2, 3), "is empty"),
        ("x..", (2, 3), "1 row of 3 patches, but there are 2×3 patches"),
        ("x.\n.x", (2, 3), "2 rows of 2 patches"),
        ("...\n...", (2, 3), "hides every patch; show between 1 and 5"),
        ("xxx\nxxx", (2, 3), "hides nothing"),
        ("missing.png", (2, 3), "there is no mask missing.png"),
        ("missing.txt", (2, 3), "missing.txt cannot be read"),
        (np.ones((3, 3)), (2, 3), r"shape \[3, 3\]"),
        ("mask.png", (2, 2, 2), "write the mask as text"),
    ],
)
def test_refusals(mask: object, grid: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_given(mask, grid)


@pytest.mark.parametrize(
    ("visible", "message"),
    [("0,0 0,3", "no patch 0,3; they run from 0,0 to 1,2"), ("0", "no patch 0;"), ("a,b", "such as '0,0 2,1'")],
)
def test_patches_that_do_not_exist(visible: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches_given(visible, (2, 3))


def test_a_broken_picture(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        mask_given(tmp_path / "mask.png", (2, 3))
