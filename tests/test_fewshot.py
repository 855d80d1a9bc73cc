"""The benchmark of few labels: its parts, its jobs, and that masked dense is the same function."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparkmim.machine import is_running

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of 32×32 in two classes, dark and light; none to test on."""
    generator = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        for number in range(20):
            path = tmp_path / "data" / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(level - 40, level + 40, (32, 32, 3)).astype(np.uint8)).save(path)
    return tmp_path / "data"


def test_the_three_parts(folder: Path) -> None:
    import fewshot

    images = fewshot.open_images(folder)
    assert (len(images.test), len(images.choosing), len(images.pool)) == (8, 4, 28)
    assert len(images.unlabelled) == 32
    every = {image.numpy().tobytes() for part in (images.test, images.unlabelled) for image in part.images}
    assert len(every) == 40  # no image is in two parts
    drawn = images.pool.draw(3, seed=1)
    assert drawn.targets.tolist().count(0) == drawn.targets.tolist().count(1) == 3


def test_masked_dense_trains_the_same_network(folder: Path) -> None:
    import fewshot

    images = fewshot.open_images(folder).unlabelled
    networks = []
    settings = {"batch_size": 8, "decoder_width": 16, "precision": "32-true", "recipe": "contrast"}
    for method, rate, more in (("sparkmim", 1e-3, {}), ("masked dense", None, {"learning_rate": 1e-3})):
        network = fewshot.create_network(32, seed=3)
        fewshot.train(method, {**settings, **more}, network, images, 32, rate, 3, 0)
        networks.append(network)
    start = fewshot.create_network(32, seed=3).state_dict()
    for name, value in networks[0].state_dict().items():
        torch.testing.assert_close(value, networks[1].state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not torch.equal(start["stage1.conv1.weight"], networks[0].state_dict()["stage1.conv1.weight"])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")  # in DINO's head
@pytest.mark.parametrize("method", ["SimCLR", "BYOL", "DINO"])
def test_rivals_train_the_network_and_nothing_else_of_it(method: str, folder: Path) -> None:
    import fewshot

    images = fewshot.open_images(folder).unlabelled
    networks = []
    for _ in range(2):
        network = fewshot.create_network(32, seed=3)
        fewshot.train(method, {}, network, images, 32, 0.06, 2, 0)
        networks.append(network.state_dict())
    start = fewshot.create_network(32, seed=3).state_dict()
    assert networks[0].keys() == start.keys()
    for name, value in networks[0].items():
        assert value.isfinite().all()
        assert torch.equal(value, networks[1][name])  # by the seed alone
        if name.startswith("classifier"):
            assert torch.equal(value, start[name])
    assert not torch.equal(networks[0]["stage3.conv2.weight"], start["stage3.conv2.weight"])


def test_scores(folder: Path) -> None:
    import fewshot

    found = fewshot.frozen(folder, None, [4], 0, "test")
    assert found.keys() == {"linear 4", "k-NN", "linear"}
    assert len(found["linear 4"]) == 10
    assert found["linear"] > 0.9  # dark and light are easily told apart
    assert fewshot.finetune(folder, None, 8, 40, 1e-2, True, 0, "test")["accuracy"] > 0.9


def test_jobs_are_done_once(tmp_path: Path) -> None:
    import fewshot

    with fewshot.Jobs(tmp_path, 2, {"minutes": 1}) as jobs:
        assert jobs.run({"one": (dict, ([("value", 1)],)), "two": (dict, ([("value", 2)],))})["two"] == {"value": 2}
        (tmp_path / "one.json").write_text('{"value": 7}')
        assert jobs.run({"one": (dict, ([("value", 1)],))}) == {"one": {"value": 7}}
        with pytest.raises(TypeError, match="dictionary update sequence"):
            jobs.run({"three": (dict, ([1],))})
    assert not (tmp_path / "three.json").exists()
    with pytest.raises(SystemExit, match="results of other settings"):
        fewshot.Jobs(tmp_path, 2, {"minutes": 2})


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends children with their parent")
def test_workers_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    sleep = f"(os.system, ('echo $PPID > {tmp_path}/worker; exec sleep 60',))"
    program = f"""
import os, pathlib, fewshot
with fewshot.Jobs(pathlib.Path({str(tmp_path)!r}), 1, {{}}) as jobs:
    jobs.run({{"sleep": {sleep}}})
"""
    benchmark = subprocess.Popen([sys.executable, "-c", program], cwd=BENCHMARKS)
    worker = tmp_path / "worker"
    wait_until(lambda: worker.exists() and worker.read_text().endswith("\n"))
    benchmark.kill()
    benchmark.wait()
    wait_until(lambda: not is_running(int(worker.read_text())))


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    pytest.fail("not within a minute")


class Instant:
    """Gives results at once: accuracies rise with the learning rate, and by way."""

    folder, workers = Path("runs"), 2

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}

    def run(self, jobs: dict[str, Any]) -> dict[str, Any]:
        self.jobs |= jobs
        gain = {"no": 0.0, "sparkmim": 0.1, "masked": 0.1}
        results: dict[str, Any] = {}
        for name, (_, arguments) in jobs.items():
            if name.startswith("time"):
                results[name] = {"sparkmim": 0.5, "masked dense": 1.0}
                continue
            rate = max((part for part in arguments if isinstance(part, float)), default=0.0)
            if name.startswith("judge"):
                rate = float(name.split()[-1])
            score = 0.2 + rate + gain[name.split()[1]]
            results[name] = {
                "steps": 10, "seconds": 60.0, "accuracy": score, "k-NN": score, "linear": score,
                "linear 10": [score] * 3,
            }  # fmt: skip
        return results


