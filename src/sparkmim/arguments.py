"""Allowed values of the arguments of all commands, in one table."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparkmim.errors import UserError

LARGEST_SEED = 2**63 - 1


MAX_MEGAPIXELS = 100.0
"""Default of `max_megapixels`: a small file can claim a size that fills the memory."""


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the word that is most like another, if one is.

    Example:
        >>> nearest("tensorbord", ["csv", "tensorboard"])
        'tensorboard'
    """
    found = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=cutoff)
    return found[0] if found else None


def one_of(word: str, words: Sequence[str]) -> str:
    """Says which word may have been meant; all of them, if none is like it.

    Example:
        >>> one_of("adam", ["lamb", "adamw"]), one_of("sgd", ["lamb", "adamw"])
        ('did you mean adamw?', 'choose lamb or adamw')
    """
    if near := nearest(word, words, cutoff=0.7):
        return f"did you mean {near}?"
    return f"choose {listed(words, 'or')}" if len(words) > 1 else f"it takes {words[0]}"


def listed(words: Sequence[str], joint: str) -> str:
    """Returns words as a sentence has them.

    Example:
        >>> listed(["knn", "linear", "fewshot"], "or"), listed(["knn"], "or")
        ('knn, linear or fewshot', 'knn')
    """
    *others, last = words
    return f"{', '.join(others)} {joint} {last}" if others else last


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`.

    Attributes:
        low: smallest number.
        high: largest number.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
        whole: whether only whole numbers are allowed.
        hint: what special values mean, for the message.
    """

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    hint: str = ""

    def __call__(self, value: Any) -> str | None:
        """Tells what `value` must be, if it is not that."""
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            kind = "whole" if self.whole else "finite"
            return f"it must be a {kind} number{'' if self.low == -math.inf else f', {self}'}"
        if self.whole and value != int(value):
            return f"it must be a whole number, {self}"
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return None if low and high else f"it must be {self}"

    def __str__(self) -> str:
        least = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        if (self.low, self.high, self.whole) == (1, math.inf, True):
            said = "above 0"
        elif self.high == math.inf:
            said = least
        elif self.above or self.below:
            said = f"{least} and {'below' if self.below else 'at most'} {self.high:g}"
        else:
            said = f"between {self.low:g} and {'2^63 - 1' if self.high == LARGEST_SEED else f'{self.high:g}'}"
        return f"{said} ({self.hint})" if self.hint else said


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    words: tuple[str, ...]

    def __call__(self, value: Any) -> str | None:
        """Tells what `value` must be, if it is not that."""
        return None if value in self.words else one_of(str(value), self.words)


@dataclass(frozen=True)
class Several:
    """A list of values that each pass a check.

    Attributes:
        each: check of every value.
        counts: smallest and largest number of values.
        ascending: whether values must rise.
        alone: whether one value may stand without a list.
    """

    each: Range
    counts: tuple[int, int | None] = (1, None)
    ascending: bool = False
    alone: bool = False

    def __call__(self, value: Any) -> str | None:
        """Tells what `value` must be, if it is not that."""
        if self.alone and (isinstance(value, str) or not isinstance(value, Sequence)):
            return self.each(value)
        if isinstance(value, str) or not isinstance(value, Sequence):
            return f"it must be a list of numbers, each {self.each}"
        low, high = self.counts
        if not low <= len(value) or (high is not None and len(value) > high):
            wanted = f"{low} or more" if high is None else f"{low} to {high}"
            return f"it must have {wanted} values"
        complaints = [complaint for item in value if (complaint := self.each(item))]
        if complaints:
            return f"each of its values {complaints[0].removeprefix('it ')}"
        if self.ascending and any(a >= b for a, b in zip(value, value[1:], strict=False)):
            return "its values must rise"
        return None


Check = Callable[[Any], str | None]

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")
"""Names of loggers."""


def _loggers(value: Any) -> str | None:
    """Tells what a list of loggers must be, if it is not that; objects in it are Lightning's."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return "it must be a list"
    unknown = [item for item in value if isinstance(item, str | int | float | None) and item not in LOGGERS]
    return one_of(str(unknown[0]), LOGGERS) if unknown else None


COUNT = Range(1, whole=True)
WHOLE = Range(0, whole=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
SHARE_ABOVE_ZERO = Range(0, 1, above=True)
SHARE_INSIDE = Range(0, 1, above=True, below=True)
DECAY = Range(0, 1, below=True)
ANY = Range(-math.inf)

CHECKS: dict[str, Check] = {
    "accelerator": Choice(("auto", "cpu", "cuda")),
    "accumulate": COUNT,
    "axes": Range(1, 3, whole=True, hint="1 for signals, 2 for images, 3 for volumes"),
    "batch_size": COUNT,
    "beta1": DECAY,
    "beta2": DECAY,
    "channels": COUNT,
    "clip_grad": Range(0, hint="0 disables clipping"),
    "contrast": NOT_NEGATIVE,
    "crop": Range(0, 1, hint="a share of the image, 0 to resize it whole"),
    "crop_scale": SHARE_ABOVE_ZERO,
    "cutmix": NOT_NEGATIVE,
    "decoder_width": COUNT,
    "detect.crop": Choice(("none", "detr")),
    "detect.masks": lambda value: None if isinstance(value, bool) else "it must be true or false",
    "devices": lambda value: None if value == "auto" else COUNT(_number(value)),
    "draws": COUNT,
    "drop_factor": SHARE_ABOVE_ZERO,
    "drop_path": DECAY,
    "drops": Several(SHARE_INSIDE, counts=(0, None), ascending=True),
    "ema": Range(0, 1, below=True, hint="0 for no average, else a decay such as 0.999"),
    "epochs": POSITIVE,
    "erase": SHARE,
    "eval_crop": Range(0, 1, hint="0 to resize the whole image"),
    "eval_every": POSITIVE,
    "eval_short_side": COUNT,
    "evaluate.epochs": COUNT,
    "features.stages": Several(COUNT),
    "flip": SHARE,
    "frozen_stages": WHOLE,
    "ignore": Range(0, 2**16 - 1, whole=True),
    "image_size": Several(COUNT, counts=(1, 3), alone=True),
    "iterations": COUNT,
    "jitter": SHARE,
    "k": COUNT,
    "keep_every": COUNT,
    "layer_decay": Range(0, 1, above=True, hint="1 for none"),
    "learning_rate": POSITIVE,
    "limit": COUNT,
    "log_every": COUNT,
    "loggers": _loggers,
    "long_side": COUNT,
    "mask_ratio": Range(0, 1, above=True, below=True, hint="the paper's is 0.6"),
    "masks": COUNT,
    "max_megapixels": POSITIVE,
    "max_minutes": POSITIVE,
    "max_unreadable": SHARE,
    "mean": Several(ANY),
    "mixup": NOT_NEGATIVE,
    "num_nodes": COUNT,
    "optimizer": Choice(("lamb", "adamw")),
    "patch_size": COUNT,
    "picture_every": Range(0, whole=True, hint="0 for no pictures"),
    "port": Range(1, 2**16 - 1, whole=True),
    "precision": Choice(("auto", "bf16-mixed", "32-true")),
    "pretrain.val_split": Range(0, 1, below=True, hint="0 to train on all images"),
    "probe_every": POSITIVE,
    "protocol": Choice(("knn", "linear", "fewshot")),
    "regions": COUNT,
    "repeats": COUNT,
    "samples": COUNT,
    "save_minutes": POSITIVE,
    "schedule": Choice(("cosine", "linear")),
    "seed": Range(0, LARGEST_SEED, whole=True),
    "segment.crop": COUNT,
    "short_side": COUNT,
    "short_sides": Several(COUNT),
    "shots": Several(COUNT),
    "smoothing": DECAY,
    "stage": COUNT,
    "stages": COUNT,
    "std": Several(POSITIVE),
    "temperature": POSITIVE,
    "top": COUNT,
    "val_split": SHARE_INSIDE,
    "warmup_epochs": NOT_NEGATIVE,
    "warmup_iterations": WHOLE,
    "warmup_start": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "weight_decay_end": NOT_NEGATIVE,
    "workers": WHOLE,
}
"""Checks by the name of an argument; by `command.argument` where commands differ."""


def complaint_about(command: str, name: str, value: Any) -> str | None:
    """Tells what the value of a command's argument must be, if it is not that; None stands for an open decision."""
    check = CHECKS.get(f"{command}.{name}", CHECKS.get(name))
    return None if check is None or value is None else check(value)


def check_arguments(command: str, arguments: Mapping[str, Any]) -> None:
    """Checks all arguments of a command, before any work is done for it.

    Args:
        command: its name.
        arguments: by name; None where a decision is left open.

    Raises:
        UserError: if a value is out of its range.
    """
    for name, value in arguments.items():
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{name} is empty; leave it out, or give it a value")
        if complaint := complaint_about(command, name, value):
            raise UserError(f"{name} is {_shown(value)}; {complaint}")


def _number(value: Any) -> Any:
    """A number that stands in a text, as the shell gives it."""
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
