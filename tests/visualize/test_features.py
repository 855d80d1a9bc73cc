"""Feature maps as colours: the components themselves, what becomes of them, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sparkmim
from sparkmim.cli import main
from sparkmim.drawing.figures import shortened
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models import create_encoder
from sparkmim.visualize.features import as_colours, principal_components


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The components


@pytest.mark.parametrize("shape", [(200, 12), (12, 200), (50, 50), (40, 3), (40, 2), (40, 1), (3, 7)])
def test_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    points = torch.randn(shape, generator=generator(0), dtype=torch.float64)
    points = points * torch.linspace(1, 4, shape[1], dtype=torch.float64) + 10
    coordinates, shares = principal_components(points)

    left, singular, directions = np.linalg.svd((points - points.mean(0)).numpy(), full_matrices=False)
    count = min(3, shape[1], shape[0] - 1)
    largest = np.abs(directions).argmax(1)
    signs = np.sign(directions[np.arange(len(directions)), largest])
    expected = left * singular * signs
    assert coordinates.dtype == torch.float64
    np.testing.assert_allclose(coordinates, expected[:, :count], rtol=0, atol=1e-10)
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:count], rtol=1e-10)


def test_components_do_not_depend_on_the_order_of_positions() -> None:
    points = torch.randn(300, 8, generator=generator(1)) * torch.arange(1.0, 9.0)
    order = torch.randperm(300, generator=generator(2))
    one, shares = principal_components(points)
    other, other_shares = principal_components(points[order])
    np.testing.assert_allclose(other, one[order], atol=1e-9)
    np.testing.assert_allclose(other_shares, shares, rtol=1e-12)
    assert torch.equal(principal_components(points)[0], one)


def test_directions_of_rounding_errors_are_left_out() -> None:
    along = torch.linspace(-1, 1, 100)[:, None] * torch.tensor([1.0, 2.0, 0.0, -1.0])
    points = along + 5 + 1e-7 * torch.randn(100, 4, generator=generator(3))
    coordinates, shares = principal_components(points)
    assert coordinates.shape == (100, 1)
    assert shares.item() == pytest.approx(1)
    assert (coordinates.diff(dim=0) > 0).all()  # the largest entry, 2, is positive


# As colours


def colours_of(*channels: Tensor) -> tuple[Any, float]:
    return as_colours(torch.stack(channels)[None])


def test_colours_run_over_the_whole_range_whatever_the_scale() -> None:
    maps = torch.randn(2, 6, 10, 10, generator=generator(4)) * torch.tensor([1e3, 10, 1, 1e-1, 1e-2, 1e-2]).view(
        6, 1, 1
    )
    colours, share = as_colours(maps)
    assert colours.dtype == np.float32
    assert colours.shape == (2, 10, 10, 3)
    assert (colours.min((0, 1, 2)) == 0).all()
    assert (colours.max((0, 1, 2)) == 1).all()
    assert 0.3 < colours.mean() < 0.7
    assert share == pytest.approx(1, abs=1e-6)


def test_one_position_that_stands_out_leaves_the_others_their_colours() -> None:
    ramp = torch.linspace(0, 1, 400).view(20, 20).clone()
    ramp[7, 7] = 1e4
    colours, _ = colours_of(ramp)
    others = np.delete(colours[0, ..., 0].flatten(), 7 * 20 + 7)
    assert others.min() == 0
    assert others.max() == 1
    assert np.median(others) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_what_is_all_there_is_shows_even_where_it_is_rare(value: float) -> None:
    spots = torch.zeros(30, 30)
    spots[3, 4] = spots[10, 20] = value
    colours, share = colours_of(spots, torch.zeros(30, 30), torch.full((30, 30), 2.0))
    assert share == pytest.approx(1)
    assert (colours[0, ..., 0] == spots.numpy() - min(0, value)).all()


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_maps_are_grey_without_a_warning(value: float) -> None:
    colours, share = as_colours(torch.full((2, 5, 4, 4), value))
    assert (colours == 0.5).all()
    assert share == 0
    assert (as_colours(torch.full((1, 5, 1, 1), value))[0] == 0.5).all()  # and where there is one position


def test_maps_of_one_channel_are_grey_and_of_two_have_two_colours() -> None:
    maps = torch.randn(3, 2, 8, 8, generator=generator(5))
    grey, share = as_colours(maps[:, :1])
    assert share == pytest.approx(1)
    assert (grey == grey[..., :1]).all()
    assert len(np.unique(grey)) > 50
    two, _ = as_colours(maps)
    assert (two[..., 2] == 0.5).all()
    assert (two[..., 0] != two[..., 1]).any()


def test_dead_channels_change_nothing() -> None:
    maps = torch.randn(2, 4, 6, 6, generator=generator(6))
    alive, share = as_colours(maps)
    dead, with_dead = as_colours(torch.cat([torch.zeros(2, 2, 6, 6), maps, torch.full((2, 1, 6, 6), 3.0)], dim=1))
    np.testing.assert_allclose(dead, alive, atol=1e-6)
    assert with_dead == pytest.approx(share)


def test_volumes_show_the_middle_slice_in_colours_of_the_whole() -> None:
    maps = torch.randn(2, 5, 6, 4, 4, generator=generator(7))
    volume, share = as_colours(maps)
    assert volume.shape == (2, 4, 4, 3)
    flat, flat_share = as_colours(maps.flatten(2, 3))  # the same positions, as images of 24×4
    assert share == flat_share
    np.testing.assert_array_equal(volume, flat.reshape(2, 6, 4, 4, 3)[:, 3])


# The command


def test_halves_of_different_content_have_different_colours(encoder_file: str, tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 2] = 220, 180
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    result = sparkmim.features(weights=encoder_file, images=tmp_path / "halves.png", image_size=64)
    assert result.out is None
    assert list(result.maps) == [1, 2]
    np.testing.assert_allclose(result.inputs[0], pixels / 255, atol=2e-3)
    for stage, side in ((1, 32), (2, 16)):
        colours = result.maps[stage][0]
        assert colours.shape == (side, side, 3)
        left, right = colours[3:-3, 3 : side // 2 - 3], colours[3:-3, side // 2 + 3 : -3]
        for half in (left, right):
            np.testing.assert_allclose(half, np.broadcast_to(half[0, 0], half.shape), atol=1e-4)
        assert np.abs(left[0, 0] - right[0, 0]).max() > 0.3
        assert 0.9 < result.explained[stage] <= 1


def test_maps_are_those_of_the_network_in_evaluation_mode(encoder_file: str, photos: Path, network: str) -> None:
    result = sparkmim.features(weights=encoder_file, images=photos, limit=3, stages=[2])
    assert [Path(name).name for name in result.names] == ["00.png", "02.jpg", "04.jpg"]
    encoder = weights.open_weights(encoder_file).encoder()
    images = (torch.from_numpy(result.inputs).movedim(-1, 1) - 0.5) / 0.25
    with torch.no_grad():
        expected, share = as_colours(encoder.body(encoder.stem(images)))  # type: ignore[operator]
    np.testing.assert_allclose(result.maps[2], expected, atol=1e-3)
    assert result.explained == {2: pytest.approx(share, abs=1e-5)}

    module = create_encoder(network).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    again = sparkmim.features(weights=encoder_file, images=photos, limit=3, stages=[2], model=module)
    assert again.maps[2].tobytes() == result.maps[2].tobytes()
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_command_writes_a_picture_and_says_what_it_shows(
    encoder_file: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (photos / "part0" / "00.png").write_bytes(b"no picture")
    main(["features", "--weights", encoder_file, "--images", str(photos / "part0"), str(photos / "part1" / "01.jpg"),
          "--limit", "14"])  # fmt: skip
    said = capsys.readouterr()
    assert "stage 1: three directions hold" in said.out
    assert "stage 2: three directions hold" in said.out
    assert "picture: features.png" in said.out
    assert "1 unreadable image left out" in said.err
    assert "part0/00.png: " in said.err
    with Image.open("features.png") as picture:
        assert picture.size[0] < picture.size[1]  # 12 rows of 3
    with pytest.raises(SystemExit, match="2"):
        main(["features", "--weights", encoder_file, "--images", str(photos)])
    assert "features.png exists already" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jpg", ".pdf", ".svg"])
def test_pictures_of_other_formats(suffix: str, encoder_file: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / f"features{suffix}"
    result = sparkmim.features(weights=encoder_file, images=photos, limit=1, out=out)
    assert result.out == out
    assert out.stat().st_size > 1000


def test_the_figure_names_images_and_stages(encoder_file: str, photos: Path, tmp_path: Path) -> None:
    odd = tmp_path / "$x_{2 of 猫.png"  # no formula, and a letter that the font lacks
    (photos / "part0" / "00.png").rename(odd)
    result = sparkmim.features(weights=encoder_file, images=[str(odd), str(photos)], image_size=[16, 32], limit=2)
    assert result.inputs.shape == (2, 16, 32, 3)
    assert result.maps[1].shape == (2, 8, 16, 3)
    figure = result.figure()
    written = [text.get_text() for text in figure.texts]
    assert {"input", "stage 1 · stride 2", "stage 2 · stride 4", "$x_{2 of ?", "02"} <= set(written)
    assert f"{result.explained[1]:.0%} of variance" in written
    assert len(figure.axes) == 2 * 3
    shapes = {axes.images[0].get_array().shape for axes in figure.axes}
    assert shapes == {(16, 32, 3), (8, 16, 3), (4, 8, 3)}
    assert result._repr_png_().startswith(b"\x89PNG")
    assert len(repr(result)) < 1000


def test_of_a_classifier_the_encoder_is_shown(encoder_file: str, classifier_file: Path, photos: Path) -> None:
    one, other = (sparkmim.features(weights=file, images=photos, limit=2) for file in (classifier_file, encoder_file))
    assert one.maps[2].tobytes() == other.maps[2].tobytes()


def test_grey_images(grey_file: Path, photos: Path) -> None:
    result = sparkmim.features(weights=grey_file, images=photos, limit=2)
    assert (result.inputs == result.inputs[..., :1]).all()
    assert (result.maps[1] != result.maps[1][..., :1]).any()


def test_files_of_the_original_form(photos: Path, tmp_path: Path) -> None:
    encoder = create_encoder("resnet18")
    original = {f"sparse_encoder.sp_cnn.{name}": value for name, value in encoder.state_dict().items()}
    original["dense_decoder.dec.0.up_sample.weight"] = torch.zeros(8, 8, 4, 4)
    original["dense_decoder.proj.weight"] = torch.zeros(3, 8, 1, 1)
    original["mask_tokens.0"] = torch.zeros(1, 512, 1, 1)
    torch.save({"module": original}, tmp_path / "original.pth")
    weights.write(encoder, tmp_path / "ours.safetensors", WeightsMetadata(model="resnet18"))
    one, other = (
        sparkmim.features(weights=tmp_path / file, images=photos, limit=1, image_size=64, model="resnet18")
        for file in ("original.pth", "ours.safetensors")
    )
    assert [maps.shape[1] for maps in one.maps.values()] == [16, 8, 4, 2]
    assert one.maps[4].tobytes() == other.maps[4].tobytes()


def test_volumes(volumes: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "volume.npy", np.random.default_rng(0).normal(40, 9, (8, 8, 12)))
    result = sparkmim.features(images=tmp_path / "volume.npy", **volumes)
    assert result.inputs.shape == (1, 8, 12, 3)
    assert {stage: maps.shape for stage, maps in result.maps.items()} == {1: (1, 4, 6, 3), 2: (1, 2, 3, 3)}
    assert [text.get_text() for text in result.figure().texts][2] == "stage 1 · stride 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nowhere"}, r"nowhere does not exist; --"),
        ({"weights": "nowhere"}, r"nowhere does not exist"),
        ({"stages": [1, 3]}, r"stage is 3, but .* has 2 stages.*choose 1 to 2"),
        ({"stages": []}, r"stages is \[\]; it must have 1 or more values"),
        ({"limit": 0}, r"limit is 0; it must be above 0"),
        ({"image_size": 0}, r"image_size is 0; it must be above 0"),
        ({"out": "features.gif"}, r"its name ends in .png"),
        ({"out": "."}, r"ends in|is a folder"),
        ({"model": 3}, r"model is of type int; pass a name or a torch.nn.Module"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    change: dict[str, Any], message: str, encoder_file: str, photos: Path, assert_refused: Callable[..., None]
) -> None:
    assert_refused(
        sparkmim.features, message, **{"weights": encoder_file, "images": photos, "out": "out.png", **change}
    )


def test_signals_diverged_weights_and_unreadable_images_are_refused(
    encoder_file: str, unusable: list[tuple[dict[str, Any], str]], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no image can be read; the first is .*broken.jpg"):
        sparkmim.features(weights=encoder_file, images=tmp_path / "broken.jpg")
    for arguments, message in unusable:
        with pytest.raises(ValueError, match=message):
            sparkmim.features(images=[np.zeros((16, 16, 3), np.uint8)], **arguments)


def test_long_names_keep_their_start_and_end() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abcdefghij", 6) == "abc…ij"
    assert len(shortened("x" * 300, 24)) == 24
