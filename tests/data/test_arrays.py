"""Arrays of any channels and axes: reading, checking, cropping, measuring."""

from __future__ import annotations

import io
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparkmim.commands import statistics
from sparkmim.data.arrays import MissingPackage, array_transform, read_array, resized, to_array
from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from sparkmim.data.dataset import PretrainDataset
from sparkmim.data.decoding import UnreadableImage, images_up_to
from sparkmim.data.source import Source, open_source

RAMP = np.arange(2 * 6 * 8, dtype=np.float32).reshape(2, 6, 8)


def test_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RAMP)
    found = read_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap)  # read where it is needed only
    np.testing.assert_array_equal(found, RAMP)
    np.savez(tmp_path / "one.npz", volume=RAMP)
    np.savez_compressed(tmp_path / "several.npz", label=np.ones(3), image=RAMP)
    for name in ("one.npz", "several.npz"):
        np.testing.assert_array_equal(read_array(tmp_path / name), RAMP)


def test_nifti_is_turned_and_scaled(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    turned = nibabel.Nifti1Image(volume[::-1], np.diag([-1.0, 1, 1, 1]))  # first axis runs right to left
    turned.header.set_slope_inter(2.0, 10.0)
    nibabel.save(turned, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_array(tmp_path / "a.nii.gz"), volume * 2.0 + 10)


def test_nifti_without_nibabel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.nii").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(MissingPackage, match=r"a\.nii is a NIfTI volume; .* `pip install 'sparkmim\[nifti\]'`"):
        read_array(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="sparkmim\\[nifti\\]"):  # before a run begins
        open_source(str(tmp_path), 1, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.npy", b"", "No data left|EOF|empty"),
        ("text.npy", b"hello, I am no array", "pickled|magic|Cannot load"),
        ("broken.npz", b"PK\x03\x04 nonsense", "zip"),
        ("missing.npy", None, "No such file"),
        ("broken.nii.gz", b"nonsense", "gzip|Cannot work out"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=message):
        read_array(tmp_path / name)


def test_the_kind_that_most_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arrays beside an overview, images beside an array; what is left out is said."""
    for number in range(5):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).random((3, 8, 8)))
    pixels = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "overview.png")
    source = open_source(str(tmp_path), 3, 2)
    assert source.arrays
    assert len(source.items) == 5
    assert " ".join(capsys.readouterr().err.split()).endswith("as the other 5 are array files: overview.png")
    for number in range(7):
        Image.fromarray(pixels).save(tmp_path / f"{number}.bmp")
    source = open_source(str(tmp_path), 3, 2)
    assert not source.arrays
    assert len(source.items) == 8
    assert "5 array files left out of" in capsys.readouterr().err


def test_files_of_other_endings_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.jfif", "c.PPM", "d.gif", "e.pgm", "f.dng", "deep/g.DNG", "h.mat", "labels.csv", "i.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert len(open_source(str(tmp_path), 3, 2).items) == 5
    assert " ".join(capsys.readouterr().err.split()).endswith("for their ending: 2 .dng, 1 .mat")


@pytest.mark.parametrize(
    ("shape", "values", "message"),
    [
        ((20_000, 20_000), 1, r"another number of values than its shape \[20000, 20000\] says"),
        ((2, 2), 3_000_000, r"holds 12\.0 MB, more than 1\.6 MB"),  # the bytes of the member, by the archive
    ],
)
def test_no_more_memory_than_is_declared_and_allowed(
    shape: tuple[int, ...], values: int, message: str, tmp_path: Path
) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header.getvalue() + bytes(4 * values))
    tracemalloc.start()
    with images_up_to(0.1), pytest.raises(UnreadableImage, match=message):
        read_array(tmp_path / "bomb.npz")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_nifti_that_declares_more_than_allowed(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((100, 100, 100), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with images_up_to(0.1), pytest.raises(UnreadableImage, match=r"holds 2\.0 MB, more than 1\.6 MB"):
        read_array(tmp_path / "a.nii.gz")


def test_an_archive_called_npy_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=RAMP)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UnreadableImage, match=r"a\.npy: is a \.npz file by its content"):
        to_array(tmp_path / "a.npy", 2, 2)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "hostile.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="Python objects"):
        read_array(tmp_path / "hostile.npy")


def test_which_array_of_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=RAMP, two=RAMP)
    with pytest.raises(UnreadableImage, match="holds one, two; call the array to use 'image'"):
        read_array(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("shape", "channels", "rank", "first"),
    [
        ((5, 6, 7), 5, 2, (5, 6, 7)), ((6, 7, 5), 5, 2, (5, 6, 7)), ((6, 7), 1, 2, (1, 6, 7)),
        ((3, 9, 3), 3, 2, (3, 9, 3)), ((30,), 1, 1, (1, 30)), ((2, 30), 2, 1, (2, 30)), ((4, 5, 6), 1, 3, (1, 4, 5, 6)),
        ((4, 5, 6, 2), 2, 3, (2, 4, 5, 6)),
    ],
)  # fmt: skip
def test_axes(shape: tuple[int, ...], channels: int, rank: int, first: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    for item in (array, torch.from_numpy(array), (array, 3), {"image": array}):
        assert to_array(item, channels, rank).shape == first


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (np.zeros((5, 6)), ValueError, r"item 3 is of shape \[5, 6\]; for channels 2 .* \[2, H, W\] or \[H, W, 2\]$"),
        (np.zeros((2, 0, 4)), ValueError, "is empty"),
        (np.array([["a"]]), ValueError, "holds <U1 values; integers or floats are needed"),
        (np.zeros((2, 3, 3), complex), ValueError, "complex128 values"),
        ("nowhere.npy", UnreadableImage, "No such file"),
        (3.5, TypeError, "item 3 is of type float; accepted is a path"),
        ({"label": 1}, TypeError, "of type dict"),
    ],
)
def test_wrong_items(item: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_array(item, 2, 2, "item 3")


def test_a_signal_as_it_is_but_normalised() -> None:
    transform = array_transform((8,), [1.0, 2.0], [3.0, 4.0], crop_scale=(1.0, 1.0))
    signal = RAMP[:, 0]
    expected = (torch.from_numpy(signal) - torch.tensor([[1.0], [2.0]])) / torch.tensor([[3.0], [4.0]])
    torch.testing.assert_close(transform(signal), expected)
    with pytest.raises(ValueError, match="crop_scale is"):
        array_transform((8,), [0.0], [1.0], crop_scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="flip is 2"):
        array_transform((8,), [0.0], [1.0], flip=2)


@pytest.mark.parametrize("size", [(40,), (20, 30), (8, 9, 10)])
def test_crops_of_any_rank(size: tuple[int, ...]) -> None:
    """Within the array, of the shares asked for, mirrored as often as asked for."""
    shape = (2, *(2 * extent for extent in size))
    axis = np.broadcast_to(np.linspace(0, 1, shape[-1]), shape)
    always = array_transform(size, [0.0, 0.0], [1.0, 1.0], (0.25, 0.5), flip=1.0)
    never = array_transform(size, [0.0, 0.0], [1.0, 1.0], (0.25, 0.5), flip=0.0)
    starts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        out = never(axis)
        torch.manual_seed(seed)
        mirrored = always(axis)
        assert out.shape == (2, *size)
        assert out.dtype == torch.float32
        assert out.min() >= 0
        assert out.max() <= 1
        torch.testing.assert_close(mirrored, out.flip(-1))
        span = (out[..., -1].mean() - out[..., 0].mean()).item() * shape[-1] / (shape[-1] - 1)
        share = span ** len(size)
        assert 0.12 < share < 1
        starts.add(round(out[..., 0].mean().item(), 3))
    assert len(starts) > 4


def test_values_that_are_not_finite_are_skipped_and_named(tmp_path: Path) -> None:
    paths = []
    for index in range(3):
        array = RAMP.copy()
        if index == 1:
            array[0, 0, 0] = np.nan
        np.save(tmp_path / f"{index}.npy", array)
        paths.append(str(tmp_path / f"{index}.npy"))
    source = open_source(str(tmp_path), 2, 2)
    assert source.arrays
    transform = array_transform((6, 8), [0.0, 0.0], [1.0, 1.0], (1.0, 1.0))
    dataset = PretrainDataset(source.items, transform, (2, 2), 0.5, channels=2, read=source.read)
    found = [dataset[epoch, 1] for epoch in range(6)]
    skipped = [sample for sample in found if sample["skipped"]]
    assert skipped  # the crop may leave the value out
    assert skipped[0]["unreadable"] == [f"{paths[1]}: holds values that are not finite"]
    assert all(torch.isfinite(sample["image"]).all() for sample in found)


def test_resizing_averages() -> None:
    """Every other sample of an alternating signal would be constant; its average is too, in between."""
    alternating = torch.tensor([0.0, 1.0]).repeat(1, 32)
    torch.testing.assert_close(resized(alternating, (16,)), torch.full((1, 16), 0.5))
    assert resized(torch.rand(2, 4, 20, 6), (8, 10, 6)).shape == (2, 8, 10, 6)


def test_statistics_of_arrays(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.normal([[[100.0]], [[-3.0]]], [[[20.0]], [[0.5]]], (2, 30, 40 + index)) for index in range(5)]
    for index, array in enumerate(arrays):
        np.save(tmp_path / f"{index}.npy", array)
    (tmp_path / "broken.npy").write_bytes(b"nonsense")
    found = statistics(data=str(tmp_path), channels=2)
    values = np.concatenate([array.reshape(2, -1) for array in arrays], 1)
    assert found.mean == pytest.approx(values.mean(1).tolist())
    assert found.std == pytest.approx(values.std(1).tolist())
    assert found.samples == 5
    assert len(found.unreadable) == 1
    assert "broken.npy" in found.unreadable[0]
    assert statistics(data=str(tmp_path), channels=2, samples=2).samples <= 2


def test_statistics_of_images_and_datasets(photos: list[str]) -> None:
    of_images = statistics(data=str(Path(photos[0]).parent))
    assert of_images == statistics(data=photos)
    assert len(of_images.mean) == 3
    assert all(0 < value < 1 for value in (*of_images.mean, *of_images.std))
    signals = [np.array([[0.0, 2.0, 4.0]]), np.array([[6.0, 8.0]])]
    found = statistics(data=signals, channels=1, axes=1)
    assert (found.mean, found.std) == ([4.0], [pytest.approx(np.std([0, 2, 4, 6, 8]))])
    with pytest.raises(ValueError, match="channel 1 has the same value everywhere"):
        statistics(data=[np.stack([np.arange(4.0), np.ones(4)])], channels=2, axes=1)
    with pytest.raises(ValueError, match="channel 0 has the same value everywhere"):
        statistics(data=[np.full((1, 7), 500.1)], channels=1, axes=1)
    far = statistics(data=[np.array([[1e8, 1e8 + 1e-3]])], channels=1, axes=1)
    assert far.std == [pytest.approx(5e-4, rel=1e-3)]
    with pytest.raises(ValueError, match="axes is 4; it must be between 1 and 3"):
        statistics(data=signals, axes=4)
    with pytest.raises(ValueError, match="nowhere.npy does not exist"):
        statistics(data=["nowhere.npy"], channels=2)


def test_images_and_arrays_in_one_folder(photos: list[str]) -> None:
    folder = Path(photos[0]).parent
    np.save(folder / "a.npy", np.zeros((3, 8, 8)))
    assert not open_source(str(folder), 3, 2).arrays
    assert open_source(str(folder), 3, 2).items == photos
    np.save(folder / "a.npy", np.zeros((5, 8, 8)))
    assert open_source(str(folder), 5, 2).items == [str(folder / "a.npy")]
    with pytest.raises(ValueError, match=r"a\.npy: is of shape \[5, 8, 8\]; for channels 4"):
        open_source(str(folder), 4, 2)


def test_one_rule_tells_images_from_arrays() -> None:
    assert not Source.of(["a.jpg", "b.npy"], 3, 2).arrays
    assert Source.of(["a.NPY", "b.nii.gz"], 3, 2).arrays
    assert not Source.of([RAMP], 3, 2).arrays
    assert Source.of([RAMP], 2, 2).arrays
    assert Source.of(["a.jpg", "b.npy"], 1, 3).arrays
    with pytest.raises(ValueError, match=r"mine holds image files only, .*; signals are read from \.npy"):
        Source.of(["a.jpg"], 1, 1, "mine")


def test_one_rule_for_mean_and_deviation() -> None:
    images = Source.of(["nowhere.jpg"], 3, 2)
    assert images.normalisation() == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert images.normalisation([0, 0.5, 1]) == ([0, 0.5, 1], list(IMAGENET_STD))
    with pytest.raises(ValueError, match=r"mean is 123.7 116 103.5, .*; give --mean 0.4851 0.4549 0.4059$"):
        images.normalisation([123.7, 116, 103.5], [0.2] * 3)
    with pytest.raises(ValueError, match=r"; give --mean 0.4 0.4 0.4 --std 0.2 0.2 0.2$"):
        images.normalisation([102] * 3, [51] * 3)
    assert Source.of(["nowhere.npy"], 1, 2).normalisation([300.0], [20.0]) == ([300.0], [20.0])
    assert Source.of(["nowhere.npy"], 1, 2).normalisation([0.0], [1.0]) == ([0.0], [1.0])  # given: nothing is read
    arrays = Source.of([RAMP], 2, 2)
    assert arrays.normalisation(std=[5.0, 6.0]) == (pytest.approx([23.5, 71.5]), [5.0, 6.0])
    with pytest.raises(ValueError, match="std has 1 value for 2 channels; `sparkmim statistics` measures them"):
        arrays.normalisation([0.0, 0.0], [1.0])


def test_long_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Image.new("RGB", (640, 64)).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path), 3, 2)
    source.say_loss((64, 640))
    assert capsys.readouterr().err == ""
    source.say_loss((224, 224))
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("note: many images are about 640×64; they are squeezed into the network's 224×224, unless")


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_a_range_of_which_little_is_used_is_said(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 bits in 16."""
    values = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    source = open_source(str(tmp_path), 1, 2)
    source.say_loss((16, 16))
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(
        "note: 16-bit images reach 4,095 of 65,535, of which the network sees 16 levels of 256; save"
    )
    Image.fromarray(values * 16).save(tmp_path / f"b.{ending}")
    open_source(str(tmp_path), 1, 2).say_loss((16, 16))
    assert capsys.readouterr().err == ""
