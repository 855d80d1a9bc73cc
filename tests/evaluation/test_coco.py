"""COCO's figures, held against pycocotools called directly."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, change, rectangle, write_coco

from sparkmim.data.arrays import MissingPackage
from sparkmim.data.coco import open_coco
from sparkmim.evaluation.coco import FIGURES, coco_results, evaluate_coco

IDS = [3, 7, 12]


@pytest.fixture(autouse=True, params=["pycocotools", "faster-coco-eval"])
def scorer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with either package."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")


def objects(seed: int = 0, images: int = 6) -> list[dict[str, Any]]:
    """Some objects of the three categories on each image but the last, one in eight a crowd. Ids count from 1."""
    generator = np.random.default_rng(seed)
    found = []
    for image in range(10, 10 + images - 1):
        for _ in range(5):
            left, top = generator.integers(0, 40), generator.integers(0, 28)
            width, height = generator.integers(6, 24), generator.integers(6, 20)
            box = (int(left), int(top), int(width), int(height))
            crowd = int(generator.random() < 1 / 8)
            found.append(annotation(image, int(generator.choice(IDS)), box, iscrowd=crowd, id=len(found) + 1))
    return found


def output_of(target: dict[str, Any], jitter: float = 0.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a detector would say: the target, moved by some pixels, with scores, labels and masks that may be wrong."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.as_tensor(target["boxes"]).clone()
    count = len(boxes)
    boxes += jitter * torch.randn(count, 4, generator=generator)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = target["labels"].clone()
    scores = torch.ones(count)
    masks = torch.zeros(count, 1, HEIGHT, WIDTH)
    if jitter:
        wrong = torch.rand(count, generator=generator) < 0.2
        labels[wrong] = labels[wrong] % 3 + 1
        scores = torch.rand(count, generator=generator)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().clamp(0).tolist(), strict=True):
        mask[0, top:bottom, left:right] = 0.9
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}


def results_of(file: Path, folder: Path, jitter: float = 0.0) -> list[dict[str, Any]]:
    size = (HEIGHT, WIDTH)
    return [
        result
        for place, (_, target) in enumerate(open_coco(file, folder))
        for result in coco_results(output_of(target, jitter, place), target["image_id"], size, size, IDS)
    ]


def directly(file: Path, results: list[dict[str, Any]], kind: str) -> Any:
    """pycocotools as its manual has it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = copy.deepcopy(results)
    if kind == "segm":
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = COCO(str(file))
        scorer = COCOeval(truth, truth.loadRes(results), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def test_ground_truth_scores_1(tmp_path: Path) -> None:
    file, folder = write_coco(tmp_path, objects(), images=6)
    scores = evaluate_coco(file, results_of(file, folder))
    for name in ("AP", "AP50", "AP75", "AR100"):
        assert scores.figures[f"bbox/{name}"] == pytest.approx(1, abs=1e-12)
        assert scores.figures[f"segm/{name}"] == pytest.approx(1, abs=1e-12)
    assert scores.per_class["bbox"] == scores.per_class["segm"]
    assert scores.per_class["bbox"] == pytest.approx({"cat": 1, "dog": 1, "owl": 1})


@pytest.mark.parametrize("jitter", [0.5, 1.5])
def test_figures_are_those_of_pycocotools(tmp_path: Path, jitter: float, capfd: pytest.CaptureFixture[str]) -> None:
    file, folder = write_coco(tmp_path, objects(), images=6)
    recorded = tmp_path / "results.json"
    recorded.write_text(json.dumps(results_of(file, folder, jitter)))
    results = json.loads(recorded.read_text())
    before = copy.deepcopy(results)
    scores = evaluate_coco(file, results)
    assert results == before
    assert capfd.readouterr() == ("", "")
    for kind in ("bbox", "segm"):
        expected = directly(file, results, kind)
        assert 0.05 < scores.figures[f"{kind}/AP"] < 0.95
        figures = [scores.figures[f"{kind}/{name}"] for name in FIGURES]
        assert [-1 if math.isnan(value) else value for value in figures] == expected.stats.tolist()
        precision = expected.eval["precision"][:, :, :, 0, 2]
        assert list(scores.per_class[kind].values()) == [precision[:, :, place].mean() for place in range(3)]
    assert scores.per_class["bbox"].keys() == {"cat", "dog", "owl"}
    assert evaluate_coco(json.loads(file.read_text()), results).as_json() == scores.as_json()


def test_figures_that_are_not_known_are_null(tmp_path: Path) -> None:
    file, folder = write_coco(tmp_path, [annotation(10, 3, (4, 6, 20, 10))])
    scores = evaluate_coco(file, results_of(file, folder), ("bbox",))
    assert math.isnan(scores.figures["bbox/APl"])
    assert math.isnan(scores.per_class["bbox"]["dog"])
    written = json.loads(json.dumps(scores.as_json(), allow_nan=False))
    assert list(written) == [*(f"bbox/{name}" for name in FIGURES), "per_class"]
    assert written["bbox/AP"] == pytest.approx(1)
    assert written["bbox/APl"] is None
    assert written["per_class"] == {"bbox": {"cat": pytest.approx(1)}}


def test_nothing_detected_scores_0(tmp_path: Path) -> None:
    file, _ = write_coco(tmp_path, objects(), images=6)
    scores = evaluate_coco(file, [])
    assert scores.figures["bbox/AP"] == scores.figures["segm/AR100"] == 0


def test_crowds_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    crowd = annotation(10, 3, (20, 6, 40, 40), iscrowd=1)
    file, folder = write_coco(tmp_path, [annotation(10, 3, (4, 6, 10, 10)), crowd])
    results = results_of(file, folder)
    within = {**results[0], "bbox": [30, 20, 10, 10], "score": 1.5}
    assert evaluate_coco(file, [within, *results], ("bbox",)).figures["bbox/AP"] == pytest.approx(1)
    beside = {**within, "bbox": [4, 30, 10, 10]}
    assert evaluate_coco(file, [beside, *results], ("bbox",)).figures["bbox/AP"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("segmentation", [[], [[5, 5, 13, 13]], None, {"size": [8, 8], "counts": [64]}])
def test_an_object_without_a_mask_counts_for_boxes_alone(tmp_path: Path, segmentation: Any) -> None:
    records = [annotation(10, 3, (4, 6, 20, 10)), annotation(11, 3, (5, 5, 20, 20))]
    file, folder = write_coco(tmp_path, records)
    results = results_of(file, folder)
    change(file, annotations=[records[0], {**records[1], "segmentation": segmentation}])
    full, fewer = evaluate_coco(file, results), evaluate_coco(file, results[:1])
    assert full.figures["segm/AP"] == fewer.figures["segm/AP"] == pytest.approx(1)
    assert full.figures["bbox/AP"] == pytest.approx(1)
    assert fewer.figures["bbox/AP"] == pytest.approx(0.5, abs=0.01)


def test_incomplete_ground_truth_is_completed(tmp_path: Path) -> None:
    """An id of 0, which pycocotools takes for no match; the same id twice; no area; no flag for crowds."""
    records = [annotation(10, 3, (4, 6, 20, 10), id=0), annotation(11, 3, (5, 5, 20, 20), id=0)]
    file, folder = write_coco(tmp_path, [{**record} for record in records])
    results = results_of(file, folder)
    bare = [{key: value for key, value in record.items() if key not in ("area", "iscrowd")} for record in records]
    change(file, annotations=[*bare, {**bare[0], "image_id": 99}])
    scores = evaluate_coco(file, results)
    assert scores.figures["bbox/AP"] == scores.figures["segm/AP"] == pytest.approx(1)
    assert scores.figures["segm/APs"] == pytest.approx(1)  # 200 and 400 pixels


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 1, None, 5], ["a", 1, 5, 5], [1, 1, math.nan, 5]])
def test_annotations_without_a_box_are_left_out(tmp_path: Path, box: Any) -> None:
    """As in training; with a mask, they still count for masks."""
    whole = [annotation(10, 3, (4, 4, 20, 20)), annotation(10, 3, (30, 20, 16, 16), iscrowd=None)]
    strange = annotation(10, 3, (2, 30, 10, 10)) | {"bbox": box, "area": None}
    file, folder = write_coco(tmp_path, [*whole, strange, strange | {"segmentation": None}])
    data = open_coco(file, folder)
    found = coco_results(output_of(data[0][1]), 10, (HEIGHT, WIDTH), (HEIGHT, WIDTH), data.category_ids)
    assert len(found) == 2
    scores = evaluate_coco(file, found)
    assert scores.figures["bbox/AP"] == pytest.approx(1)
    assert scores.figures["segm/AR100"] == pytest.approx(2 / 3)


