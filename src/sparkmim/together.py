"""Arguments that do not go together, or that are missing: told before a command imports anything that takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkmim.errors import UserError
from sparkmim.paths import INPUTS
from sparkmim.training.recipes import RECIPES, recipe_named


def check_together(command: str, arguments: Mapping[str, Any]) -> None:
    """Checks arguments of a command with each other. A run that is resumed knows those that are left out.

    Raises:
        UserError: if one is missing, or two do not go together.
    """
    if command not in RECIPES:
        return
    recipe_named(arguments["recipe"], RECIPES[command])
    if arguments["resume"]:
        return
    if command in ("pretrain", "finetune") and arguments["data"] is None:
        raise UserError(f"no data given; --data names {INPUTS[f'{command}.data'].what}")
    trains = not arguments.get("eval_only") and arguments.get("predict") is None
    if trains and arguments["model"] is None and arguments.get("weights", "none") in (None, "none"):
        raise UserError("no model given; --model names the network to train from scratch")
    if arguments.get("keep_best") == "probe" and arguments["probe"] is None:
        raise UserError("keep_best is probe, but there is none; name labelled images with --probe")
    mean, std = arguments["mean"], arguments["std"]
    if mean is not None and std is not None and len(mean) != len(std):
        raise UserError(f"mean has {len(mean)} values and std {len(std)}; both take one per channel")
