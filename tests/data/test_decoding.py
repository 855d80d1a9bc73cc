"""Every format and mode becomes the expected 8-bit pixels; every broken file one clear error."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import checker, png
from PIL import Image, ImageFile, features

from sparkmim.data import decoding
from sparkmim.data.arrays import read_array
from sparkmim.data.decoding import UnreadableImage, decode, from_pil, images_up_to, stored_size
from sparkmim.data.discovery import find_images
from sparkmim.data.label_maps import read_values


def pixels(path: Path, channels: int = 3) -> np.ndarray:
    """What `decode` makes of a file: int [h, w, c]."""
    decoded = decode(path, channels)
    assert decoded.dtype == torch.uint8
    assert decoded.shape[0] == channels
    return decoded.permute(1, 2, 0).numpy().astype(int)


def saved(path: Path, **options: object) -> Path:
    Image.fromarray(checker()).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp", "PNG"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(pixels(path), checker())


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(tmp_path: Path, progressive: bool) -> None:
    path = saved(tmp_path / "image.jpg", quality=95, subsampling=0, progressive=progressive)
    assert np.abs(pixels(path) - checker()).max() < 16
    assert np.abs(pixels(path) - checker()).mean() < 2


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_and_torchvision_agree_on_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    for mode in ("RGB", "L"):
        Image.fromarray(checker()).convert(mode).save(tmp_path / f"{mode}.jpg", quality=60)
    fast = [pixels(tmp_path / f"{mode}.jpg", channels) for mode in ("RGB", "L")]
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    slow = [pixels(tmp_path / f"{mode}.jpg", channels) for mode in ("RGB", "L")]
    assert all(np.array_equal(*pair) for pair in zip(fast, slow, strict=True))


def test_pillow_takes_over_what_torchvision_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no")

    path = saved(tmp_path / "image.jpg")
    expected = pixels(path)
    monkeypatch.setattr(decoding, "decode_jpeg", refuse)
    assert np.array_equal(pixels(path), expected)


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    assert np.array_equal(pixels(saved(tmp_path / "image.jpg", format="PNG")), checker())


def test_grey_to_rgb_and_back(tmp_path: Path) -> None:
    grey = checker()[..., 0]
    for suffix in ("png", "jpg"):
        path = tmp_path / f"grey.{suffix}"
        Image.fromarray(grey).save(path, quality=100)
        assert np.abs(pixels(path) - grey[..., None]).max() <= 1
        assert np.abs(pixels(path, 1) - grey[..., None]).max() <= 1
    path = tmp_path / "colour.png"
    Image.new("RGB", (2, 2), (10, 200, 90)).save(path)
    assert (pixels(path, 1) == round(0.299 * 10 + 0.587 * 200 + 0.114 * 90)).all()


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 128, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "palette.bmp")
    expected = [[[255, 0, 0], [0, 128, 255]]]
    assert pixels(tmp_path / "palette.png").tolist() == expected
    assert pixels(tmp_path / "palette.bmp").tolist() == expected
    assert pixels(tmp_path / "clear.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_shows_white(tmp_path: Path, suffix: str) -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], dtype=np.uint8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(rgba).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    found = pixels(path)[0]
    assert found[:2].tolist() == [[200, 100, 0], [255, 255, 255]]
    half = 128 / 255
    expected = [round(value * half + 255 * (1 - half)) for value in (200, 100, 0)]
    assert np.abs(found[2] - expected).max() <= 1


def test_transparent_grey_and_colour_keys(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[50, 255], [50, 0]]], dtype=np.uint8), mode=None).save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png", 1).ravel().tolist() == [50, 255]
    assert pixels(tmp_path / "la.png").tolist() == [[[50] * 3, [255] * 3]]
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "key.png", transparency=(4, 5, 6))
    assert pixels(tmp_path / "key.png").tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cmyk.{suffix}"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    assert np.abs(pixels(path) - [255, 0, 0]).max() <= 3


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    for suffix in ("png", "tif", "bmp"):
        Image.fromarray(bits).save(tmp_path / f"bits.{suffix}")
        assert pixels(tmp_path / f"bits.{suffix}", 1).ravel().tolist() == [255, 0, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    assert pixels(tmp_path / f"deep.{suffix}", 1).ravel().tolist() == [0, 1, 4, 128, 255]
    assert pixels(tmp_path / f"deep.{suffix}")[0, 3].tolist() == [128] * 3


def test_16_bit_big_endian_tiff(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (2, 1), np.array([1000, 65535], dtype=">u2").tobytes()).save(tmp_path / "deep.tif")
    assert pixels(tmp_path / "deep.tif", 1).ravel().tolist() == [4, 255]


def test_16_bit_colour_keeps_the_high_bytes(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, 2, b"\0\x01\x02\x80\xff\xff\xff"))
    assert pixels(tmp_path / "deep.png")[0, 0].tolist() == [0x01, 0x80, 0xFF]


def test_mode_i_of_pgm_is_16_bit(tmp_path: Path) -> None:
    (tmp_path / "deep.pgm").write_bytes(b"P5\n2 1\n65535\n" + np.array([1000, 30000], dtype=">u2").tobytes())
    assert pixels(tmp_path / "deep.pgm", 1).ravel().tolist() == [4, 117]


def test_without_a_range_the_image_gives_it(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-100, 0, 300]], dtype=np.int32)).save(tmp_path / "ints.tif")
    assert pixels(tmp_path / "ints.tif", 1).ravel().tolist() == [0, 64, 255]
    Image.fromarray(np.array([[0.5, 1.0, 2.5]], dtype=np.float32)).save(tmp_path / "floats.tif")
    assert pixels(tmp_path / "floats.tif", 1).ravel().tolist() == [0, 64, 255]
    odd = np.array([[np.nan, np.inf, -np.inf, 1, 2]], dtype=np.float32)
    Image.fromarray(odd).save(tmp_path / "odd.tif")
    assert pixels(tmp_path / "odd.tif", 1).ravel().tolist() == [0, 255, 0, 0, 255]
    for value in (7.0, np.nan):
        Image.fromarray(np.full((1, 2), value, dtype=np.float32)).save(tmp_path / "flat.tif")
        assert pixels(tmp_path / "flat.tif", 1).ravel().tolist() == [0, 0]


# What has to be done to an upright image so that a viewer, obeying the tag, turns it back.
STORED_AS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = checker(16, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"image.{suffix}", exif=exif, **options)
    found = pixels(tmp_path / f"image.{suffix}")
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (16 if suffix == "jpg" else 0)


def test_broken_exif_is_no_reason(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert np.array_equal(pixels(path), checker())


def test_animation_shows_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.fromarray(checker(seed=seed)) for seed in (0, 1))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    assert np.array_equal(pixels(tmp_path / "pages.tif"), checker(seed=0))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnreadableImage, match=f"image.{suffix}: .") as caught:
        decode(path)
    assert caught.value.path == str(path)
    assert caught.value.reason


@pytest.mark.parametrize(("rows", "level"), [(10, 200), (64, 200), (64, 0), (63, 0)])
def test_a_png_of_too_few_rows(rows: int, level: int, tmp_path: Path) -> None:
    """Its stream ends as it should, so that Pillow would leave the rest black; a black picture is none of that."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    path = tmp_path / "short.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress((b"\0" + bytes([level]) * 192) * rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    if rows == 64:
        assert decode(path).unique().tolist() == [level]
    else:
        with pytest.raises(UnreadableImage, match="its data end before the last row"):
            decode(path)


@pytest.mark.parametrize("cut", [1, 2, 3, 10])
def test_jpeg_without_its_last_bytes(tmp_path: Path, cut: int) -> None:
    path = saved(tmp_path / "image.jpg")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"hello" * 100, "not an image"), (b"\xff\xd8\xff" + b"x" * 500, "not an image")],
)
def test_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        decode(tmp_path / "image.jpg")


