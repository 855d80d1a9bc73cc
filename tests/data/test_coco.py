"""Data sets in COCO's format: found, checked, read, and made ready for a detector."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, change, rectangle, write_coco
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from sparkmim.data.arrays import MissingPackage
from sparkmim.data.coco import CocoImages, check_coco, find_coco, mask_of, open_coco
from sparkmim.data.coco_masks import run_lengths as decoded_lengths
from sparkmim.data.dataset import TargetDataset, collate_detection
from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.detection_transforms import detection_resize, detection_transform
from sparkmim.data.samplers import EpochBatchSampler
from sparkmim.data.skip_log import SkipLog
from sparkmim.evaluation.coco import evaluate_coco

TWO = [annotation(10, 12, (4, 6, 20, 10)), annotation(10, 3, (30, 20, 16, 16)), annotation(11, 7, (0, 0, 64, 48))]


def filled(mask: torch.Tensor) -> list[int]:
    """Left, top, right and bottom of the pixels that are set, which must be all within."""
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    assert mask.sum() == len(rows) * len(columns)
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


# Finding


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2014.json", "images/{}2014"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_names_in_use_are_found(tmp_path: Path, file: str, folder: str) -> None:
    for part in ("train", "valid" if "coco" in file else "val"):
        path = tmp_path / file.format(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        (tmp_path / folder.format(part)).mkdir(parents=True, exist_ok=True)
    val = find_coco(tmp_path, "val")
    assert find_coco(tmp_path, "train") == (tmp_path / file.format("train"), tmp_path / folder.format("train"))
    assert val.images == tmp_path / folder.format(part)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_coco(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no annotations to train on.*instances_train2017\.json"):
        find_coco(tmp_path, "train")
    file, folder = write_coco(tmp_path, TWO)
    assert find_coco(tmp_path, "train") == (file, folder)
    with pytest.raises(FileNotFoundError, match=r"no annotations to validate on.*instances_val2017\.json"):
        find_coco(tmp_path, "val")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="no folder of images for instances_train2017.json: none of train2017/"):
        find_coco(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="there is no folder of images"):
        open_coco(file, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "no list `images`"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
        ('{"images": [{"id": "a"}], "annotations": [], "categories": []}', "must be integers.*'a'"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}',
            "lists 1 image without a file_name; the first has id 1",
        ),
        ('{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1}]}', "no list `annotations`"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "train.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_coco(file, tmp_path)


def test_a_missing_package_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(MissingPackage, match=r"pip install 'sparkmim\[detect\]'"):
        open_coco(tmp_path / "train.json", tmp_path)


# Reading


def test_items_are_what_torchvision_takes(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    assert (len(data), data.classes, data.category_ids, data.has_masks) == (3, ["cat", "dog", "owl"], [3, 7, 12], True)
    image, target = data[0]
    assert type(image) is tv_tensors.Image
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(data.images / "10.png"))).permute(2, 0, 1))
    assert type(target["boxes"]) is tv_tensors.BoundingBoxes
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[4, 6, 24, 16], [30, 20, 46, 36]]
    assert target["labels"].tolist() == [3, 1]  # ids 12 and 3
    assert type(target["masks"]) is tv_tensors.Mask
    assert target["masks"].dtype == torch.uint8
    assert [filled(mask) for mask in target["masks"]] == target["boxes"].tolist()
    assert (target["image_id"], target["size"]) == (10, (HEIGHT, WIDTH))
    assert data[1][1]["labels"].tolist() == [2]


def test_an_image_with_nothing_on_it_is_an_item(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    _, target = data[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert "1 image without annotations; kept as background" in check_coco(data)
    image, target = detection_transform([40], crop="detr")(data[2])
    assert target["masks"].shape == (0, *image.shape[1:])
    assert target["boxes"].shape == (0, 4)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Counts of zeros and ones in turn, column by column."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return counts if flat[0] == 0 else [0, *counts]


def test_polygons_and_both_run_length_encodings_agree(tmp_path: Path) -> None:
    from pycocotools import mask as tools

    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[6:16, 4:24] = 1
    size = [HEIGHT, WIDTH]
    compressed = tools.encode(np.asfortranarray(pixels))
    segmentations: list[Any] = [
        [rectangle(4, 6, 24, 16)],
        [rectangle(4, 6, 14, 16), rectangle(14, 6, 24, 16)],  # in two parts
        {"size": size, "counts": run_lengths(pixels)},
        {"size": size, "counts": compressed["counts"].decode()},
    ]
    data = open_coco(*write_coco(tmp_path, [annotation(10, 3, (4, 6, 20, 10), given) for given in segmentations]))
    assert check_coco(data)
    masks = data[0][1]["masks"]
    assert len(masks) == 4
    assert all(torch.equal(mask, torch.from_numpy(pixels)) for mask in masks)


def test_boxes_alone(tmp_path: Path) -> None:
    file, folder = write_coco(tmp_path, TWO)
    data = open_coco(file, folder, masks=False)
    assert not data.has_masks
    assert "masks" not in data[0][1]
    change(file, annotations=[{**record, "segmentation": []} for record in TWO])
    data = open_coco(file, folder)
    assert not data.has_masks
    assert len(data[0][1]["boxes"]) == 2
    with pytest.raises(ValueError, match="there are no masks; train on boxes alone"):
        check_coco(open_coco(file, folder, masks=True))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("stored", [False, True])
def test_height_and_width_tell_which_way_up_an_image_was_annotated(tmp_path: Path, suffix: str, stored: bool) -> None:
    file, folder = write_coco(tmp_path, TWO[:1], images=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[6:16, 4:24] = 255
    Image.fromarray(pixels).save(folder / f"10.{suffix}", exif=exif, quality=100)
    size = (HEIGHT, WIDTH) if stored else (WIDTH, HEIGHT)
    box = (4, 6, 20, 10) if stored else (HEIGHT - 16, 4, 10, 20)
    image = {"id": 10, "file_name": f"10.{suffix}", "height": size[0], "width": size[1]}
    change(file, images=[image], annotations=[annotation(10, 3, box)])
    data = open_coco(file, folder)
    check_coco(data)
    picture, target = data[0]
    assert picture.shape == (3, *size)
    left, top, right, bottom = target["boxes"][0].int().tolist()
    assert picture[:, top:bottom, left:right].float().mean() > 240
    assert picture.float().sum() / 255 / 3 == pytest.approx(200, rel=0.05)  # and nowhere else


# Checking


def broken(tmp_path: Path, record: dict[str, Any], **more: Any) -> CocoImages:
    return open_coco(*write_coco(tmp_path, [*[dict(good) for good in TWO], record], **more))


@pytest.mark.parametrize(
    ("record", "note"),
    [
        (annotation(12, 3, (5, 5, 0, 8)), "1 box of zero area; left out"),
        (annotation(12, 3, (5, 5, 8, -2)), "1 box of zero area; left out"),
        (annotation(12, 3, (70, 5, 8, 8)), "1 box wholly outside the image; left out"),
        (annotation(12, 3, (-20, 5, 20, 8)), "1 box wholly outside the image; left out"),
        (annotation(12, 3, (5, 5, 8, 8)) | {"bbox": [5, 5]}, "1 annotation without a box of four numbers; left out"),
        (annotation(99, 3, (5, 5, 8, 8)), "1 annotation of images that are not in the file; left out"),
        (annotation(12, 3, (5, 5, 8, 8), iscrowd=1), "1 crowd not trained on, but used by the evaluation"),
        (
            annotation(12, 3, (5, 5, 8, 8), []),
            "1 annotation with a box but no mask; left out while masks are trained on",
        ),
        (
            annotation(12, 3, (5, 5, 8, 8), [[1, 2, 3, 4]]),
            "1 annotation with polygons of fewer than three points; those left out: id 3 of 12.png",
        ),
        *(
            (
                annotation(12, 3, (5, 5, 8, 8), {"size": size, "counts": counts}),
                "1 annotation with a run-length encoding that is damaged, or of another size than the image; left out: "
                "id 3 of 12.png",
            )
            for size, counts in (
                ([8, 8], [0, 64]), ([HEIGHT, WIDTH], [1, 2]), ([HEIGHT, WIDTH], [-1, HEIGHT * WIDTH + 1]),
                ([HEIGHT, WIDTH], "PPYo1"), ([HEIGHT, WIDTH], "`o"), ([HEIGHT, WIDTH], "é"), (None, None),
                ([HEIGHT, WIDTH], "n" * 50),
            )
        ),
        *(
            (
                annotation(12, 3, (5, 5, 8, 8), given),
                "1 annotation with a segmentation that is neither polygons nor a run-length encoding; left out: "
                "id 3 of 12.png",
            )
            for given in ("polygon", [[1, 2, None, 4, 5, 6]], [[1, 2, 3, 4, 5, 6], 3], [["a", "b"] * 3], 7)
        ),
    ],
)  # fmt: skip
def test_a_broken_annotation_is_left_out_and_reported(tmp_path: Path, record: dict[str, Any], note: str) -> None:
    data = broken(tmp_path, record)
    assert note in check_coco(data)
    assert [len(data[place][1]["labels"]) for place in range(3)] == [2, 1, 0]


def test_a_polygon_of_two_points_is_left_out_of_its_mask(tmp_path: Path) -> None:
    data = broken(tmp_path, annotation(12, 3, (5, 5, 8, 8), [[1, 2, 3, 4], rectangle(5, 5, 13, 13)]))
    assert "1 annotation with polygons of fewer than three points; those left out: id 3 of 12.png" in check_coco(data)
    assert filled(data[2][1]["masks"][0]) == [5, 5, 13, 13]
    alone = annotation(12, 3, (5, 5, 8, 8), [[1, 2, 3, 4]])
    boxes = open_coco(*write_coco(tmp_path / "boxes", [alone]), masks=False)
    assert boxes[2][1]["boxes"].tolist() == [[5, 5, 13, 13]]  # a good box still


def test_a_mask_without_a_pixel_takes_its_box_along(tmp_path: Path) -> None:
    data = broken(tmp_path, annotation(12, 3, (5, 5, 8, 8), [[100, 100, 110, 100, 110, 110]]))  # beside the image
    assert data[2][1]["labels"].tolist() == []
    assert data[2][1]["masks"].shape == (0, HEIGHT, WIDTH)


def test_a_box_partly_outside_is_clipped(tmp_path: Path) -> None:
    data = broken(tmp_path, annotation(12, 3, (-6, 40, 16, 20)))
    assert "1 box partly outside the image; clipped" in check_coco(data)
    assert data[2][1]["boxes"].tolist() == [[0, 40, 10, HEIGHT]]


def test_what_is_only_worth_knowing(tmp_path: Path) -> None:
    file, folder = write_coco(tmp_path, [{**TWO[0], "id": 5}, {**TWO[1], "id": 5}, {**TWO[1], "id": 6}])
    records = json.loads(file.read_text())["images"]
    change(file, images=[*records, {**records[0], "id": 77}])
    (folder / "11.png").write_bytes(b"no image")
    notes = check_coco(open_coco(file, folder))
    assert any(note.startswith("category ids run from 3 to 12 for 3 classes") for note in notes)
    assert "1 annotation id given more than once: 5; all are used" in notes
    assert "1 class without annotations: dog" in notes
    assert "1 file named by several images: 10.png" in notes
    assert "1 file without a readable image, among 4 checked: 11.png" in notes


def test_nothing_to_say_of_a_good_file(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "cat"}]
    records = [annotation(10, 1, (4, 6, 20, 10)), annotation(11, 1, (4, 6, 20, 10))]
    assert check_coco(open_coco(*write_coco(tmp_path, records, images=2, categories=categories))) == []


def test_everything_fatal_is_reported_at_once(tmp_path: Path) -> None:
    records = [*TWO, annotation(12, 5, (1, 1, 2, 2)), annotation(10, 3, (5, 5, 0, 8))]
    file, folder = write_coco(tmp_path, records, images=5)
    images = json.loads(file.read_text())["images"]
    images[1] = {**images[1], "height": 100}
    images[3]["id"] = 12
    del images[4]["width"]
    images.append({"id": 20, "file_name": "deep/er.png", "height": 8, "width": 8})
    change(file, images=images, categories=[{"id": 3}, {"id": 7}, {"id": 12}, {"id": 12}])
    (folder / "10.png").unlink()
    with pytest.raises(ValueError, match="cannot be used as it is") as raised:
        check_coco(open_coco(file, folder))
    assert str(raised.value).splitlines()[1:] == [
        f"- 2 image files missing of 6 in {folder}: 10.png, deep/er.png",
        "- 1 image id given more than once: 12",
        "- 1 category id given more than once: 12",
        "- 1 image without height and width: id 14",
        "- 1 annotation of unknown categories: 5",
        "- 1 image of another size than in the annotations: 11.png is 64×48, not 64×100",
        "and worth knowing:",
        "- category ids run from 3 to 12 for 3 classes; labels count from 1 without gaps, and results are written with "
        "the ids of the file",
        "- 1 box of zero area; left out",
        "- 4 images without annotations; kept as background",
    ]


def test_a_file_without_a_usable_annotation_is_refused(tmp_path: Path) -> None:
    for name, records in (("crowds", [annotation(10, 3, (1, 1, 9, 9), iscrowd=1)]), ("none", [])):
        with pytest.raises(ValueError, match="no annotation is left"):
            check_coco(open_coco(*write_coco(tmp_path / name, records)))


def test_missing_files_and_other_sizes_are_unreadable(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    data.path(0).unlink()
    Image.new("RGB", (5, 5)).save(data.path(1))
    with pytest.raises(UnreadableImage, match=r"10\.png"):
        data[0]
    with pytest.raises(UnreadableImage, match=r"is 5×5, but instances_train2017\.json says 64×48"):
        data[1]


def test_categories_of_validation_must_be_those_of_training(tmp_path: Path) -> None:
    train = open_coco(*write_coco(tmp_path / "a", TWO))
    some = [{"id": 12, "name": "owl"}, {"id": 3, "name": "cat"}]
    fewer = open_coco(*write_coco(tmp_path / "b", TWO[:2], categories=some))
    assert fewer[0][1]["labels"].tolist() == [2, 1]
    fewer.take_categories(train.category_ids, train.classes, train.annotations)
    assert (fewer.category_ids, fewer.classes) == (train.category_ids, train.classes)
    assert fewer[0][1]["labels"].tolist() == train[0][1]["labels"].tolist() == [3, 1]
    other = open_coco(*write_coco(tmp_path / "c", TWO[1:2], categories=[{"id": 3, "name": "cow"}]))
    with pytest.raises(ValueError, match=r"1 category that .*a/annotations.* does not have .* cow \(id 3\)"):
        other.take_categories(train.category_ids, train.classes, train.annotations)


# Transforms


def test_masks_and_boxes_grow_with_the_image(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    image, target = detection_transform([96], flip=0.0)(data[0])
    assert torch.equal(image, detection_resize(96, 1333)(data.read(0)))
    assert type(image) is torch.Tensor
    assert image.dtype == torch.float32
    assert image.shape == (3, 96, 128)
    assert image.min() >= 0
    assert 0.9 < image.max() <= 1
    assert all(type(target[name]) is torch.Tensor for name in ("boxes", "labels", "masks"))
    assert target["boxes"].tolist() == [[8, 12, 48, 32], [60, 40, 92, 72]]
    assert [filled(mask) for mask in target["masks"]] == target["boxes"].tolist()
    assert target["size"] == (HEIGHT, WIDTH)


def test_the_longer_side_has_a_limit(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    assert detection_resize(96, 100)(data.read(0)).shape == (3, 75, 100)


def test_mirroring(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    image, target = detection_transform([HEIGHT], flip=1.0)(data[0])
    torch.testing.assert_close(image, data[0][0].flip(2) / 255)
    assert target["boxes"].tolist() == [[40, 6, 60, 16], [18, 20, 34, 36]]
    assert [filled(mask) for mask in target["masks"]] == target["boxes"].tolist()


def test_sizes_come_from_the_range(tmp_path: Path) -> None:
    dataset = TargetDataset(open_coco(*write_coco(tmp_path, TWO)), detection_transform(range(30, 34)))
    assert {dataset[epoch, 0]["image"].shape[1] for epoch in range(40)} == {30, 31, 32, 33}


def test_crops_keep_boxes_masks_and_labels_together(tmp_path: Path) -> None:
    """Each object has a colour of its own, by which it is found again after whatever was done to the image."""
    file, folder = write_coco(tmp_path, TWO, images=1)
    pixels = np.zeros((300, 400, 3), np.uint8)
    records = []
    for number, (category, left, top) in enumerate(((3, 20, 30), (7, 300, 40), (12, 40, 220), (3, 330, 230))):
        pixels[top : top + 50, left : left + 40, 0] = 60 * (number + 1)
        pixels[top : top + 50, left : left + 40, 2] = 20 * category
        records.append(annotation(10, category, (left, top, 40, 50)))
    Image.fromarray(pixels).save(folder / "10.png")
    image = {"id": 10, "file_name": "10.png", "height": 300, "width": 400}
    change(file, images=[image], annotations=records)
    dataset = TargetDataset(open_coco(file, folder), detection_transform([240, 320], 500, crop="detr"))
    seen, ratios = [], set()
    for epoch in range(30):
        sample = dataset[epoch, 0]
        found, target = sample["image"], sample["target"]
        ratios.add(round(found.shape[2] / found.shape[1], 1))
        seen.append(len(target["labels"]))
        assert len(target["labels"]) == len(target["boxes"]) == len(target["masks"])
        for label, box, mask in zip(target["labels"], target["boxes"], target["masks"], strict=True):
            colour = found[2][mask > 0].median() * 255 / 20
            assert colour == pytest.approx([3, 7, 12][label - 1], abs=0.5)
            assert torch.tensor(filled(mask)).sub(box).abs().max() < 2  # masks are resized to whole pixels, twice
    assert min(seen) < 4  # something was cut away
    assert max(seen) == 4
    assert len(ratios) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shortest": []}, "at least one, above 0"),
        ({"shortest": [0]}, "at least one, above 0"),
        ({"shortest": [800], "longest": 700}, "longest is 700, but the shorter side may have 800"),
    ],
)
def test_transforms_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detection_transform(**arguments)


# Training


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    file, folder = write_coco(tmp_path, TWO)
    transform = detection_transform(range(40, 80), crop="detr")

    def batches(workers: int, seed: int = 0) -> list[dict[str, Any]]:
        dataset = TargetDataset(open_coco(file, folder), transform, seed)
        sampler = EpochBatchSampler(3, 3, epoch=4)
        return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_detection, num_workers=workers))

    (here,), (there,), (other,) = batches(0), batches(1), batches(0, seed=1)
    for place in range(3):
        assert torch.equal(here["image"][place], there["image"][place])
        for name in ("boxes", "labels", "masks"):
            assert torch.equal(here["target"][place][name], there["target"][place][name])
    assert here["index"].tolist() == there["index"].tolist()
    assert any(a.shape != b.shape for a, b in zip(here["image"], other["image"], strict=True))


def test_a_stand_in_comes_with_its_own_target(tmp_path: Path) -> None:
    data = open_coco(*write_coco(tmp_path, TWO))
    data.path(0).write_bytes(b"broken")
    dataset = TargetDataset(data, detection_transform([HEIGHT]))
    sample = dataset[0, 0]
    assert (sample["index"], sample["skipped"], sample["target"]["image_id"]) == (0, 1, 11)
    log = SkipLog()
    assert len(log.add(collate_detection([sample, dataset[0, 1]]))) == 1
    assert (log.seen, log.count) == (2, 1)


@pytest.mark.parametrize(
    "given",
    [
        [[5, 5], [13, 5], [13, 13], [5, 13]],  # pairs, without the list around them
        [[[5, 5], [13, 5], [13, 13], [5, 13]]],
        [5, 5, 13, 5, 13, 13, 5, 13],
        [["5", "5", "13", "5", "13", "13", "5", "13"]],
    ],
)
@pytest.mark.parametrize("bbox", [[5, 5, 8, 8], None, [], ["5", "5.0", "8", "8"]])
def test_polygons_as_others_write_them(tmp_path: Path, given: Any, bbox: Any) -> None:
    record = annotation(12, 3, (5, 5, 8, 8), given) | {"bbox": bbox}
    data = broken(tmp_path, record)
    notes = check_coco(data)
    assert filled(data[2][1]["masks"][0]) == [5, 5, 13, 13]
    assert data[2][1]["boxes"].tolist() == [[5, 5, 13, 13]]
    assert ("1 annotation without a box; that of the polygons is taken" in notes) == (not bbox)
    found = [{"image_id": 12, "category_id": 3, "bbox": [5, 5, 8, 8], "score": 1.0}]
    assert evaluate_coco(data.annotations, found, ["bbox"]).per_class["bbox"]["cat"] == pytest.approx(0.5, abs=0.01)


def test_polygons_far_outside(tmp_path: Path) -> None:
    """Coordinates at which pycocotools would work for minutes; the mask within the image stays the same."""
    far = [[5, 5, 1e8, 5, 1e8, 1e8, 5, 1e8], [-1e9, 0, -1e8, 0, -1e8, 9]]
    data = broken(tmp_path, annotation(12, 3, (5, 5, 59, 43), far))
    assert "1 annotation with polygons that reach far beyond the image; clipped: id 3 of 12.png" in check_coco(data)
    assert filled(data[2][1]["masks"][0]) == [5, 5, WIDTH, HEIGHT]
    slanted, near = ([[10, 10, 10 + 5 * reach, 10 + 2 * reach, 10, 10 + 2 * reach]] for reach in (1e6, 20))
    masks = [broken(tmp_path / name, annotation(12, 3, (5, 5, 59, 43), given))[2][1]["masks"][0]
             for name, given in (("far", slanted), ("near", near))]  # fmt: skip
    assert (masks[0] != masks[1]).float().mean() < 0.01
    assert masks[0].sum() > 300


def test_masks_of_which_none_is_left(tmp_path: Path) -> None:
    """A detector of boxes would not be what was asked for."""
    file, folder = write_coco(tmp_path, [{**record, "segmentation": [[1, 2, 3, 4]]} for record in TWO])
    with pytest.raises(
        ValueError, match="none of the masks can be used; correct them, or train on boxes alone"
    ) as told:
        check_coco(open_coco(file, folder))
    assert "3 annotations with polygons of fewer than three points; those left out: id 0 of 10.png, id 1" in str(
        told.value
    )
    assert len(open_coco(file, folder, masks=False)[0][1]["boxes"]) == 2


def test_numbers_as_texts_and_names_of_windows(tmp_path: Path) -> None:
    records = [{**record, "image_id": str(record["image_id"]), "category_id": str(record["category_id"]), "id": "7",
                "iscrowd": "0"} for record in TWO]  # fmt: skip
    file, folder = write_coco(tmp_path, records)
    images = json.loads(file.read_text())["images"]
    for image in images:
        image |= {"id": str(image["id"]), "height": "48", "width": "64.0", "file_name": f"a\\b\\{image['file_name']}"}
    change(file, images=images, categories=[{"id": "3", "name": "cat"}, {"id": "7"}, {"id": "12"}])
    (folder / "a" / "b").mkdir(parents=True)
    for path in folder.glob("*.png"):
        path.rename(folder / "a" / "b" / path.name)
    data = open_coco(file, folder)
    notes = check_coco(data)
    for part, count in (("images", 3), ("annotations", 3), ("categories", 3)):
        assert f"{count} records of {part} with numbers written as texts; read as numbers" in notes
    assert any(note.startswith(r"3 file names with the separators of Windows; read as /: a\b\10.png") for note in notes)
    expected = open_coco(*write_coco(tmp_path / "plain", TWO))
    assert data.image_ids.tolist() == expected.image_ids.tolist()
    assert [data[place][1]["boxes"].tolist() for place in range(3)] == [
        expected[place][1]["boxes"].tolist() for place in range(3)
    ]
    change(file, images=[{**image, "id": "img"} for image in images])
    with pytest.raises(ValueError, match="must be integers, but one of its images has 'img'"):
        open_coco(file, folder)


@settings(deadline=None, max_examples=50)
@drawn(seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1))
def test_run_lengths_are_those_of_pycocotools(seed: int, height: int, width: int, share: float) -> None:
    from pycocotools import mask as tools

    pixels = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    text = tools.encode(np.asfortranarray(pixels))["counts"]
    lengths = decoded_lengths(text)
    assert lengths is not None
    assert lengths.tolist() == run_lengths(pixels)
    assert decoded_lengths(text.decode()).tolist() == lengths.tolist()  # type: ignore[union-attr]
    assert mask_of({"segmentation": {"size": [height, width], "counts": text[:-1]}}, height, width) is None


def test_masks_by_form() -> None:
    assert mask_of({}, 4, 4) is None
    assert mask_of({"segmentation": [[0, 0, 1, 1, 2, 2, 3]]}, 4, 4) == [[0, 0, 1, 1, 2, 2]]  # half a point too much
    assert mask_of({"segmentation": {"size": [4, 4], "counts": [3]}}, 4, 4) is None  # of 16 pixels
    assert mask_of({"segmentation": {"size": [4, 4], "counts": ""}}, 4, 4) is None
