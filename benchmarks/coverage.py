"""Which networks are exact under masking: `sparkmim verify` over every model of timm and of torchvision.

    python benchmarks/coverage.py --out benchmarks/results/coverage.jsonl
    python benchmarks/coverage.py --out /tmp/new.jsonl --models "resnet*" convnext_tiny
    python benchmarks/coverage.py --out benchmarks/results/coverage.jsonl --page docs/coverage.md

Each network is verified in a process of its own, of bounded memory and time, forward and backward, in float64, at
three patches per side and a batch of two. Results are appended as they come; a second call goes on with what is
missing, and `--again STATUS` repeats those of one status.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import model_entrypoint
from torch.overrides import TorchFunctionMode
from torchvision.models import list_models

from sparkmim.models import Hierarchy, create_encoder, verify_encoder
from sparkmim.models.hierarchy import NoHierarchy
from sparkmim.sparse import PatchLayout, UnsupportedOperation, naming_modules, pack
from sparkmim.sparse.verify import MASKS

LARGE = 250e6
"""Networks of more parameters are verified one at a time."""

FEW_MASKS = 60e6
"""Networks of more parameters are verified with all patches visible, and under one mask instead of two."""

SMALL_IMAGE = 100e6
"""Networks of more parameters are verified on images of two patches per side instead of three."""


def all_names() -> list[str]:
    """All of timm's models, and all of torchvision's classifiers."""
    return timm.list_models() + [f"torchvision/{name}" for name in list_models(module=torchvision.models)]


def family(name: str) -> str:
    """The module of timm that a model comes from, or `torchvision`."""
    if name.startswith("torchvision/"):
        return "torchvision"
    return model_entrypoint(name).__module__.rpartition(".")[-1]


def parameters_of(names: list[str]) -> dict[str, int]:
    """Parameters of every model, counted without making any."""
    counts = {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                counts[name] = sum(p.numel() for p in create_encoder(name).parameters())
            except Exception:
                counts[name] = 0
    return counts


class WithoutInit(TorchFunctionMode):
    """Leaves large tensors as they are allocated: networks that will be refused need no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        fills = name.endswith("_") and not name.startswith("__") and name != "requires_grad_"
        if fills and args and isinstance(args[0], torch.Tensor) and args[0].numel() > 10_000:
            return args[0]
        return func(*args, **(kwargs or {}))


def native_size(encoder: torch.nn.Module) -> tuple[int, ...]:
    """The image size that a network was made for."""
    return tuple(getattr(encoder, "default_cfg", {"input_size": (3, 224, 224)})["input_size"][1:])