def test_missing_folder_and_impossible_name(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        decode(tmp_path / "image.jpg")
    with pytest.raises(UnreadableImage, match="directory"):
        decode(tmp_path)
    with pytest.raises(UnreadableImage, match="null"):
        decode("a\0b.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_damage_never_crashes(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / f"image.{suffix}")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            outcomes.add(decode(path).dtype)
        except UnreadableImage:
            outcomes.add(UnreadableImage)
    assert outcomes <= {torch.uint8, UnreadableImage}
    assert UnreadableImage in outcomes or suffix == "bmp"


@pytest.mark.parametrize("side", [9_000, 15_000, 60_000])
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    # Tiny files that claim 81 to 3600 million pixels: Pillow's own limits are 90 (warns) and 180 (raises).
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 8, 0, b"\0\0"))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UnreadableImage, match="truncated" if side == 9_000 else "larger than 100 megapixels"):
        decode(path)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_image_above_pillows_limits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert np.array_equal(pixels(path), checker())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "ppm", "avif"])
def test_headers_tell_too_large_images(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF here")
    frames = [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue")]
    several = {"save_all": True, "append_images": frames[1:]} if suffix in ("gif", "tif", "webp", "avif") else {}
    frames[0].save(tmp_path / f"image.{suffix}", **several)
    with images_up_to(48 * 40 / 1e6):
        assert decode(tmp_path / f"image.{suffix}").shape == (3, 40, 48)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *_: pytest.fail("pixels were decoded"))
    for read in (decode, stored_size, read_values):
        with images_up_to(48 * 39 / 1e6), pytest.raises(UnreadableImage, match="larger than 0.001872 megapixels"):
            read(tmp_path / f"image.{suffix}")


def test_tiles_larger_than_their_image(tmp_path: Path) -> None:
    """A tile of a TIFF is decoded whole, however little of it the image shows."""
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 11_008, 323: 11_008, 324: 134, 325: 9}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    content = struct.pack("<4sIH", b"II*\0", 8, len(entries)) + b"".join(entries) + bytes(4) + zlib.compress(b"\0")
    (tmp_path / "image.tif").write_bytes(content)
    with pytest.raises(UnreadableImage, match="larger than 100 megapixels"):
        decode(tmp_path / "image.tif")