def test_outputs_become_results() -> None:
    from pycocotools import mask as tools

    boxes = torch.tensor([[8.0, 12, 48, 32], [0, 0, 128, 96]])
    masks = torch.zeros(2, 1, 96, 128)
    masks[0, 0, 12:32, 8:48] = 0.75
    masks[1, 0] = 0.5
    output = {"boxes": boxes, "labels": torch.tensor([3, 1]), "scores": torch.tensor([0.75, 0.5]), "masks": masks}
    results = coco_results(output, 10, (HEIGHT, WIDTH), (96, 128), IDS)
    json.dumps(results)
    assert [result["category_id"] for result in results] == [12, 3]
    assert [result["score"] for result in results] == [0.75, 0.5]
    assert [result["bbox"] for result in results] == [[4, 6, 20, 10], [0, 0, 64, 48]]
    assert all(result["image_id"] == 10 for result in results)
    assert [int(tools.area(result["segmentation"])) for result in results] == [200, 0]  # 0.5 is not above 0.5
    assert tools.toBbox(results[0]["segmentation"]).tolist() == [4, 6, 20, 10]
    assert results[0]["segmentation"]["size"] == [HEIGHT, WIDTH]
    del output["masks"]
    assert "segmentation" not in coco_results(output, 10, (HEIGHT, WIDTH), (96, 128), IDS)[0]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    assert coco_results(empty, 10, (HEIGHT, WIDTH), (96, 128), IDS) == []


def test_results_that_cannot_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = write_coco(tmp_path, [annotation(10, 3, (4, 6, 20, 10), [rectangle(4, 6, 24, 16)])])
    (result,) = results_of(file, folder)
    with pytest.raises(ValueError, match="1 image of the detections is not in the ground truth: id 99"):
        evaluate_coco(file, [{**result, "image_id": 99}])
    del result["segmentation"]
    with pytest.raises(ValueError, match="detection 1 has no segmentation, without which segm cannot be scored"):
        evaluate_coco(file, [result])
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(MissingPackage, match=r"sparkmim\[detect\]"):
        evaluate_coco(file, [result])
