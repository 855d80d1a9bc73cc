"""What only a GPU can show, in one run of a few minutes: correctness, step times, throughput, memory, profile.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Sections run in turn until `--minutes` are over; those left out are named. With `--device cpu` and small sizes, it tests
itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from measure import peak_memory, provenance, take_turns
from sparkmim import SparK
from sparkmim.models import Hierarchy, create_encoder, random_visible
from sparkmim.sparse import PatchLayout, mask_map, pack, unpack
from step import OURS, PARTS, WAYS, Work

FAMILIES = ("resnet18", "convnext_atto", "efficientnet_b0", "regnety_002", "mobilenetv3_small_050", "densenet121",
            "vgg11_bn", "resnetv2_50", "hrnet_w18_small", "ghostnet_050")  # fmt: skip
"""One network per family."""

SECTIONS = ("correctness", "steps", "profile", "compiled", "sync_batch_norm", "throughput")


class Bench:
    """The sections; each returns what goes into the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.size, self.batch, self.rounds = args.device, args.size, args.batch, args.rounds
        self.networks, self.families, self.width = args.networks, args.families, args.width

    def correctness(self) -> dict[str, Any]:
        """Packed against masked dense: relative errors of the maps, and of the gradient of all parameters together."""
        found: dict[str, Any] = {}
        for name in self.families:
            for precision in ("float32", "bfloat16"):
                try:
                    found[f"{name} {precision}"] = self.errors(name, precision == "bfloat16")
                except RuntimeError as error:
                    found[f"{name} {precision}"] = f"failed: {error}"
        return found

    def errors(self, name: str, bfloat16: bool) -> dict[str, float]:
        torch.manual_seed(0)
        hierarchy = Hierarchy(create_encoder(name)).to(self.device)
        size = 3 * hierarchy.patch_unit
        images = torch.randn(2, 3, size, size, device=self.device)
        visible = random_visible(2, (3, 3), 0.5, torch.Generator().manual_seed(0))
        layout = PatchLayout(visible, images.device)

        def run(packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(1)
            hierarchy.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=bfloat16):
                if packed:
                    maps = [unpack(map_) for map_ in hierarchy(pack(images, layout))]
                else:
                    maps = [map_.values for map_ in hierarchy(mask_map(images, layout))]
            torch.stack([map_.float().square().mean() for map_ in maps]).sum().backward()
            grads = [p.grad.flatten() for p in hierarchy.parameters() if p.grad is not None]
            return torch.cat([map_.detach().float().flatten() for map_ in maps]), torch.cat(grads)

        pairs = zip(run(packed=True), run(packed=False), strict=True)
        maps, grads = (float((one - other).norm() / other.norm()) for one, other in pairs)
        return {"maps": maps, "gradient": grads}

    def steps(self) -> dict[str, Any]:
        """Seconds and peak bytes of a step and its parts, as in `benchmarks/step.py`."""
        found: dict[str, Any] = {}
        for name in self.networks:
            for bfloat16 in (False, True):
                for way in WAYS:
                    made = Work(way, name, self.width, bfloat16, self.device, self.batch, self.size, 0.6)
                    seconds = take_turns({part: made.part(part) for part in PARTS}, self.rounds)
                    peak = peak_memory(made.step, self.device)
                    key = f"{name} {'bfloat16' if bfloat16 else 'float32'} {way}"
                    found[key] = {"seconds": seconds, "peak_bytes": peak}
        return found

    def throughput(self) -> dict[str, Any]:
        """Images per second at the largest batch that fits, found by doubling."""
        found: dict[str, Any] = {}
        for name in self.networks:
            for way in WAYS:
                batch, best = self.batch, {"batch": 0, "images_per_second": 0.0}
                while True:
                    try:
                        step = Work(way, name, self.width, True, self.device, batch, self.size, 0.6).step
                        seconds = take_turns({"step": step}, 2)["step"]
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
                        break
                    best = {"batch": batch, "images_per_second": batch / seconds}
                    if self.device == "cpu":
                        break
                    batch *= 2
                found[f"{name} {way}"] = best
        return found

    def compiled(self) -> dict[str, Any]:
        """Seconds of a step with the decoder eager and under torch.compile, in bfloat16."""
        eager, compiled = (
            Work(OURS, self.networks[0], self.width, True, self.device, self.batch, self.size, 0.6) for _ in range(2)
        )
        compiled.model.decoder.compile()
        begun = time.perf_counter()
        compiled.step()
        first = time.perf_counter() - begun
        return {**take_turns({"eager": eager.step, "compiled": compiled.step}, self.rounds), "first": first}

    def sync_batch_norm(self) -> dict[str, float]:
        """Difference of the loss with SyncBatchNorm in a group of one process."""
        torch.manual_seed(0)
        model = SparK(self.families[0], self.size, decoder_width=64).to(self.device)
        images = torch.randn(4, 3, self.size, self.size, device=self.device)
        visible = model.draw_visible(4, torch.Generator().manual_seed(0))
        plain = model(images, visible).loss.item()
        with tempfile.TemporaryDirectory() as folder:
            torch.distributed.init_process_group("nccl", f"file://{folder}/store", world_size=1, rank=0)
            try:
                synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)(images, visible).loss
                synced.backward()
            finally:
                torch.distributed.destroy_process_group()
        return {"plain": plain, "synced": synced.item()}

    def profile(self) -> str:
        """Where the time of a step goes, by operation."""
        made = Work(OURS, self.networks[0], self.width, True, self.device, self.batch, self.size, 0.6)
        made.step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.device == "cuda" else []
        with torch.profiler.profile(activities=activities) as profiler:
            made.step()
        by = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "convnext_small"])
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the script with --device cpu --batch 2 --size 64 --width 64")
    # Packed and dense are compared in true float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    end = time.monotonic() + 60 * args.minutes
    bench = Bench(args)
    report: dict[str, Any] = provenance(args.device)
    for name in args.sections:
        section = getattr(bench, name)
        try:
            report[name] = section() if time.monotonic() < end else "left out: no time"
        except Exception:  # the other sections are worth having
            report[name] = traceback.format_exc()
        shown = report[name] if isinstance(report[name], str) else json.dumps(report[name], indent=1)
        Console(width=160, highlight=False).print(f"{name}:", shown, markup=False)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