def test_rates_are_chosen_on_choosing_images_and_scores_are_of_test_images(tmp_path: Path) -> None:
    import transfer

    jobs = Instant()
    comparison = transfer.Comparison(Path("data"), jobs, ["sparkmim", "masked dense"], 2.0, 0.5, 1, 2, {10: 5})
    result = comparison.run()
    scratch, ours, dense = result["rows"]
    assert (scratch["way"], ours["way"]) == ("no pretraining", "sparkmim")
    assert (ours["steps"], ours["steps per minute"]) == ([10], 120)
    assert (ours["rate"], dense["rate"]) == (4e-3, 4e-3)
    assert ours["fine-tuning"] == {10: "0.01"}
    assert ours["accuracies"]["fine-tuned 10"] == pytest.approx([0.31, 0.31])
    assert len(ours["accuracies"]["linear 10"]) == 3
    transfer.draw([json.loads(json.dumps(result))], [10], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 100
    arguments = {name: arguments for name, (_, arguments) in jobs.jobs.items()}
    # Masked dense takes twice the time, so half the steps.
    assert (arguments["pretrain sparkmim 1"][5], arguments["pretrain masked dense 1"][5]) == (240, 120)
    assert arguments["try sparkmim 0.002"][5] == 60
    for name, given in arguments.items():
        if name.startswith(("judge", "tune")):
            assert given[-1] == "choosing"
        elif name.startswith(("frozen", "finetune")):
            assert given[-1] == "test"
    assert arguments["finetune sparkmim 10 2"][1] == Path("runs/sparkmim 1.safetensors")
    comparison.pretrainings = range(1, 3)
    assert comparison.finetuning("sparkmim", 2, 10, (1e-3, False), 2, "test")[1][1] == Path(
        "runs/sparkmim 2.safetensors"
    )


def test_ways_are_timed_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a takes 1 s and of b 2 s, and each call 10 s more."""
    import fewshot

    clock, calls = [0.0], []

    def train(method: str, settings: dict[str, Any], network: Any, images: Any, size: int, *rest: Any) -> None:
        calls.append(method)
        clock[0] += 10 + {"a": 1, "b": 2}[method] * rest[1]

    monkeypatch.setattr(fewshot, "train", train)
    monkeypatch.setattr(fewshot.time, "process_time", lambda: clock[0])
    assert fewshot.seconds_per_step(folder, {"a": ("a", {}), "b": ("b", {})}, rounds=2) == {"a": 1.0, "b": 2.0}
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 2]
