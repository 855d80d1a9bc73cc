"""The images that a network finds most alike: which they are, and the picture of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sparkmim
from sparkmim.cli import main
from sparkmim.evaluation import knn_predict


@pytest.fixture
def families(tmp_path: Path) -> Path:
    """Five images of plain colours, `N/original.png`, each with two copies under noise, the second under more."""
    noise = np.random.default_rng(0)
    colours = ((230, 30, 30), (30, 220, 40), (40, 50, 230), (230, 220, 40), (20, 20, 20))
    for number, colour in enumerate(colours):
        folder = tmp_path / "families" / str(number)
        folder.mkdir(parents=True)
        for name, strength in (("original", 0), ("near", 3), ("far", 12)):
            pixels = np.array(colour) + noise.normal(0, 1, (16, 16, 3)) * strength
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return tmp_path / "families"


def search(**settings: Any) -> Any:
    return sparkmim.neighbors(**{"workers": 0, "accelerator": "cpu", **settings})


def test_copies_come_first_the_nearest_before_the_farther(encoder_file: str, families: Path) -> None:
    queries = [families / str(number) / "original.png" for number in range(5)]
    result = search(weights=encoder_file, query=queries, data=families, k=4)
    assert result.queries == [str(query) for query in queries]
    assert result.stage == 2
    for query, found, cosines in zip(queries, result.neighbors, result.similarities, strict=True):
        assert len(found) == 4
        assert found[:2] == [str(query.with_name("near.png")), str(query.with_name("far.png"))]
        assert cosines == sorted(cosines, reverse=True)
        assert cosines[1] > cosines[2]


@pytest.mark.parametrize("stage", [1, 2])
def test_cosines_are_those_of_embedded_features_and_order_as_the_classifier_does(
    stage: int, encoder_file: str, photos: Path, tmp_path: Path
) -> None:
    sparkmim.embed(images=photos, weights=encoder_file, out=tmp_path / "f.npy", stage=stage, workers=0)
    paths = (tmp_path / "f.txt").read_text().splitlines()
    features = torch.from_numpy(np.load(tmp_path / "f.npy"))
    cosines = F.normalize(features, dim=1) @ F.normalize(features, dim=1).t()
    result = search(
        weights=encoder_file, query=photos / "part1", data=photos, k=23, stage=stage, limit=12, batch_size=5
    )
    assert len(result.queries) == 12
    for query, found, similarities in zip(result.queries, result.neighbors, result.similarities, strict=True):
        own = paths.index(query)
        assert set(found) == set(paths) - {query}
        expected = cosines[own][[paths.index(path) for path in found]]
        np.testing.assert_allclose(similarities, expected, atol=1e-5)
        others = [place for place in range(24) if place != own]
        voted = knn_predict(features[others], torch.tensor(others), features[own : own + 1], k=1)
        assert paths[int(voted)] == found[0]


def test_a_query_is_left_out_under_any_name_and_no_file_comes_twice(
    encoder_file: str, families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = families / "0" / "original.png"
    (families / "0" / "link.png").symlink_to(original)
    (families / "1" / "another.png").symlink_to(families / "0" / "near.png")
    shutil.copy(original, families / "4" / "copy.png")
    monkeypatch.chdir(families / "0")
    data = [str(families), str(families / "0"), "near.png"]
    result = search(weights=encoder_file, query="../0/original.png", data=data, k=100)
    found = result.neighbors[0]
    assert found[0] == str(families / "4" / "copy.png")  # another file, if of the same content
    assert result.similarities[0][0] == pytest.approx(1, abs=1e-6)
    resolved = [Path(path).resolve() for path in found]
    assert len(resolved) == len(set(resolved)) == 15  # 5 · 3 + the copy − the query
    assert original not in resolved


def test_fewer_than_k_are_all_there_are_and_none_is_an_error(encoder_file: str, families: Path) -> None:
    folder = families / "2"
    result = search(weights=encoder_file, query=folder / "far.png", data=folder, k=50)
    assert sorted(Path(path).stem for path in result.neighbors[0]) == ["near", "original"]
    alone = folder / "far.png"
    with pytest.raises(ValueError, match="data holds no other image than the query; name a folder with more"):
        search(weights=encoder_file, query=alone, data=alone)


def test_the_command_writes_a_picture_and_names_neighbours(
    encoder_file: str, families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (families / "3" / "near.png").write_bytes(b"no picture")
    one, other = (str(families / number / "original.png") for number in "03")
    main(["neighbors", "--weights", encoder_file, "--query", one, other, "--data", str(families), "--k", "3",
          "--workers", "0"])  # fmt: skip
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == one
    assert lines[1].split() == [lines[1].split()[0], str(families / "0" / "near.png")]
    assert 0.9 < float(lines[1].split()[0]) <= 1
    assert lines[4] == other
    assert lines[-1] == "picture: neighbors.png"
    assert len(lines) == 9
    assert "1 unreadable image left out" in said.err
    assert "3/near.png: " in said.err
    with Image.open("neighbors.png") as picture:
        assert picture.size[0] > picture.size[1]


def test_the_figure_frames_queries_and_captions_neighbours(encoder_file: str, families: Path, photos: Path) -> None:
    queries = [families / "1" / "original.png", families / "4" / "original.png"]
    result = search(weights=encoder_file, query=queries, data=[str(families), str(photos)], k=12)
    shown = {*result.queries, *(path for found in result.neighbors for path in found)}
    assert set(result.pictures) == shown
    assert all(picture.shape == (16, 16, 3) for picture in result.pictures.values())
    np.testing.assert_allclose(result.pictures[str(queries[0])][8, 8], np.array([30, 220, 40]) / 255, atol=2e-3)
    figure = result.figure()
    assert len(figure.axes) == 2 * 13
    framed = [axes for axes in figure.axes if axes.spines["left"].get_visible()]
    assert [axes.images[0].get_array().tolist() for axes in framed] == [
        result.pictures[query].tolist() for query in result.queries
    ]
    left = framed[0].get_position()
    assert all(axes in framed or axes.get_position().x0 > left.x1 for axes in figure.axes)
    written = [text.get_text() for text in figure.texts]
    assert written[:2] == ["query", "nearest at stage 2, with cosine similarity"]
    assert {"1/original", "1/near", "1/far", f"{result.similarities[0][0]:.3f}"} <= set(written)
    assert result._repr_png_().startswith(b"\x89PNG")
    assert len(repr(result)) < 1000

    one_folder = search(weights=encoder_file, query=queries[0], data=families / "1", k=2)
    assert {"original", "near", "far"} <= {text.get_text() for text in one_folder.figure().texts}


def test_images_from_python(encoder_file: str, families: Path) -> None:
    """Of the data themselves, an item is not its own neighbour; of other data, the same number is another image."""
    pixels = [np.array(Image.open(path)) for path in sorted(families.rglob("*.png"))]  # far, near, original, far, …
    result = search(weights=encoder_file, query=pixels, data=pixels, k=1, limit=3)
    assert result.queries == ["item 0", "item 1", "item 2"]
    assert result.neighbors == [["item 1"], ["item 2"], ["item 1"]]
    other = search(weights=encoder_file, query=[pixels[5]], data=pixels, k=1)
    assert (other.queries, other.neighbors) == (["query 0"], [["item 5"]])
    np.testing.assert_array_equal(other.pictures["query 0"], other.pictures["item 5"])


def test_arrays_are_normalised_by_the_folder_and_volumes_show_a_slice(volumes: dict[str, Any], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for number in range(6):
        np.save(tmp_path / "scans" / f"{number}.npy", generator.normal(40 * number, 9, (8, 8, 12)))
    np.save(tmp_path / "query.npy", np.load(tmp_path / "scans" / "4.npy") + generator.normal(0, 0.5, (8, 8, 12)))
    result = search(query=tmp_path / "query.npy", data=tmp_path / "scans", k=2, **volumes)
    assert result.neighbors[0][0] == str(tmp_path / "scans" / "4.npy")
    assert result.similarities[0][0] > 0.999
    assert result.pictures[result.queries[0]].shape == (8, 12, 3)
    assert result.figure() is not None


def test_classifiers_and_grey_images(classifier_file: Path, grey_file: Path, families: Path) -> None:
    query = families / "2" / "original.png"
    for file in (classifier_file, grey_file):
        result = search(weights=file, query=query, data=families, k=2)
        assert len(result.neighbors[0]) == 2
    assert (result.pictures[str(query)] == result.pictures[str(query)][..., :1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": "nowhere.jpg"}, r"nowhere.jpg does not exist; --"),
        ({"data": "nowhere"}, r"nowhere does not exist; --"),
        ({"weights": "nowhere"}, r"nowhere does not exist"),
        ({"k": 0}, r"k is 0; it must be above 0"),
        ({"stage": 3}, r"stage is 3, but .* has 2 stages"),
        ({"crop": 1.5}, r"crop is 1.5; it must be between 0 and 1"),
        ({"limit": 0}, r"limit is 0; it must be above 0"),
        ({"out": "neighbors.txt"}, r"its name ends in .png"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    change: dict[str, Any], message: str, encoder_file: str, families: Path, assert_refused: Callable[..., None]
) -> None:
    given = {"weights": encoder_file, "query": families / "0", "data": families, "out": "out.png"}
    assert_refused(search, message, **{**given, **change})


def test_what_cannot_be_compared_is_refused(
    encoder_file: str, unusable: list[tuple[dict[str, Any], str]], families: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no image can be read; the first is .*broken.jpg"):
        search(weights=encoder_file, query=broken, data=families)
    result = search(weights=encoder_file, query=[broken, families / "0" / "near.png"], data=[broken, families])
    assert len(result.queries) == 1
    assert len(result.unreadable) == 1  # once, though it is both

    np.save(tmp_path / "array.npy", np.zeros((16, 16, 3), np.float32))
    with pytest.raises(ValueError, match=r"one of query and data holds image files and the other arrays"):
        search(weights=encoder_file, query=tmp_path / "array.npy", data=families)
    for arguments, message in unusable:
        with pytest.raises(ValueError, match=message):
            search(query=families / "0", data=families, **arguments)
