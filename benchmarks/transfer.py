"""Does pretraining pay? Few labels: fine-tuned and frozen, after SparK, its rivals, and no pretraining, in equal time.

    pip install '.[bench]'
    python benchmarks/transfer.py --data cifar10-mini imagenette-64 --json benchmarks/results/transfer.json \\
        --plot docs/transfer.png --runs transfer-runs

Each data set is a folder with `train/<class>/`, and `test/<class>/` or not; for its three parts see `fewshot.py`. Every
way of pretraining gets the same network and images, and as many steps as take the same time on one core, by timings in
turn before. Its learning rate is the best of three, each tried in a part of that time, by a linear classifier of frozen
features on choosing images. The network is fine-tuned several times, each with other labelled images, and scored on the
test images. Rates of fine-tuning, and whether the head is fitted to frozen features first, are chosen for each way on
choosing images, from the same four; all have the same steps and augmentation, and no layer decay.

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

from fewshot import FINETUNINGS, RIVALS, STEPS, Jobs, Way, choose, count_steps, finetune, frozen, pretrain
from measure import provenance
from sparkmim.files import replacing

SCRATCH, OURS, CONTRAST, MASKED_DENSE = "no pretraining", "sparkmim", "sparkmim, contrast", "masked dense"
METHODS: dict[str, Way] = {
    OURS: ("sparkmim", {"decoder_width": 64}),
    CONTRAST: ("sparkmim", {"decoder_width": 64, "recipe": "contrast"}),
    MASKED_DENSE: ("masked dense", {"decoder_width": 64}),
    **{name: (name, {}) for name in RIVALS},
}
"""What each way trains by, and settings that differ from the default recipe."""

RATES = {
    OURS: (1e-3, 2e-3, 4e-3),
    CONTRAST: (5e-4, 1e-3, 2e-3),
    "SimCLR": (0.015, 0.03, 0.06),
    "BYOL": (0.06, 0.12, 0.24),
    "DINO": (0.06, 0.12, 0.24),
}
"""Candidates for pretraining: per 256 images; of the rivals per 128, of which the published one is 0.06 (of 0.03, 0.06
and 0.12, SimCLR did best with the lowest, the others with the highest). Masked dense takes the rate of `OURS`, whose
function it computes."""

TUNED_AT = (10, 50)
"""Labels per class that fine-tuning is tuned with; other numbers of labels take what is best at the nearest."""


class Comparison:
    """All ways on one data set.

    Args:
        folder: the data set.
        jobs: does the work.
        ways: to compare, besides no pretraining.
        minutes: of each pretraining.
        tried: minutes of each that tries a learning rate.
        pretrainings: of each way, with other seeds, which fine-tunings take in turn.
        seeds: of fine-tunings.
        steps: of fine-tuning, by labels per class.
    """

    def __init__(
        self, folder: Path, jobs: Jobs, ways: Sequence[str], minutes: float, tried: float, pretrainings: int,
        seeds: int, steps: Mapping[int, int],
    ) -> None:  # fmt: skip
        self.folder = folder
        self.jobs = jobs
        self.ways = ways
        self.starts = (SCRATCH, *ways)
        self.minutes = minutes
        self.tried = tried
        self.pretrainings = range(1, pretrainings + 1)
        self.seeds = range(1, seeds + 1)
        self.steps = steps

    def weights(self, way: str, name: object) -> Path | None:
        return None if way == SCRATCH else self.jobs.folder / f"{way} {name}.safetensors"

    def pretraining(self, way: str, name: object, rate: float, minutes: float, seed: int) -> tuple[Any, Any]:
        steps = max(1, round(minutes * self.per_minute[way]))
        return pretrain, (self.folder, self.weights(way, name), *METHODS[way], rate, steps, seed)

    def probe(self, way: str, name: object, judged: str) -> tuple[Any, Any]:
        return frozen, (self.folder, self.weights(way, name), list(self.steps), 0, judged)

    def choose_rates(self) -> dict[str, dict[float, float]]:
        """Returns the accuracies of frozen features on choosing images, by way and learning rate."""
        tried = [(way, rate) for way in self.ways if way in RATES for rate in RATES[way]]
        self.jobs.run({
            f"try {way} {rate}": self.pretraining(way, f"try {rate}", rate, self.tried, 0) for way, rate in tried
        })  # fmt: skip
        judged = self.jobs.run(
            {f"judge {way} {rate}": self.probe(way, f"try {rate}", "choosing") for way, rate in tried}
        )
        scores: dict[str, dict[float, float]] = {}
        for way, rate in tried:
            scores.setdefault(way, {})[rate] = judged[f"judge {way} {rate}"]["linear"]
        return scores

    def finetuning(
        self, way: str, seed: int, shots: int, settings: tuple[float, bool], drawn: int, judged: str
    ) -> tuple[Any, Any]:
        weights = self.weights(way, self.pretrainings[(seed - 1) % len(self.pretrainings)])
        return finetune, (self.folder, weights, shots, self.steps[shots], *settings, drawn, judged)

    def tune(self) -> dict[tuple[str, int], dict[tuple[float, bool], float]]:
        """Returns accuracies on choosing images by way, labels per class, and settings of fine-tuning."""
        every = [(way, shots) for way in self.starts for shots in self.steps if shots in TUNED_AT]
        tuned = self.jobs.run({
            f"tune {way} {shots} {described(*settings)}": self.finetuning(way, 1, shots, settings, 0, "choosing")
            for way, shots in every for settings in FINETUNINGS
        })  # fmt: skip
        return {
            (way, shots): {
                settings: tuned[f"tune {way} {shots} {described(*settings)}"]["accuracy"] for settings in FINETUNINGS
            }
            for way, shots in every
        }

    def run(self) -> dict[str, Any]:
        """Returns rates, times and accuracies."""
        self.per_minute = count_steps(self.jobs, self.folder, {way: METHODS[way] for way in self.ways})
        tried = self.choose_rates()
        chosen = {way: choose(scores) for way, scores in tried.items()}
        if MASKED_DENSE in self.ways:
            chosen[MASKED_DENSE] = chosen[OURS]
        pretrained = self.jobs.run({
            f"pretrain {way} {seed}": self.pretraining(way, seed, chosen[way], self.minutes, seed)
            for seed in self.pretrainings for way in self.ways
        })  # fmt: skip
        probed = self.jobs.run({
            f"frozen {way} {seed}": self.probe(way, seed, "test")
            for way in self.starts for seed in self.pretrainings
        })  # fmt: skip
        tuned = self.tune()
        nearest = {shots: min(TUNED_AT, key=lambda other: abs(other - shots)) for shots in self.steps}
        best = {(way, shots): choose(tuned[way, nearest[shots]]) for way in self.starts for shots in self.steps}
        finetuned = self.jobs.run({
            f"finetune {way} {shots} {seed}": self.finetuning(way, seed, shots, best[way, shots], seed, "test")
            for shots in self.steps for way in self.starts for seed in self.seeds
        })  # fmt: skip
        rows = []
        for way in self.starts:
            runs = [pretrained[f"pretrain {way} {seed}"] for seed in self.pretrainings] if way in self.ways else []
            accuracies = {
                f"fine-tuned {shots}": [finetuned[f"finetune {way} {shots} {seed}"]["accuracy"] for seed in self.seeds]
                for shots in self.steps
            }
            for seed in self.pretrainings:
                for name, score in probed[f"frozen {way} {seed}"].items():
                    accuracies.setdefault(name, []).extend(score if isinstance(score, list) else [score])
            rows.append({
                "way": way, "rate": chosen.get(way), "rates tried": tried.get(way),
                "fine-tuning": {shots: described(*best[way, shots]) for shots in self.steps},
                "fine-tuning tried": {
                    shots: {described(*settings): score for settings, score in tuned[way, shots].items()}
                    for shots in TUNED_AT if (way, shots) in tuned
                },
                "steps": [run["steps"] for run in runs], "steps per minute": self.per_minute.get(way),
                "accuracies": accuracies,
            })  # fmt: skip
        return {"data": self.folder.name, "rows": rows}


def described(rate: float, fit_head: bool) -> str:
    return f"{rate:g}, fitted head" if fit_head else f"{rate:g}"


def mean_and_spread(accuracies: list[float]) -> str:
    spread = f" ± {statistics.stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.1%}{spread}"


def draw(results: list[dict[str, Any]], labels: Sequence[int], file: Path) -> None:
    """Accuracy after fine-tuning over labels per class, for each data set: mean of the seeds, and each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {SCRATCH: "#8a8a8a", OURS: "#1f6f8b", CONTRAST: "#123f52", MASKED_DENSE: "#7fb3c4"}
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
    table = Table("way", "steps", *names, title=result["data"])
    for row in result["rows"]:
        steps = f"{statistics.mean(row['steps']):.0f}" if row["steps"] else ""
        table.add_row(row["way"], steps, *(mean_and_spread(row["accuracies"][name]) for name in names))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--ways", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=6, help="of each pretraining")
    parser.add_argument("--try-minutes", type=float, default=0.8, help="of each that tries a learning rate")
    parser.add_argument("--pretrainings", type=int, default=1, help="of each way, with other seeds")
    parser.add_argument("--labels", type=int, nargs="+", default=list(STEPS), help="per class; 10 or 50 among them")
    parser.add_argument("--finetune-steps", type=int, nargs="+", default=list(STEPS.values()), help="for each of these")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning, each with other labelled images")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    steps = dict(zip(args.labels, args.finetune_steps, strict=True))
    settings = {
        "minutes": args.minutes,
        "try minutes": args.try_minutes,
        "labels": args.labels,
        "finetune steps": args.finetune_steps,
        "ways": METHODS,
        "rates": RATES,
        "fine-tunings": FINETUNINGS,
    }
    results = []
    for folder in args.data:
        with Jobs(args.runs / folder.name, args.workers, settings) as jobs:
            minutes = args.minutes, args.try_minutes
            results.append(Comparison(folder, jobs, args.ways, *minutes, args.pretrainings, args.seeds, steps).run())
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