def refusal(name: str) -> str | None:
    """Runs a network forward on visible patches, and says what is refused; None if nothing is, or it did not run."""
    try:
        with WithoutInit():
            encoder = create_encoder(name)
        for size in (None, native_size(encoder)):
            hierarchy = Hierarchy(encoder)
            size = size or (3 * hierarchy.patch_unit,) * 2
            visible = torch.ones(2, *(extent // hierarchy.patch_unit for extent in size), dtype=torch.bool)
            try:
                with torch.no_grad(), naming_modules(encoder):
                    hierarchy(pack(torch.zeros(2, 3, *size), PatchLayout(visible)))
                return None
            except UnsupportedOperation as error:
                return str(error)
            except Exception:
                continue
    except Exception:
        return None
    return None


def check(name: str, parameters: int, memory: float) -> dict[str, Any]:
    """Verifies one network."""
    row: dict[str, Any] = {"model": name, "family": family(name)}
    if message := refusal(name):
        return {**row, "status": "refused", "module": message.split("`")[1], "message": message}
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    torch.manual_seed(0)
    masks = MASKS if parameters <= FEW_MASKS else ("all visible", "ragged mask")
    try:
        encoder = create_encoder(name)
        full_size = native_size(encoder)
        image_size = 2 * Hierarchy(encoder).patch_unit if parameters > SMALL_IMAGE else None
        del encoder  # verified by name, the network is not copied
        try:
            report = verify_encoder(name, image_size, masks=masks)
            if not report.exact and image_size:  # four patches are few: the definition may take channels for positions
                report = verify_encoder(name, masks=masks)
        except ValueError as error:
            if isinstance(error, NoHierarchy):
                raise
            # Some take images of one size only.
            report = verify_encoder(name, full_size, masks=masks)
    except MemoryError:
        return {**row, "status": "out of memory"}
    except NoHierarchy as error:
        return {**row, "status": "no hierarchy", "message": str(error)}
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        out_of_memory = "can't allocate memory" in message
        return {**row, "status": "out of memory" if out_of_memory else "failed", "message": message}
    if report.exact:
        return {**row, "status": "exact", "error": report.error}
    refused = report.error == float("inf") and report.message.startswith("NOT supported")
    status = "refused" if refused else "wrong"
    return {**row, "status": status, "module": report.module, "message": report.message}


def child(name: str, parameters: int, memory: float, threads: int, pipe: Any) -> None:
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")
        pipe.send(check(name, parameters, memory))


REASONS = [
    ("attention within windows, or of grouped positions", r"mixes part of the map|mixes the batch|not preserve|padded"),
    ("attention among positions", r"attention|compares positions|batch axis, which must stay first|softmax|normalize"),
    ("class tokens or position embeddings beside the positions", r"cat`|does not fit the masked map|expand"),
    ("mixes positions by a matrix, an unfolding or a sequence", r"linear`|unfold|conv1d`|im2col|avg_pool1d|lstm|flip"),
    ("unpadded convolution: positions leave the patch grid", r"no longer correspond|does not divide"),
    ("pools to a fixed number of regions", r"adaptive_"),
]
"""What a refusal comes down to, by what its message says."""


def reason(row: dict[str, Any]) -> str:
    """In a few words, why a network was refused."""
    if row["status"] == "no hierarchy":
        return "unpadded convolutions: no feature map divides the image"
    return next((words for words, pattern in REASONS if re.search(pattern, row.get("message", ""))), "see message")


def not_run(names: list[str]) -> list[str]:
    """A paragraph on networks without a result."""
    if not names:
        return []
    shown = ", ".join(f"`{name}`" for name in sorted(names))
    return [f"Not run, for their size, on a machine of two cores and 24 GiB: {shown}.", ""]


def page(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown page: a table of families, and every model of each."""
    done = {row["model"] for row in rows}
    missing = [name for name in all_names() if name not in done]
    unfinished = [row["model"] for row in rows if row["status"].startswith("out of")]
    rows = [row for row in rows if not row["status"].startswith("out of")]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["model"]):
        families.setdefault(row["family"], []).append(row)
    exact = [row for row in rows if row["status"] == "exact"]
    of_timm = sum(row["family"] != "torchvision" for row in rows)
    worst = max(exact, key=lambda row: row["error"])
    lines = [
        "# Which networks are exact",
        "",
        f"Of {of_timm:,} models of timm {timm.__version__} and {len(rows) - of_timm} classifiers of torchvision "
        f"{torchvision.__version__.split('+')[0]}, {len(exact):,} are exact under masking: on visible patches alone "
        "they compute what the definition of a masked network says, forward and backward. Each was verified in "
        f"float64; the largest relative error is {worst['error']:.0e} ({worst['model']}), and 1e-6 would be reported. "
        "The others are refused by name before anything is trained; none gives a wrong result silently.",
        "",
        *not_run(missing + unfinished),
        "Made by `python benchmarks/coverage.py`, on three patches per side and two images, under three masks. "
        f"Networks of more than {FEW_MASKS / 1e6:.0f} million parameters ran under two masks, those of more than "
        f"{SMALL_IMAGE / 1e6:.0f} million on two patches per side. `sparkmim verify --model NAME` repeats any line.",
        "",
        "| family | exact | refused | why the others are refused |",
        "| --- | --- | --- | --- |",
    ]
    for name, members in sorted(families.items()):
        good = sum(row["status"] == "exact" for row in members)
        others = Counter(reason(row) for row in members if row["status"] != "exact")
        why = "; ".join(words for words, _ in others.most_common(3))
        lines.append(f"| [{name}](#{name}) | {good} | {len(members) - good} | {why} |")
    for name, members in sorted(families.items()):
        lines += ["", f"## {name}", ""]
        good = [f"`{row['model']}`" for row in members if row["status"] == "exact"]
        if good:
            lines += ["Exact: " + ", ".join(good) + ".", ""]
        by_message: dict[str, list[str]] = {}
        for row in members:
            if row["status"] != "exact":
                text = row.get("message", row["status"]).removeprefix("NOT supported: ").split(". Replace")[0]
                text = re.sub(r"\d+(, \d+)+", "…", text.splitlines()[0])[:220]
                by_message.setdefault(text, []).append(f"`{row['model']}`")
        for text, models in by_message.items():
            lines.append(f"- {', '.join(models)}: {text}")
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--page", type=Path, help="write the results as a page, and verify nothing")
    parser.add_argument("--again", nargs="*", default=[], help="statuses to repeat")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", type=float, default=9.0, help="GiB per small network")
    parser.add_argument("--large-memory", type=float, default=20.0, help="GiB for a large one")
    parser.add_argument("--minutes", type=float, default=10.0, help="per network")
    args = parser.parse_args()

    names = [n for n in all_names() if any(fnmatch.fnmatch(n, pattern) for pattern in args.models)]
    rows: dict[str, dict[str, Any]] = {}
    if args.out.is_file():
        for line in args.out.read_text().splitlines():
            row = json.loads(line)
            rows[row["model"]] = row
    todo = [n for n in names if n not in rows or rows[n]["status"] in args.again]
    if args.page:
        args.page.write_text(page(list(rows.values())), encoding="utf-8")
        return
    counts = parameters_of(todo)
    todo.sort(key=lambda n: (counts[n] > LARGE, counts[n]))
    context = multiprocessing.get_context("fork")  # torch and timm are imported once
    running: dict[Any, tuple[str, Any, float]] = {}
    while todo or running:
        while todo and len(running) < args.workers:
            large = counts[todo[0]] > LARGE
            if large and running:
                break
            name = todo.pop(0)
            receive, send = context.Pipe(duplex=False)
            memory = args.large_memory if large else args.memory
            process = context.Process(
                target=child, args=(name, counts[name], memory, (os.cpu_count() or 1) if large else 1, send)
            )
            process.start()
            send.close()
            running[process] = (name, receive, time.monotonic())
            if large:
                break
        time.sleep(0.02)
        for process, (name, receive, started) in list(running.items()):
            seconds = time.monotonic() - started
            row = None
            if receive.poll():
                with contextlib.suppress(EOFError):
                    row = receive.recv()
            late = seconds > 60 * args.minutes
            if row is None and process.is_alive() and not late:
                continue
            if row is None:
                row = {"model": name, "family": family(name), "status": "out of time" if late else "out of memory"}
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
            del running[process]
            row |= {"parameters": counts[name], "seconds": round(seconds, 1)}
            rows[name] = row
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name:45s} {row['status']:14s} {row.get('error', '')} {row.get('message', '')[:230]}", flush=True)


if __name__ == "__main__":
    main()
