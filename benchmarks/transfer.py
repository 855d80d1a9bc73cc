"""Does pretraining pay? Few labels: fine-tuned and frozen, after SparK, its rivals, and no pretraining, in equal time.

    pip install '.[bench]'
    python benchmarks/transfer.py --data cifar10-mini imagenette-64 --json benchmarks/results/transfer.json \\
        --plot docs/transfer.png --runs transfer-runs

Each data set is a folder with `train/<class>/`, and `test/<class>/` or not; for its three parts see `fewshot.py`. Every
way of pretraining gets the same network, images and minutes, alone on one core. Its learning rate is the best of three,
each tried in a third of the time, by a linear classifier of frozen features on choosing images. It is pretrained with
several seeds; each is fine-tuned with other labelled images and scored on the test images. Rates of fine-tuning are
chosen on choosing images, for each way and number of labels, from the same three; all have the same steps and
augmentation, and no layer decay.

What is done is kept in `--runs`, and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewshot import FINETUNE_RATES, RIVALS, STEPS, Jobs, choose, finetune, frozen, pretrain
from measure import provenance
from sparkmim.files import replacing

SCRATCH, OURS, CONTRAST = "no pretraining", "sparkmim", "sparkmim, contrast"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("sparkmim", {"decoder_width": 64}),
    CONTRAST: ("sparkmim", {"decoder_width": 64, "recipe": "contrast"}),
    "masked dense": ("masked dense", {"decoder_width": 64}),
    **{name: (name, {}) for name in RIVALS},
}
"""What each way trains by, and settings that differ from the default recipe."""

RATES = {
    "sparkmim": (1e-3, 2e-3, 4e-3),
    "masked dense": (1e-3, 2e-3, 4e-3),
    **dict.fromkeys(RIVALS, (0.03, 0.06, 0.12)),
}
"""Candidates for pretraining: per 256 images; of the rivals per 128, of which the published one is 0.06."""


class Comparison:
    """All ways on one data set.

    Args:
        folder: the data set.
        jobs: does the work.
        ways: to compare, besides no pretraining.
        minutes: of each pretraining.
        seeds: of pretrainings and fine-tunings.
        steps: of fine-tuning, by labels per class.
    """

    def __init__(
        self, folder: Path, jobs: Jobs, ways: Sequence[str], minutes: float, seeds: int, steps: Mapping[int, int]
    ) -> None:
        self.folder = folder
        self.jobs = jobs
        self.ways = ways
        self.minutes = minutes
        self.seeds = range(1, seeds + 1)
        self.steps = steps

    def weights(self, way: str, name: object) -> Path | None:
        return None if way == SCRATCH else self.jobs.folder / f"{way} {name}.safetensors"

    def pretraining(self, way: str, name: object, rate: float, minutes: float, seed: int) -> tuple[Any, Any]:
        return pretrain, (self.folder, self.weights(way, name), *METHODS[way], rate, minutes, seed)

    def probe(self, way: str, name: object, seed: int, judged: str) -> tuple[Any, Any]:
        return frozen, (self.folder, self.weights(way, name), list(self.steps), seed, judged)

    def choose_rates(self) -> dict[str, dict[float, float]]:
        """Returns the accuracies of frozen features on choosing images, by way and learning rate."""
        tried = [(way, rate) for way in self.ways for rate in RATES[METHODS[way][0]]]
        self.jobs.run({
            f"try {way} {rate}": self.pretraining(way, f"try {rate}", rate, self.minutes / 3, 0) for way, rate in tried
        })  # fmt: skip
        judged = self.jobs.run({
            f"judge {way} {rate}": self.probe(way, f"try {rate}", 0, "choosing")
            for way, rate in tried
        })  # fmt: skip
        scores: dict[str, dict[float, float]] = {way: {} for way in self.ways}
        for way, rate in tried:
            scores[way][rate] = judged[f"judge {way} {rate}"]["linear"]
        return scores

    def finetune(self, shots: int) -> dict[str, dict[str, Any]]:
        """Returns the rate chosen and the accuracies on test images with so many labels per class, by way."""

        def run(way: str, seed: int, rate: float, drawn: int, judged: str) -> tuple[Any, Any]:
            return finetune, (self.folder, self.weights(way, seed), shots, self.steps[shots], rate, drawn, judged)

        starts = (SCRATCH, *self.ways)
        tuned = self.jobs.run({
            f"tune {way} {shots} {rate}": run(way, 1, rate, 0, "choosing") for way in starts for rate in FINETUNE_RATES
        })  # fmt: skip
        rates = {
            way: choose({rate: tuned[f"tune {way} {shots} {rate}"]["accuracy"] for rate in FINETUNE_RATES})
            for way in starts
        }
        done = self.jobs.run({
            f"finetune {way} {shots} {seed}": run(way, seed, rates[way], seed, "test")
            for way in starts for seed in self.seeds
        })  # fmt: skip
        return {
            way: {
                "rate": rates[way],
                "accuracies": [done[f"finetune {way} {shots} {seed}"]["accuracy"] for seed in self.seeds],
            }
            for way in starts
        }

    def run(self) -> dict[str, Any]:
        """Returns rates, times and accuracies."""
        tried = self.choose_rates()
        chosen = {way: choose(scores) for way, scores in tried.items()}
        pretrained = self.jobs.run({
            f"pretrain {way} {seed}": self.pretraining(way, seed, chosen[way], self.minutes, seed)
            for seed in self.seeds for way in self.ways
        })  # fmt: skip
        starts = (SCRATCH, *self.ways)
        probed = self.jobs.run({
            f"frozen {way} {seed}": self.probe(way, seed, seed, "test")
            for way in starts for seed in self.seeds
        })  # fmt: skip
        finetuned = {shots: self.finetune(shots) for shots in self.steps}
        rows = []
        for way in starts:
            runs = [pretrained[f"pretrain {way} {seed}"] for seed in self.seeds] if way in self.ways else []
            probes = [probed[f"frozen {way} {seed}"] for seed in self.seeds]
            accuracies = {f"fine-tuned {shots}": finetuned[shots][way]["accuracies"] for shots in self.steps}
            accuracies |= {name: [probe[name] for probe in probes] for name in probes[0]}
            rows.append({
                "way": way, "rate": chosen.get(way), "rates tried": tried.get(way),
                "fine-tuning rates": {shots: finetuned[shots][way]["rate"] for shots in self.steps},
                "steps": [run["steps"] for run in runs], "minutes": [run["seconds"] / 60 for run in runs],
                "accuracies": accuracies,
            })  # fmt: skip
        return {"data": self.folder.name, "rows": rows}


def mean_and_spread(accuracies: list[float]) -> str:
    spread = f" ± {statistics.stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.1%}{spread}"


def draw(results: list[dict[str, Any]], labels: Sequence[int], file: Path) -> None:
    """Accuracy after fine-tuning over labels per class, for each data set: mean of the seeds, and each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {SCRATCH: "#8a8a8a", OURS: "#1f6f8b", CONTRAST: "#123f52", "masked dense": "#7fb3c4"}
    others = iter(("#c8553d", "#d99a3d", "#6b8f4e"))
    figure, panels = plt.subplots(
        1, len(results), figsize=(5.2 * len(results), 4.2), layout="constrained", squeeze=False
    )
    for axes, result in zip(panels[0], results, strict=True):
        for row in result["rows"]:
            if row["way"] not in colours:
                colours[row["way"]] = next(others)
            colour = colours[row["way"]]
            scores = [[100 * a for a in row["accuracies"][f"fine-tuned {shots}"]] for shots in labels]
            style = {"linewidth": 2.2, "zorder": 3} if row["way"] in (OURS, CONTRAST) else {"linewidth": 1.2}
            axes.plot(labels, [statistics.mean(s) for s in scores], "o-", color=colour, label=row["way"], **style)
            for shots, each in zip(labels, scores, strict=True):
                axes.plot([shots] * len(each), each, ".", color=colour, alpha=0.3)
        axes.set_xscale("log")
        axes.set_xticks(labels, [str(count) for count in labels])
        axes.minorticks_off()
        axes.set(xlabel="labelled images per class", ylabel="test accuracy after fine-tuning, %", title=result["data"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    with replacing(file) as partial:
        figure.savefig(partial, dpi=120)


def show(result: dict[str, Any], console: Console) -> None:
    names = list(result["rows"][0]["accuracies"])
    table = Table("way", "minutes", *names, title=result["data"])
    for row in result["rows"]:
        minutes = f"{statistics.mean(row['minutes']):.1f}" if row["minutes"] else ""
        table.add_row(row["way"], minutes, *(mean_and_spread(row["accuracies"][name]) for name in names))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--ways", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=4.5, help="of each pretraining")
    parser.add_argument("--labels", type=int, nargs="+", default=list(STEPS), help="per class")
    parser.add_argument("--finetune-steps", type=int, nargs="+", default=list(STEPS.values()), help="for each of these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    steps = dict(zip(args.labels, args.finetune_steps, strict=True))
    settings = {"minutes": args.minutes, "labels": args.labels, "finetune steps": args.finetune_steps}
    results = []
    for folder in args.data:
        with Jobs(args.runs / folder.name, args.workers, settings) as jobs:
            results.append(Comparison(folder, jobs, args.ways, args.minutes, args.seeds, steps).run())
    console = Console(width=140)
    for result in results:
        show(result, console)
    if args.plot:
        draw(results, args.labels, args.plot)
    if args.json:
        report = {**provenance(), "minutes": args.minutes, "steps": steps, "results": results}
        with replacing(args.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
