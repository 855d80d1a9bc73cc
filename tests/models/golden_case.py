"""The cases of `tests/golden/spark_reference.json`: their inputs, and all the numbers that a model makes of them.

The inputs are made with NumPy, whose `sin` and `**` the golden numbers were computed from; PyTorch's differ in the
last digit.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.optim
import torch
from torch import Tensor

from sparkmim.interop import official
from sparkmim.models import SparK

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = {
    case["arch"]: case for case in json.loads((GOLDEN / "spark_reference.json").read_text())
}

Numbers = dict[str, float]


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    values = np.sin(0.7 * np.arange(math.prod(shape)) + zlib.crc32(name.encode()) % 1000)
    return torch.from_numpy(values).view(shape)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of an original parameter or buffer: the first rule that matches counts."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_var"):
        return 1 + 0.2 * wave(name, shape)
    if name.endswith("running_mean"):
        return 0.1 * wave(name, shape)
    if name.startswith("mask_tokens."):
        return 0.5 * wave(name, shape)
    if name.endswith(".gamma"):
        return 0.5 + 0.1 * wave(name, shape)
    if len(shape) >= 2:
        return wave(name, shape) * math.sqrt(2 / math.prod(shape[1:]))
    if name.endswith(".weight"):
        return 1 + 0.1 * wave(name, shape)
    return 0.1 * wave(name, shape)


def images_of(case: dict[str, Any]) -> Tensor:
    batch, size = case["batch"], case["image_size"]
    values = np.sin(0.05 * np.arange(batch * 3 * size * size) ** 1.1)
    return torch.from_numpy(values).view(batch, 3, size, size)


def mask_of(case: dict[str, Any]) -> Tensor:
    """By its rule: the patches with the smallest checksums are visible."""
    cells = case["image_size"] // 32
    visible = torch.zeros(case["batch"], cells * cells, dtype=torch.bool)
    for sample in range(case["batch"]):
        order = sorted(range(cells * cells), key=lambda i: zlib.crc32(f"{sample},{i}".encode()))
        visible[sample, order[: case["visible"]]] = True
    return visible.view(-1, cells, cells)


def build(case: dict[str, Any]) -> SparK:
    if case["arch"] == "convnext_tiny_test":
        encoder = timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), num_classes=0)
    else:
        encoder = timm.create_model(case["arch"], num_classes=0)
    model = SparK(encoder, case["image_size"], decoder_width=case["decoder_width"]).double()
    official.load_into(model, {name: tensor(name, tuple(shape)) for name, shape in case["parameters"].items()})
    return model


Change = Callable[[SparK], None]


def one_pass(case: dict[str, Any], dtype: torch.dtype, change: Change = lambda model: None) -> Numbers:
    """Features, loss, gradients and running statistics of one step, and the evaluation; `change` alters the weights."""
    images, visible = images_of(case).to(dtype), mask_of(case)
    model = build(case).to(dtype)
    change(model)
    untouched = copy.deepcopy(model)  # its running statistics are those of the start
    found: Numbers = {}
    with torch.no_grad():
        maps = copy.deepcopy(model).encode(images, visible)
    for stage, map_ in enumerate(maps):
        found[f"feature {stage} sum"], found[f"feature {stage} norm"] = _sum_and_norm(map_)

    out = model(images, visible)
    out.loss.backward()
    found["loss"] = out.loss.item()
    for name, parameter in model.named_parameters():
        if name not in model.unreached_parameters:
            assert parameter.grad is not None, name
            found[f"grad {name}"] = parameter.grad.double().norm().item()
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            found[f"buffer {name} sum"], found[f"buffer {name} norm"] = _sum_and_norm(buffer)

    with torch.no_grad():
        out = untouched.eval()(images, visible)
    pixels = visible.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    found["eval loss"] = out.loss.item()
    found["eval masked sum"], found["eval masked norm"] = _sum_and_norm(images * pixels)
    found["eval pasted sum"], found["eval pasted norm"] = _sum_and_norm(out.reconstruction)
    return found


def _sum_and_norm(x: Tensor) -> tuple[float, float]:
    return x.double().sum().item(), x.double().norm().item()


def golden_pass(case: dict[str, Any]) -> Numbers:
    """What `one_pass` should give, under our names."""
    numbers: Numbers = {"loss": case["loss"], "eval loss": case["eval"]["loss"]}
    for stage, feature in enumerate(case["features"]):
        numbers[f"feature {stage} sum"], numbers[f"feature {stage} norm"] = feature["sum"], feature["norm"]
    for name, norm in case["grad_norm"].items():
        numbers[f"grad {official.parameter_name(name)}"] = norm
    for name, pair in case["buffers_after"].items():
        ours = official.parameter_name(name)
        numbers[f"buffer {ours} sum"], numbers[f"buffer {ours} norm"] = pair
    for ours, theirs in (("masked", "masked_input"), ("pasted", "reconstruction_pasted")):
        numbers[f"eval {ours} sum"], numbers[f"eval {ours} norm"] = case["eval"][theirs]
    return numbers


def training(case: dict[str, Any], dtype: torch.dtype, change: Change = lambda model: None) -> Numbers:
    """Six steps of LAMB: the loss of each, and what became of the parameters."""
    recipe = case["training"]
    images, visible = images_of(case).to(dtype), mask_of(case)
    model = build(case).to(dtype)
    change(model)
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        # None on biases, norms, mask tokens and layer scale.
        decays = parameter.ndim > 1 and not name.endswith(("mask_token", "gamma"))
        (decayed if decays else others).append(parameter)
    optimiser = timm.optim.Lamb(
        [{"params": decayed}, {"params": others}],
        betas=tuple(recipe["betas"]),
        max_grad_norm=recipe["max_grad_norm"],
    )
    found: Numbers = {}
    for step, (rate, decay) in enumerate(recipe["lr_wd"]):
        for group, share in zip(optimiser.param_groups, (1.0, 0.0), strict=True):
            group["lr"], group["weight_decay"] = rate, decay * share
        loss = model((1 + 0.1 * step) * images, visible.roll(step, -1)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found[f"loss {step}"] = loss.item()
    for name, parameter in model.named_parameters():
        if name not in model.unreached_parameters:
            found[f"parameter {name}"] = parameter.detach().double().norm().item()
    return found


def golden_training(case: dict[str, Any]) -> Numbers:
    recipe = case["training"]
    numbers = {f"loss {step}": loss for step, loss in enumerate(recipe["losses"])}
    for name, norm in recipe["final_param_norm"].items():
        numbers[f"parameter {official.parameter_name(name)}"] = norm
    return numbers


def one_ulp(seed: int) -> Change:
    """Moves every weight to a neighbouring floating-point number, up or down at random."""

    def change(model: SparK) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                up = torch.rand(parameter.shape, generator=generator) < 0.5
                infinity = torch.full_like(parameter, math.inf)
                parameter.copy_(torch.nextafter(parameter, torch.where(up, infinity, -infinity)))

    return change
