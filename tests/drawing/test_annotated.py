"""Label maps as files and as colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparkmim.data.label_maps import IGNORED, read_values
from sparkmim.drawing.annotated import class_colour, draw_classes, save_label_map, side_by_side, with_legend


@pytest.mark.parametrize(("classes", "reduced", "mode"), [(256, False, "P"), (255, True, "P"), (256, True, "I;16"),
                                                          (1000, False, "I;16")])  # fmt: skip
def test_label_maps_keep_their_numbers(tmp_path: Path, classes: int, reduced: bool, mode: str) -> None:
    labels = torch.arange(classes).repeat(2, 1)
    labels[1] = labels[1].flip(0)
    save_label_map(tmp_path / "a.png", labels, range(reduced, classes + reduced))
    assert np.array_equal(read_values(tmp_path / "a.png"), labels + reduced)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        if mode == "P":
            assert image.convert("RGB").getpixel((5, 0)) == class_colour(5)


def test_colours_differ() -> None:
    assert len({class_colour(number) for number in range(256)}) == 256


def test_classes_are_drawn_but_where_nothing_counts() -> None:
    image = torch.rand(3, 4, 6)
    labels = torch.zeros(4, 6, dtype=torch.int64)
    labels[:, 3:] = 1
    labels[0] = IGNORED
    drawn = draw_classes(image, labels)
    assert torch.equal(drawn[:, 0], (255 * image[:, 0]).round().byte())
    grey = 255 * image.mean(0)
    for rows, number in ((slice(0, 3), 0), (slice(3, 6), 1)):
        expected = 0.4 * grey[1:, rows] + 0.6 * torch.tensor(class_colour(number)).view(3, 1, 1)
        assert (drawn[:, 1:, rows] - expected).abs().max() <= 0.51
    assert torch.equal(draw_classes(image, torch.full((4, 6), IGNORED)), (255 * image).round().byte())


def test_the_legend_shows_the_classes_that_are_there() -> None:
    labels = torch.tensor([[0, 0, 2], [2, IGNORED, 0]])
    picture = with_legend(torch.zeros(3, 2, 3, dtype=torch.uint8), [labels], ["sky", "sea", "$land$"])
    assert picture.shape[2] >= 320
    assert picture.shape[2] % 3 == 0
    colours = {tuple(colour) for colour in picture.flatten(1).T.tolist()}
    assert {class_colour(0), class_colour(2)} <= colours
    assert class_colour(1) not in colours
    strip = with_legend(torch.zeros(3, 4, 700, dtype=torch.uint8), [labels], ["sky", "sea", "land"])
    assert strip.shape[2] == 1400


def test_a_legend_of_many_classes_counts_the_rest() -> None:
    labels = torch.arange(100)
    few = with_legend(torch.zeros(3, 400, 600, dtype=torch.uint8), [labels[:40]], [f"class {n}" for n in range(100)])
    many = with_legend(torch.zeros(3, 400, 600, dtype=torch.uint8), [labels], [f"class {n}" for n in range(100)])
    assert few.shape[2] == many.shape[2] == 600
    assert 0 <= many.shape[1] - few.shape[1] <= 24


def test_side_by_side() -> None:
    row = side_by_side([torch.zeros(3, 5, 7, dtype=torch.uint8)] * 3)
    assert row.shape == (3, 5, 3 * 7 + 2 * 2)
    assert (row == 255).sum() == 3 * 5 * 2 * 2
