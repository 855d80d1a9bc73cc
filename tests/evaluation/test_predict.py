"""Classes and features of unlabelled images, as files."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

import sparkmim
from processes import Cli
from sparkmim.cli import COMMANDS, build_parser, main
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.decoding import decode
from sparkmim.evaluation import stage_features
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models import Hierarchy, create_classifier
from sparkmim.words import spell

FAST: dict[str, Any] = {"workers": 0, "accelerator": "cpu"}


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def inputs(paths: list[Path]) -> torch.Tensor:
    transform = eval_transform((16, 16), [0.5] * 3, [0.25] * 3)
    return torch.stack([transform(decode(path)) for path in paths])


def test_predict_writes_every_image_with_its_probabilities(cli: Cli, run: Path, photos: Path, tmp_path: Path) -> None:
    broken = photos / "part0" / "02.jpg"
    broken.write_bytes(b"no picture")
    done = cli("predict", "--weights", run, photos, "--batch-size", 5, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "23 images classified" in done.stdout
    assert "1 unreadable image" in done.stderr
    rows = rows_of(tmp_path / "predictions.csv")
    paths = sorted([*photos.rglob("*.jpg"), *photos.rglob("*.png")])
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert list(rows[0]) == ["path", "class", "probability", "error", "p_blue", "p_green", "p_red"]

    classifier = weights.open_weights(run).classifier()
    good = [path for path in paths if path != broken]
    with torch.no_grad():
        expected = dict(zip(map(str, good), classifier(inputs(good)).softmax(1), strict=True))
    for row in rows:
        if row["path"] == str(broken):
            assert row["class"] == row["probability"] == row["p_red"] == ""
            assert "not an image" in row["error"]
            continue
        probabilities = expected[row["path"]]
        assert row["error"] == ""
        assert row["class"] == ["blue", "green", "red"][int(probabilities.argmax())]
        assert float(row["probability"]) == pytest.approx(probabilities.max().item(), abs=2e-6)
        assert [float(row[f"p_{name}"]) for name in ("blue", "green", "red")] == pytest.approx(
            probabilities.tolist(), abs=2e-6
        )


@pytest.mark.parametrize(
    "words",
    [
        ["photos/", "--weights", "run", "--overwrite"],
        ["--overwrite", "photos/", "--weights=run"],
        ["--weights", "run", "--overwrite", "true", "photos/"],
        ["--weights", "run", "--overwrite", "--images", "photos/"],
    ],
)
def test_images_may_stand_without_their_flag(words: list[str]) -> None:
    parsed = build_parser().parse_args(spell(["predict", *words], COMMANDS)).predict
    assert (parsed.images, str(parsed.weights), parsed.overwrite) == ("photos/", "run", True)


def test_predict_takes_a_file_a_list_or_a_dataset_and_names_the_likeliest(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    image = next(photos.rglob("*.png"))
    (tmp_path / "list.txt").write_text(f"{image}\n{image}\n")
    for images, names in (
        (image, [str(image)]),
        (str(tmp_path / "list.txt"), [str(image)] * 2),
        ([decode(image)], ["item 0"]),
    ):
        out = tmp_path / "out.csv"
        sparkmim.predict(images=images, weights=run, out=out, top=2, overwrite=True, **FAST)
        rows = rows_of(out)
        assert list(rows[0]) == ["path", "class", "probability", "error", "class_2", "probability_2"]
        assert [row["path"] for row in rows] == names
        assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])
        assert rows[0]["class"] != rows[0]["class_2"]


def test_many_classes_are_named_not_spread_over_columns(network: str, photos: Path, tmp_path: Path) -> None:
    classifier = create_classifier(network, 101, image_size=[16, 16])
    known = {"model": network, "classes": [str(i) for i in range(101)], "pooled": True, "image_size": [16, 16],
             "channels": 3, "crop": None}  # fmt: skip
    weights.write(classifier, tmp_path / "many.safetensors", WeightsMetadata(**known))
    sparkmim.predict(images=photos, weights=tmp_path / "many.safetensors", out=tmp_path / "many.csv", **FAST)
    rows = rows_of(tmp_path / "many.csv")
    assert len(rows) == 24
    assert list(rows[0])[-2:] == ["class_5", "probability_5"]


def test_embed_writes_features_and_paths(cli: Cli, run: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "part1" / "01.jpg").write_bytes(b"")
    done = cli("embed", photos, "--weights", run, "--out", "deep.npy", "--batch-size", 7, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "float32 [23, 16], stage 2" in done.stdout
    assert "the file is empty" in done.stderr
    features = np.load(tmp_path / "deep.npy")
    paths = (tmp_path / "deep.txt").read_text().splitlines()
    assert features.dtype == np.float32
    assert features.shape == (23, 16)
    assert paths == sorted(paths)
    expected = stage_features(Hierarchy(weights.open_weights(run).encoder()), inputs([Path(path) for path in paths]))
    np.testing.assert_allclose(features, expected[1], rtol=1e-4, atol=1e-5)

    table = sparkmim.embed(images=photos, weights=run, out=tmp_path / "stage.parquet", stage=1, batch_size=9, **FAST)
    assert table.shape == (23, 8)
    read = pyarrow.parquet.read_table(tmp_path / "stage.parquet")
    assert read["path"].to_pylist() == paths
    np.testing.assert_allclose(np.array(read["feature"].to_pylist()), expected[0], rtol=1e-4, atol=1e-5)

    whole = sparkmim.embed(images=photos, weights=run, out=tmp_path / "maps.npy", pooled=False, **FAST)
    maps = np.load(tmp_path / "maps.npy")
    assert whole.shape == maps.shape == (23, 16, 4, 4)
    np.testing.assert_allclose(maps.mean((2, 3)), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        (sparkmim.predict, {"images": "nowhere"}, r"nowhere does not exist; --"),
        (sparkmim.predict, {"images": None}, r"no images given; --images names"),
        (sparkmim.predict, {"weights": "nowhere"}, r"nowhere does not exist"),
        (sparkmim.predict, {"top": 4}, r"top is 4, but the classifier knows 3 classes"),
        (sparkmim.predict, {"out": "."}, r"is a folder; --out names a file"),
        (sparkmim.predict, {"batch_size": 0}, r"batch_size is 0"),
        (sparkmim.embed, {"stage": 0}, r"stage is 0; it must be above 0"),
        (sparkmim.embed, {"out": "features.csv"}, r"its name ends in .npy or .parquet"),
        (sparkmim.embed, {"out": "f.parquet", "pooled": False}, r"write whole maps to a .npy file"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    command: Any, change: dict[str, Any], message: str, run: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command(**{"images": photos, "weights": run, **FAST, **change})
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    run: Path, encoder_file: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds no classifier; `sparkmim finetune` makes one"):
        sparkmim.predict(images=photos, weights=encoder_file, out=tmp_path / "p.csv", **FAST)
    (tmp_path / "f.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"f.txt exists already; .*--overwrite"):
        sparkmim.embed(images=photos, weights=run, out=tmp_path / "f.npy", **FAST)
    for path in photos.rglob("*.*g"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 24 images can be read"):
        sparkmim.embed(images=photos, weights=run, out=tmp_path / "f.npy", overwrite=True, **FAST)
    with pytest.raises(ValueError, match=r"none of the 24 images can be read; the first is .*: the file is empty"):
        sparkmim.predict(images=photos, weights=run, out=tmp_path / "p.csv", **FAST)
    assert (tmp_path / "f.txt").read_text() == "mine"
    assert not list(tmp_path.glob("f.npy*"))
    assert not list(tmp_path.glob("p.csv*"))
    assert not list(tmp_path.glob("*.partial"))


def test_embedding_one_image_twice_is_the_same_to_the_bit(run: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        sparkmim.embed(images=photos, weights=run, out=tmp_path / name, **FAST)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_names_that_are_no_utf8(run: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are written such that they can be turned back, and no work is lost."""
    names = [b"caf\xe9.jpg", b"line\nbreak.jpg", b"back\\xe9.jpg", b"broken\xff\n.jpg"]
    good = next(photos.rglob("*.jpg")).read_bytes()
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(b"no picture" if b"broken" in name else good)
    main(["predict", str(folder), f"--weights={run}", f"--out={tmp_path / 'odd.csv'}", "--workers=0"])
    main(["embed", str(folder), f"--weights={run}", f"--out={tmp_path / 'odd.npy'}", "--workers=0"])
    main(["embed", str(folder), f"--weights={run}", f"--out={tmp_path / 'odd.parquet'}", "--workers=0"])
    assert capfd.readouterr().err.count(r"broken\xff\x0a.jpg: not an image of a known format") == 3

    def turned_back(written: list[str]) -> set[bytes]:
        return {Path(name).name.encode().decode("unicode_escape").encode("latin-1") for name in written}

    assert turned_back([row["path"] for row in rows_of(tmp_path / "odd.csv")]) == set(names)
    assert turned_back((tmp_path / "odd.txt").read_text(encoding="utf-8").splitlines()) == set(names[:3])
    table = pyarrow.parquet.read_table(tmp_path / "odd.parquet")
    assert turned_back(table.column("path").to_pylist()) == set(names[:3])