def test_the_limit_reaches_other_threads_and_ends(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.png")
    with images_up_to(1e-4), ThreadPoolExecutor(1) as pool, pytest.raises(UnreadableImage, match="0.0001 megapixels"):
        pool.submit(decode, path).result()
    assert decode(path).shape[0] == 3


def test_warnings_stay_in(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.jpg")
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(path)
        decode(tmp_path / "palette.png")
    assert caught == []


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels(tmp_path: Path, channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels is {channels}"):
        decode(tmp_path / "image.png", channels)
    with pytest.raises(ValueError, match=f"channels is {channels}"):
        from_pil(Image.new("L", (2, 2)), channels)


def test_from_pil() -> None:
    image = Image.fromarray(checker())
    assert np.array_equal(from_pil(image).permute(1, 2, 0).numpy(), checker())
    stored = io.BytesIO()
    image.save(stored, "JPEG")
    lazy = Image.open(io.BytesIO(stored.getvalue()[:-50]))
    with pytest.raises(UnreadableImage, match="item 3: .*truncated"):
        from_pil(lazy, name="item 3")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "is bad")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "is bad", "a.jpg: is bad")


@pytest.mark.parametrize("file_format", ["EPS", "TGA", "PCX", "ICO"])
def test_no_other_formats_are_opened(file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the name: Pillow starts Ghostscript for EPS."""
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 32), "red").save(path, file_format)
    monkeypatch.setattr("subprocess.Popen", lambda *_: pytest.fail("a program was started"))
    for read in (decode, stored_size):
        with pytest.raises(UnreadableImage, match="not an image of a known format"):
            read(path)


@pytest.mark.parametrize(("suffix", "file_format"), [("gif", "GIF"), ("ppm", "PPM"), ("pgm", "PPM"), ("jfif", "JPEG")])
def test_further_endings(suffix: str, file_format: str, tmp_path: Path) -> None:
    Image.new("L" if suffix == "pgm" else "RGB", (8, 6), "white").save(tmp_path / f"photo.{suffix}", file_format)
    found = find_images(tmp_path)
    assert len(found) == 1
    assert decode(found[0]).shape == (3, 6, 8)


@pytest.mark.parametrize("read", [decode, stored_size, read_values, read_array])
def test_a_pipe_is_not_waited_for(read: Callable[[Path], object], tmp_path: Path) -> None:
    for name in ("photo.jpg", "array.npy", "array.npz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UnreadableImage, match="not a file"):
            read(tmp_path / name)
