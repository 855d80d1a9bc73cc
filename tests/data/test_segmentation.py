"""Images with label maps: where they are found, how they are read, what is wrong, and what becomes of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_map_files import NAMES, shapes, write_label_map, write_shapes
from pictures import png
from PIL import Image
from torchvision import tv_tensors

from sparkmim.data.dataset import TargetDataset
from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.label_maps import (
    IGNORED,
    SegmentationImages,
    check_segmentation,
    find_segmentation,
    open_segmentation,
    read_class_names,
)
from sparkmim.data.segmentation_transforms import segmentation_resize, segmentation_transform
from sparkmim.errors import UserError


def part(root: Path, name: str = "train", **more: int | bool) -> SegmentationImages:
    return open_segmentation(root / "images" / name, root / "labels" / name, **more)  # type: ignore[arg-type]


def one_map(root: Path, values: np.ndarray, palette: bool = False, **more: int | bool) -> torch.Tensor:
    """The classes that a single label map is read as."""
    folder = root / "images" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", values.shape[::-1]).save(folder / "a.jpg")
    write_label_map(root / "labels" / "train" / "a.png", values, palette)
    return part(root, **more)[0][1]


# Where they are


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "validation", None])
@pytest.mark.parametrize("labels", ["labels", "annotations", "masks"])
def test_parts_are_found_by_usual_names(tmp_path: Path, train: str, val: str | None, labels: str) -> None:
    for name in (train, val):
        if name is not None:
            (tmp_path / "images" / name).mkdir(parents=True)
            (tmp_path / labels / name).mkdir(parents=True)
    assert find_segmentation(tmp_path, "train") == (tmp_path / "images" / train, tmp_path / labels / train)
    if val is None:
        with pytest.raises(FileNotFoundError, match="holds no images to validate on: there is no images/val/"):
            find_segmentation(tmp_path, "val")
    else:
        assert find_segmentation(tmp_path, "val") == (tmp_path / "images" / val, tmp_path / labels / val)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        find_segmentation(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="holds no images to train on: there is no images/train/"):
        find_segmentation(tmp_path, "train")
    (tmp_path / "images" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no label maps for images/train/: none of labels/train/, annotations/"):
        find_segmentation(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="there is no folder of label maps"):
        part(tmp_path)


IMAGE, MAP = np.zeros((4, 6, 3), np.uint8), np.eye(4, 6, dtype=np.uint8)


def write_pairs(root: Path, *names: tuple[str, str]) -> Path:
    for image, labels in names:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGE).save(root / image)
        write_label_map(root / labels, MAP)
    return root


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("images/{}.png", "masks/{}_mask.png"), ("images/{}.jpg", "labels/{}-seg.gif"), ("{}.png", "{}_mask.png"),
        ("{}.jpg", "{} Labels.bmp"), ("images/a/{}.jpg", "masks/a/{}_GT.tif"), ("{}_sat.jpg", "{}_mask.png"),
        ("images/{}_image.png", "labels/{}_label.png"), ("images/{}_mask.png", "masks/{}_mask.png"),
    ],
)  # fmt: skip
def test_label_maps_of_usual_names(tmp_path: Path, image: str, labels: str) -> None:
    """In a folder without parts, and in `train/`; a share can be set apart."""
    for root, inside in ((tmp_path / "whole", ""), (tmp_path / "parts", "train")):
        write_pairs(root / inside, *((image.format(f"part_0{n}"), labels.format(f"part_0{n}")) for n in range(5)))
        data = open_segmentation(*find_segmentation(root, "train"))
        assert check_segmentation([data])[0] == ["0", "1"]
        assert [Path(name).name for name in data.names] == [Path(image).name.format(f"part_0{n}") for n in range(5)]
        assert data[4][1].tolist() == MAP.tolist()
        train, val = data.split(0.4, seed=1)
        assert (len(train), len(val)) == (3, 2)
        assert sorted([*train.names, *val.names]) == data.names
        assert data.split(0.4, seed=1)[1].names == val.names != data.split(0.4, seed=2)[1].names
    with pytest.raises(FileNotFoundError, match=r"or set some apart with --val-split 0\.2"):
        find_segmentation(tmp_path / "whole", "val")


def test_label_maps_that_belong_to_no_image(tmp_path: Path) -> None:
    write_pairs(tmp_path, ("a.jpg", "a_mask.png"), ("b.jpg", "b_mask.png"))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match="1 label map without image: a_mask.png"):
        check_segmentation([open_segmentation(tmp_path, tmp_path)])
    write_label_map(tmp_path / "b-seg.png", MAP)
    with pytest.raises(ValueError, match="1 label map with another of the same name: b-seg.png, b_mask.png"):
        check_segmentation([open_segmentation(tmp_path, tmp_path)])
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no label map beside the images is named like 01_mask.png"):
        check_segmentation([open_segmentation(tmp_path, tmp_path)])
    write_label_map(tmp_path / "b_mask.png", MAP)
    with pytest.raises(ValueError, match="fewer than 2 images, so none can be set apart"):
        check_segmentation(open_segmentation(tmp_path, tmp_path).split(0.5, seed=0))


def test_class_names(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("﻿road\n traffic light \r\n\n", encoding="utf-8")
    assert read_class_names(file) == ["road", "traffic light"]
    for text, message in (("a\n\nb\n", "line 2 is empty"), ("", "line 1 is empty"), ("a\nb\na\n", "a class twice: a")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_names(file)
    with pytest.raises(FileNotFoundError, match="there is no file of class names"):
        read_class_names(tmp_path / "none.txt")


# How they are read


def test_items_are_what_was_written(tmp_path: Path) -> None:
    data = part(write_shapes(tmp_path))
    assert [data.name(place) for place in range(len(data))] == [
        "even/0000.jpg", "even/0002.jpg", "odd/deep/0001.png", "odd/deep/0003.png"
    ]  # fmt: skip
    image, labels = data[2]
    pixels, classes = shapes(1)
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(labels, tv_tensors.Mask)
    assert torch.equal(image.as_subclass(torch.Tensor), torch.from_numpy(pixels).permute(2, 0, 1))
    assert np.array_equal(labels.numpy(), classes)
    assert np.array_equal(data[0][1].numpy(), shapes(0)[1])  # of a palette: numbers of its colours


@pytest.mark.parametrize("palette", [False, True])
def test_what_counts_for_nothing(tmp_path: Path, palette: bool) -> None:
    values = np.array([[0, 1, 2], [150, 254, 255]], np.uint8)
    labels = one_map(tmp_path / "as_it_is", values, palette)
    assert labels.tolist() == [[0, 1, 2], [150, 254, IGNORED]]
    labels = one_map(tmp_path / "reduced", values, palette, reduce=True)
    assert labels.tolist() == [[IGNORED, 0, 1], [149, 253, IGNORED]]
    labels = one_map(tmp_path / "other", values, palette, ignore=1)
    assert labels.tolist() == [[0, IGNORED, 2], [150, 254, 255]]


def test_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 255, 300], [4000, 65534, 65535]], np.uint16)
    assert one_map(tmp_path, values, ignore=65535).tolist() == [[0, 255, 300], [4000, 65534, IGNORED]]


@pytest.mark.parametrize("pair", [(0, 255), (0, 128), (1, 2), (0, 65535)])
@pytest.mark.parametrize("ignore", [255, 254])
def test_two_values_are_two_classes(tmp_path: Path, pair: tuple[int, int], ignore: int) -> None:
    """Whatever they are, as long as no others are in any map."""
    kind = np.uint16 if pair[1] > 255 else np.uint8
    one_map(tmp_path, np.array([[pair[0], pair[1], pair[1]]], kind), ignore=ignore)
    data = part(tmp_path, ignore=ignore)
    found, notes = check_segmentation([data])
    assert found == [str(value) for value in pair]
    said = f"{pair[0]} and {pair[1]} are the only values in the label maps, and so two classes"
    assert notes == [f"{said}; --classes names them"]
    assert data[0][1].tolist() == [[0, 1, 1]]
    named = part(tmp_path, ignore=ignore)
    assert check_segmentation([named], ["ground", "disc"]) == (["ground", "disc"], [f"{said}, ground and disc"])
    assert named[0][1].tolist() == [[0, 1, 1]]


def test_two_values_that_number_classes(tmp_path: Path) -> None:
    """In a part without the second class; and where there are other values, or weights that say so."""
    one_map(tmp_path, np.array([[0, 255]], np.uint8))
    data = part(tmp_path)
    check_segmentation([data], ["ground", "disc"], numbered=True)
    assert data[0][1].tolist() == [[0, IGNORED]]
    check_segmentation([data], ["ground", "disc", "box"])
    assert data[0][1].tolist() == [[0, IGNORED]]
    write_label_map(tmp_path / "labels" / "train" / "a.png", np.array([[1, 255]], np.uint8))
    Image.new("RGB", (2, 1)).save(tmp_path / "images" / "train" / "b.jpg")
    write_label_map(tmp_path / "labels" / "train" / "b.png", np.array([[0, 255]], np.uint8))
    data = part(tmp_path)
    assert check_segmentation([data])[0] == ["0", "1"]
    assert [data[place][1].tolist() for place in range(2)] == [[[1, IGNORED]], [[0, IGNORED]]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_values_in_colour_files(tmp_path: Path, mode: str) -> None:
    one_map(tmp_path, np.zeros((1, 3), np.uint8))
    path = tmp_path / "labels" / "train" / "a.png"
    grey = Image.fromarray(np.array([[0, 1, 255]], np.uint8)).convert(mode)
    grey.save(path)
    assert part(tmp_path)[0][1].tolist() == [[0, 1, IGNORED]]
    if mode != "RGB":
        grey.putalpha(200)
        grey.save(path)
        with pytest.raises(ValueError, match=rf"1 label map of colours, not of class numbers: a.png \({mode}\)"):
            check_segmentation([part(tmp_path)])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits(tmp_path: Path, bits: int) -> None:
    """Pillow spreads grey values of 2 and 4 bits over the range of 8; the numbers in the file count."""
    numbers = [number % 2**bits for number in range(8)]
    row = int("".join(f"{number:0{bits}b}" for number in numbers), 2).to_bytes(bits, "big")
    one_map(tmp_path, np.zeros((1, 8), np.uint8))
    (tmp_path / "labels" / "train" / "a.png").write_bytes(png(8, 1, bits, 0, b"\0" + row))
    assert part(tmp_path)[0][1].tolist() == [numbers]


@pytest.mark.parametrize("upright", [True, False])
def test_images_are_turned_as_their_label_maps_are(tmp_path: Path, upright: bool) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "a.png", exif=exif)
    write_label_map(tmp_path / "labels" / "train" / "a.png", (np.arange(600) % 2).astype(np.uint8).reshape(
        (30, 20) if upright else (20, 30)))  # fmt: skip
    data = part(tmp_path)
    image, labels = data[0]
    assert image.shape[1:] == labels.shape
    bright = image[0, :10] if upright else image[0, :, :10]
    assert bright.min() == 255
    check_segmentation([data])


def test_arrays_of_any_channels(tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    values = np.random.default_rng(0).normal(300, 50, (5, 20, 30)).astype(np.float32)
    np.save(tmp_path / "images" / "train" / "a.npy", values)
    write_label_map(tmp_path / "labels" / "train" / "a.png", np.eye(20, 30, dtype=np.uint8))
    data = part(tmp_path, channels=5)
    assert data.arrays
    assert check_segmentation([data])[0] == ["0", "1"]
    image, _ = data[0]
    assert np.array_equal(image.numpy(), values)
    transform = segmentation_transform(32, 48, [300.0] * 5, [50.0] * 5, jitter=1.0, arrays=True)
    torch.manual_seed(0)
    shown, labels = transform(data[0])
    assert shown.shape == (5, 48, 48)
    assert (shown[:, labels == IGNORED] == 0).all()
    values[2, 3, 4] = np.nan
    np.save(tmp_path / "images" / "train" / "a.npy", values)
    with pytest.raises(UnreadableImage, match="values that are not finite"):
        part(tmp_path, channels=5)[0]
    np.save(tmp_path / "images" / "train" / "a.npy", values[:, :-1])
    with pytest.raises(ValueError, match="1 label map of another size than its image: a.npy is 30×19, a.png 30×20"):
        check_segmentation([part(tmp_path, channels=5)])


# What is wrong with them


def test_nothing_to_say_of_good_data(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    parts = [part(root), part(root, "val")]
    assert check_segmentation(parts, NAMES) == (NAMES, [])
    assert check_segmentation(parts) == (["0", "1", "2", "3"], [])


def test_everything_fatal_is_told_at_once(tmp_path: Path) -> None:
    root = write_shapes(tmp_path, train=8)
    images, labels = root / "images" / "train", root / "labels" / "train"
    (labels / "even" / "0000.png").unlink()
    (images / "odd" / "deep" / "0001.png").unlink()
    write_label_map(labels / "even" / "0002.png", np.zeros((10, 20), np.uint8))
    Image.fromarray(shapes(3)[0]).save(labels / "odd" / "deep" / "0003.png")
    write_label_map(labels / "even" / "0004.png", np.full((64, 80), 7, np.uint8))
    (labels / "odd" / "deep" / "0005.png").write_bytes(b"nothing")
    (images / "even" / "0006.jpg").write_bytes(b"nothing")
    Image.new("RGB", (80, 64)).save(images / "odd" / "deep" / "0007.jpg")
    (root / "labels" / "val" / "odd" / "deep" / "1001.png").unlink()
    with pytest.raises(ValueError, match="cannot be used as it is") as failure:
        check_segmentation([part(root), part(root, "val")], NAMES)
    train, val = root / "labels" / "train", root / "labels" / "val"
    assert str(failure.value).splitlines() == [
        f"{images} and {root / 'images' / 'val'} cannot be used as it is:",
        f"- {train}: 1 image with another of the same name: odd/deep/0007.jpg, odd/deep/0007.png",
        f"- {train}: 1 image without label map: even/0000.jpg",
        f"- {train}: 1 label map without image: odd/deep/0001.png",
        f"- {train}: 1 label map that cannot be read: odd/deep/0005.png (not an image of a known format)",
        f"- {train}: 1 label map of colours, not of class numbers: odd/deep/0003.png (RGB)",
        f"- {train}: 1 label map of another size than its image: even/0002.jpg is 80×64, even/0002.png 20×10",
        f"- {train}: 1 label map with values that are none of the 4 classes: even/0004.png has 7",
        f"- {val}: 1 image without label map: odd/deep/1001.png",
        "and worth knowing:",
        f"- {train}: 1 image that cannot be read: even/0006.jpg (not an image of a known format)",
    ]


def test_values_are_told_as_they_stand_in_the_file(tmp_path: Path) -> None:
    one_map(tmp_path, np.array([[0, 1, 5]], np.uint8))
    with pytest.raises(ValueError, match="none of the 4 classes: a.png has 5"):
        check_segmentation([part(tmp_path, reduce=True)], NAMES)
    with pytest.raises(ValueError, match="none of the 4 classes: a.png has 5"):
        check_segmentation([part(tmp_path)], NAMES)


@pytest.mark.parametrize(
    ("values", "message"),
    [([[0, 0]], "there is class 0 alone"), ([[255, 255]], "there is no class")],
)
def test_a_single_class(tmp_path: Path, values: list[list[int]], message: str) -> None:
    one_map(tmp_path, np.array(values, np.uint8))
    with pytest.raises(ValueError, match=message):
        check_segmentation([part(tmp_path)])


def test_a_part_in_which_nothing_counts(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    for file in (root / "labels" / "val").rglob("*.png"):
        write_label_map(file, np.full_like(np.array(Image.open(file)), 255))
    with pytest.raises(ValueError, match="labels/val: every pixel of every label map is ignored"):
        check_segmentation([part(root), part(root, "val")])


def test_no_images(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    for folder in ("images", "labels"):
        (root / folder / "train").rename(root / folder / "elsewhere")
        (root / folder / "train").mkdir()
    (root / "labels" / "val" / "odd" / "deep" / "1001.png").unlink()
    with pytest.raises(ValueError, match="no images in .*train") as failure:
        check_segmentation([part(root), part(root, "val")])
    assert "1 image without label map" in str(failure.value)
    with pytest.raises(ValueError, match="holds image files only, which have 1 or 3 channels"):
        check_segmentation([part(root, "val", channels=4)])


def test_classes_without_pixels_are_worth_knowing(tmp_path: Path) -> None:
    root = write_shapes(tmp_path, train=1)
    write_label_map(root / "labels" / "train" / "even" / "0000.png", np.zeros((64, 80), np.uint8))
    _, notes = check_segmentation([part(root), part(root, "val")])
    assert notes == [f"3 classes without a pixel in {root / 'labels' / 'train'}: 1, 2, 3"]


# What becomes of them


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31), height=st.integers(5, 90), width=st.integers(5, 90), crop=st.integers(4, 70),
    shortest=st.integers(4, 60),
)  # fmt: skip
def test_image_and_label_map_move_together(seed: int, height: int, width: int, crop: int, shortest: int) -> None:
    """Halves of two colours: pixels away from their border have the colour of their class."""
    labels = torch.zeros(height, width, dtype=torch.int32)
    labels[:, width // 2 :] = 1
    image = torch.tensor([40, 200], dtype=torch.uint8)[labels.long()].expand(3, -1, -1)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.25)
    transform = segmentation_transform(shortest, crop, mean, std)
    torch.manual_seed(seed)
    shown, classes = transform((tv_tensors.Image(image), tv_tensors.Mask(labels)))
    assert shown.shape == (3, crop, crop)
    assert classes.shape == (crop, crop)
    assert (shown.dtype, classes.dtype) == (torch.float32, torch.int64)
    assert type(shown) is type(classes) is torch.Tensor
    pixels = 255 * (shown * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))
    inside = classes != IGNORED
    assert inside.any()
    filling = torch.tensor([round(255 * value) for value in mean]).view(3, 1)
    assert torch.allclose(pixels[:, ~inside], filling.float(), atol=0.1)
    colour = torch.where(classes == 1, 200.0, 40.0)
    wrong = ((pixels - colour).abs() > 1).any(0) & inside
    border = max(3, round(2 * shortest * 3 / min(height, width)))  # columns that resizing mixes
    assert wrong.any(0).sum() <= border


def test_draws_are_those_of_the_sample(tmp_path: Path) -> None:
    transform = segmentation_transform(64, 40, [0.5] * 3, [0.2] * 3, jitter=0.5)
    dataset = TargetDataset(part(write_shapes(tmp_path)), transform, seed=3)
    first, again, later = dataset[0, 1], dataset[0, 1], dataset[1, 1]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["target"], again["target"])
    assert not torch.equal(first["image"], later["image"])


def test_another_stands_in_for_an_unreadable_image(tmp_path: Path) -> None:
    data = part(write_shapes(tmp_path))
    dataset = TargetDataset(data, segmentation_transform(64, 40, [0.5] * 3, [0.2] * 3))
    expected = dataset[0, 0]
    (data.files.images / data.name(0)).write_bytes(b"nothing")
    sample = dataset[0, 0]
    assert sample["skipped"] == 1
    assert "0000.jpg" in sample["unreadable"][0]
    assert not torch.equal(sample["target"], expected["target"])


@pytest.mark.parametrize(("size", "expected"), [((64, 80), (32, 40)), ((100, 50), (64, 32)), ((10, 1000), (1, 128))])
def test_evaluation_resizes_the_shorter_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = torch.full((3, *size), 255, dtype=torch.uint8)
    seen = segmentation_resize(32, [0.5] * 3, [0.25] * 3)(image)
    assert seen.shape == (3, *expected)
    assert torch.allclose(seen, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (
            40_000,
            np.uint16,
            r"a\.png has the value 40000, which makes 40,001 classes, of which 3 have a pixel; ",
        ),
        (6, np.uint8, r"a\.png has the value 6, which makes 7 classes, of which 3 have a pixel"),
        (4, np.uint8, ""),
    ],
)
def test_a_stray_value_makes_no_classes(tmp_path: Path, value: int, kind: type, message: str) -> None:
    one_map(tmp_path, np.array([[0, 1, value]], kind))
    expected = pytest.raises(UserError, match=message) if message else nullcontext()
    with expected:
        assert check_segmentation([part(tmp_path)])[0] == ["0", "1", "2", "3", "4"]


def test_more_than_a_thousand_classes_have_names(tmp_path: Path) -> None:
    one_map(tmp_path, np.arange(1001, dtype=np.uint16)[None], ignore=65535)
    with pytest.raises(UserError, match=r"1000, which makes 1,001 classes, of which 1,001 .* by --classes"):
        check_segmentation([part(tmp_path, ignore=65535)])
    assert len(check_segmentation([part(tmp_path, ignore=65535)], [f"class {n}" for n in range(1001)])[0]) == 1001


def test_values_that_are_no_classes_take_no_memory(tmp_path: Path) -> None:
    one_map(tmp_path, np.array([[0, 1]], np.uint8))
    Image.fromarray(np.array([[0, 2**30]], np.int32)).save(tmp_path / "labels" / "train" / "a.png", "TIFF")
    with pytest.raises(UserError, match="holds values from 0 to 1073741824; classes are 0 to 65535"):
        check_segmentation([part(tmp_path)])
