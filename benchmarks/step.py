"""Cost of a pretraining step, and of its parts: masked dense, as other implementations run it, against sparkmim.

    python benchmarks/step.py --json benchmarks/results/step.json

A step is forward and backward of `SparK`, without the optimiser. "Masked dense" computes encoder, densify and decoder
on whole maps, with every layer of the encoder masked: in PyTorch's default memory format, as other implementations ship
it, and in channels-last. `--ways` also takes sparkmim with an option. All ways take turns, round by round; the best
round counts. Peak memory is that of one step above what the process held before it: weights and optimiser state are not
counted, gradients are. Each way is measured in a process of its own (CPU), or by the allocator (CUDA). Freed memory is
kept for the next step, as in training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from masked_dense import decode_dense, densify_dense, encode_dense
from measure import Step, peak_memory, provenance, take_turns
from sparkmim import SparK
from sparkmim.machine import has_bfloat16, keep_freed_memory
from sparkmim.models.spark import reconstruction_loss
from sparkmim.sparse import PatchLayout, pack

NCHW, CHANNELS_LAST, OURS = WAYS = ("masked dense", "masked dense, channels-last", "sparkmim")
SAVING, COMPILED = OPTIONS = ("sparkmim, checkpoint-gradients", "sparkmim, compile")
PARTS = ("step", "encoder", "densify", "decoder")
CASES = (("resnet50", 768), ("resnet50", 256), ("convnext_small", 768))


class Work:
    """A model with a batch of images and a mask, and the ways to compute it."""

    def __init__(
        self, way: str, name: str, width: int, bfloat16: bool, device: str, batch: int, size: int, mask_ratio: float
    ) -> None:
        torch.manual_seed(0)
        memory_format = torch.contiguous_format if way == NCHW else torch.channels_last
        self.dense = way in (NCHW, CHANNELS_LAST)
        model = SparK(name, size, mask_ratio, decoder_width=width, checkpoint_gradients=way == SAVING)
        self.model = model.to(device, memory_format=memory_format)
        self.compute = torch.compile(self.model.forward, dynamic=False) if way == COMPILED else self.model
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=bfloat16)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.images = torch.randn(batch, 3, size, size, device=device).to(memory_format=memory_format)
        self.visible = self.model.draw_visible(batch, torch.Generator().manual_seed(0))
        self.layout = PatchLayout(self.visible, self.images.device)
        hierarchy = self.model.hierarchy
        shapes = [(batch, c, size // s, size // s) for c, s in zip(hierarchy.channels, hierarchy.strides, strict=True)]
        widths = [self.model.decoder.width_at(stride) for stride in hierarchy.strides]
        self.maps, self.maps_grads, self.dense_maps, self.dense_grads = (
            [
                torch.randn(b, width or c, h, w, device=device, dtype=dtype).to(memory_format=memory_format)
                for (b, c, h, w), width in zip(shapes, each, strict=True)
            ]
            for each in ([None] * len(shapes), [None] * len(shapes), widths, widths)
        )

    def encode(self) -> list[Tensor]:
        """Returns dense maps `[B, C_i, H_i, W_i]`, zero where masked; packed ones for sparkmim."""
        if self.dense:
            return encode_dense(self.model, self.images, self.layout)
        return self.model.encode_packed(self.images, self.visible)

    def densify(self, maps: Iterable[Tensor]) -> list[Tensor]:
        """Returns dense maps `[B, D_i, H_i, W_i]` of the decoder's width."""
        if self.dense:
            return densify_dense(self.model, maps, self.layout)
        return [densify(map_) for densify, map_ in zip(self.model.densify, maps, strict=True)]

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Returns the prediction `[B, 3, H, W]`."""
        return decode_dense(self.model, maps) if self.dense else self.model.decoder(maps)

    def step(self) -> None:
        if self.dense:
            with self.autocast():
                prediction = self.decode(self.densify(self.encode()))
            loss = reconstruction_loss(prediction, self.images, self.layout)
        else:
            with self.autocast():
                loss = self.compute(self.images, self.visible).loss
        loss.backward()
        self.model.zero_grad(set_to_none=True)

    def part(self, name: str) -> Step:
        """Returns a part, forward and backward, ready to be called."""

        def encoder() -> None:
            with self.autocast():
                found = self.encode()
            grads = self.maps_grads
            if not self.dense:
                found, grads = [map_.values for map_ in found], [pack(grad, self.layout).values for grad in grads]
            self.backward(found, grads)

        def densify() -> None:
            leaves = [map_.requires_grad_() for map_ in self.maps]
            with self.autocast():
                found = self.densify(leaves if self.dense else [pack(map_, self.layout) for map_ in leaves])
            self.backward(found, self.dense_grads, leaves)

        def decoder() -> None:
            leaves = [map_.requires_grad_() for map_ in self.dense_maps]
            with self.autocast():
                prediction = self.decode(leaves)
            loss = reconstruction_loss(prediction, self.images, self.layout)
            self.backward([loss], [torch.ones_like(loss)], leaves)

        return {"step": self.step, "encoder": encoder, "densify": densify, "decoder": decoder}[name]

    def backward(self, found: list[Tensor], grads: list[Tensor], leaves: Iterable[Tensor] = ()) -> None:
        torch.autograd.backward(found, [grad.to(map_.dtype) for grad, map_ in zip(grads, found, strict=True)])
        self.model.zero_grad(set_to_none=True)
        for leaf in leaves:
            leaf.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [f"{name}:{width}" for name, width in CASES]
    parser.add_argument("--cases", nargs="+", default=cases, help="NETWORK:DECODER_WIDTH")
    parser.add_argument("--precisions", nargs="+", help="default: float32, and bfloat16 where the hardware has it")
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, *OPTIONS), default=WAYS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=3, metavar=("WAY", "CASE", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = (args.device, args.batch, args.size, args.mask_ratio)

    def work(way: str, case: str, precision: str) -> Work:
        name, _, width = case.partition(":")
        return Work(way, name, int(width), precision == "bfloat16", *shape)

    if args.memory_of:
        print(peak_memory(work(*args.memory_of).step, args.device))
        return
    keep_freed_memory()
    precisions = args.precisions or ["float32", *(["bfloat16"] if has_bfloat16(args.device) else [])]

    rows = []
    for case, precision in itertools.product(args.cases, precisions):
        ways = {way: work(way, case, precision) for way in args.ways}
        steps = {(way, part): made.part(part) for way, made in ways.items() for part in PARTS}
        seconds = take_turns(steps, args.rounds)
        steps.clear()
        ways.clear()
        for way in args.ways:
            command = [sys.executable, *sys.argv, "--memory-of", way, case, precision]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append({
                "case": case, "precision": precision, "way": way,
                "seconds": {part: seconds[way, part] for part in PARTS},
                "peak_bytes": float(found.strip().splitlines()[-1]),
            })  # fmt: skip
            base = next(r for r in rows if (r["case"], r["precision"]) == (case, precision))
            rows[-1]["speedup"] = base["seconds"]["step"] / rows[-1]["seconds"]["step"]
            rows[-1]["memory_ratio"] = rows[-1]["peak_bytes"] / base["peak_bytes"]

        print(f"{case} in {precision}: {rows[-1]['seconds']['step']:.2f} s, {rows[-1]['speedup']:.2f}", file=sys.stderr)
        if args.json:  # after each case, as all of them take a while
            settings = {name: getattr(args, name) for name in ("batch", "size", "mask_ratio", "rounds")}
            args.json.write_text(json.dumps({**provenance(args.device), **settings, "rows": rows}, indent=2) + "\n")

    table = Table("network:width", "precision", "way", *PARTS, "speed-up", "peak memory", "of the first")
    for row in rows:
        table.add_row(
            row["case"], row["precision"], row["way"], *(f"{row['seconds'][part]:.2f} s" for part in PARTS),
            f"{row['speedup']:.2f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB", f"{row['memory_ratio']:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
