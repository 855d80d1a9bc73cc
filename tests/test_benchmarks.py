"""The benchmarks of a step run, at small sizes on the CPU, and write what they measured."""

import json
import sys
from pathlib import Path
from typing import Any

import processes

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, path: Path, *arguments: str) -> dict[str, Any]:
    """Runs a script, and returns the JSON that it writes."""
    done = processes.run([sys.executable, FOLDER / script, *arguments, "--json", path], path.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_step(tmp_path: Path) -> None:
    case = ("--cases", "resnet18:32", "--batch", "2", "--size", "64", "--rounds", "1", "--precisions", "float32")
    report = run("step.py", tmp_path / "step.json", *case, "--ways", "masked dense", "sparkmim")
    dense, ours = report["rows"]
    assert [row["way"] for row in report["rows"]] == ["masked dense", "sparkmim"]
    assert dense["speedup"] == dense["memory_ratio"] == 1
    assert ours["memory_ratio"] < 1
    assert all(seconds > 0 for seconds in ours["seconds"].values())


def test_gpu_on_the_cpu(tmp_path: Path) -> None:
    small = ("--networks", "resnet18", "--families", "resnet18", "--width", "32", "--batch", "2", "--size", "64")
    sections = ("--sections", "correctness", "steps", "profile", "throughput")  # compiling takes a compiler
    report = run("gpu.py", tmp_path / "gpu.json", "--device", "cpu", *small, "--rounds", "1", *sections)
    assert report["correctness"]["resnet18 float32"]["maps"] < 1e-5
    assert report["correctness"]["resnet18 bfloat16"]["maps"] < 0.05
    assert set(report["steps"]["resnet18 float32 sparkmim"]["seconds"]) == {"step", "encoder", "densify", "decoder"}
    assert report["throughput"]["resnet18 sparkmim"]["batch"] == 2
    assert "convolution" in report["profile"]
