"""Settings of the four trainings, and how they are settled.

A setting is what was asked for; or else what a resumed run had settled before; or else what the recipe, the pretrained
weights or the machine say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from torch import nn

from sparkmim.errors import UserError
from sparkmim.files import are_paths
from sparkmim.interop.weights import Weights
from sparkmim.machine import settle_machine
from sparkmim.runs.config import ONCE, open_value
from sparkmim.training.recipes import recipe_named

MACHINE = ("accelerator", "devices", "num_nodes", "precision", "workers")
"""Settings that the machine decides where they are left open; a run resumed elsewhere decides them anew."""

OBJECTS = ("model", "data", "val_data", "probe")
"""Arguments that may be Python objects, which no file can hold."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that all trainings have; each is the settled argument of the same name (see `sparkmim.pretrain`)."""

    data: Any
    out: str
    model: str | nn.Module
    recipe: str
    feature_modules: list[str] | None
    drop_path: float | None
    epochs: float | None
    batch_size: int
    accumulate: int
    learning_rate: float
    weight_decay: float
    clip_grad: float
    ema: float
    mean: list[float] | None
    std: list[float] | None
    max_unreadable: float
    max_megapixels: float
    resume: bool
    accept_changed_data: bool
    seed: int
    accelerator: str
    devices: int
    num_nodes: int
    precision: str
    workers: int
    save_minutes: float
    max_minutes: float | None
    log_every: int
    loggers: list[str]

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({
        "data", "out", "max_unreadable", "max_megapixels", "save_minutes", "max_minutes", "log_every", "loggers", *ONCE,
        *MACHINE,
    })  # fmt: skip
    """Arguments that may differ when a run is resumed: where things are, and what computes."""

    @classmethod
    def command(cls) -> str:
        """Returns the name of the training."""
        return cls.__name__.removesuffix("Settings").lower()

    @property
    def model_name(self) -> str | None:
        """Name of the network; None for a module from Python."""
        return self.model if isinstance(self.model, str) else None

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """Settings of `sparkmim.pretrain`.

    `beta2`, `flip`, `mean`, `std` and `val_split` are None until network and data decide.
    """

    val_data: Any
    val_split: float | None
    probe: Any
    probe_every: float | None
    keep_best: Any
    keep_every: int | None
    init_weights: str | None
    image_size: int | list[int]
    patch_size: int | None
    channels: int
    stages: int | None
    mask_ratio: float
    decoder: Any
    decoder_width: int | None
    optimizer: str
    warmup_epochs: float
    beta1: float
    beta2: float | None
    weight_decay_end: float
    crop_scale: float
    flip: float | None
    jitter: float
    contrast: float
    channels_last: bool
    checkpoint_gradients: bool
    compile: bool
    picture_every: int

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainSettings.MAY_CHANGE | {
        "epochs", "val_data", "probe", "probe_every", "keep_best", "keep_every", "init_weights", "picture_every",
        "checkpoint_gradients", "compile",
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DownstreamSettings(TrainSettings):
    """Settings that trainings from pretrained weights have."""

    weights: str
    layer_decay: float
    flip: float
    eval_every: float

    MAY_CHANGE: ClassVar[frozenset[str]] = TrainSettings.MAY_CHANGE | {"weights"}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(DownstreamSettings):
    """Settings of `sparkmim.finetune`."""

    val_data: Any
    val_split: float | None
    freeze: bool
    fit_head: bool
    image_size: list[int]
    channels: int
    optimizer: str
    warmup_epochs: float
    beta1: float
    beta2: float
    loss: Any
    mixup: float
    cutmix: float
    smoothing: float
    repeats: int
    augment: Any
    erase: float
    crop_scale: float
    eval_crop: float
    channels_last: bool

    MAY_CHANGE: ClassVar[frozenset[str]] = DownstreamSettings.MAY_CHANGE | {"val_data"}


@dataclass(frozen=True, kw_only=True)
class PyramidSettings(DownstreamSettings):
    """Settings that detection and segmentation have, which put a feature pyramid on the encoder."""

    images: str | None
    val_images: str | None
    frozen_stages: int
    iterations: int | None
    warmup_iterations: int
    eval_short_side: int
    norm: Any

    MAY_CHANGE: ClassVar[frozenset[str]] = DownstreamSettings.MAY_CHANGE | {"images", "val_images"}


@dataclass(frozen=True, kw_only=True)
class DetectSettings(PyramidSettings):
    """Settings of `sparkmim.detect`; `masks` None until the annotations decide."""

    annotations: str | None
    val_annotations: str | None
    masks: bool | None
    warmup_start: float
    drops: list[float]
    drop_factor: float
    short_sides: list[int]
    long_side: int
    crop: Any
    box_head: Any
    regions: int

    MAY_CHANGE: ClassVar[frozenset[str]] = PyramidSettings.MAY_CHANGE | {"annotations", "val_annotations"}


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(PyramidSettings):
    """Settings of `sparkmim.segment`."""

    labels: str | None
    val_labels: str | None
    val_split: float | None
    classes: str | None
    ignore: int
    reduce_labels: bool
    channels: int
    schedule: Any
    short_side: int
    crop: int
    jitter: float

    MAY_CHANGE: ClassVar[frozenset[str]] = PyramidSettings.MAY_CHANGE | {"labels", "val_labels", "classes"}


KINDS: tuple[type[TrainSettings], ...] = (PretrainSettings, FinetuneSettings, DetectSettings, SegmentSettings)

S = TypeVar("S", bound=TrainSettings)


def settle(kind: type[S], asked: Mapping[str, Any], *known: Mapping[str, Any]) -> S:
    """Settles all settings of a training.

    Args:
        known: values that decide, in turn, what was left open, such as a recipe's.
    """
    machine = settle_machine(*(asked[name] for name in MACHINE))
    values = {}
    for field in fields(kind):
        name = field.name
        candidates = [machine] if name in machine else [asked, *known]
        found = (candidate.get(name) for candidate in candidates)
        values[name] = plain(next((value for value in found if value is not None), None))
    epochs, warmup = values.get("epochs"), values.get("warmup_epochs")
    if asked.get("warmup_epochs") is None and epochs and warmup and warmup >= epochs:
        values["warmup_epochs"] = epochs / 10  # a recipe's, in a shorter run than it was made for
    return kind(**values)


def picked(settings: TrainSettings, *names: str) -> dict[str, Any]:
    """Returns some settings by name."""
    return {name: getattr(settings, name) for name in names}


def plain(value: Any) -> Any:
    """Makes a path a string and a tuple a list, as files of settings hold them; other values stay."""
    if isinstance(value, Path):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, tuple) or are_paths(value) else value


def downstream_recipe(asked: Mapping[str, Any], recipes: Mapping[str, Any], start: Weights | None) -> dict[str, Any]:
    """Returns the values of the recipe asked for, without its length if another one was asked for.

    Raises:
        UserError: if there is no such recipe, or both `epochs` and `iterations` were asked for.
    """
    recipe = asdict(recipe_named(asked["recipe"], recipes))
    if start is None:
        recipe["layer_decay"] = 1.0  # decay spares what was learnt before; random layers must all learn
    given = [name for name in ("epochs", "iterations") if asked.get(name) is not None]
    if len(given) == 2:
        both = " and ".join(f"{name} {asked[name]}" for name in given)
        raise UserError(f"{both} both say how long to train; give one, and null for the other")
    return {name: value for name, value in recipe.items() if not given or name not in ("epochs", "iterations")}


def known_of(asked: Mapping[str, Any], before: Mapping[str, Any], start: Weights | None) -> dict[str, Any]:
    """Returns what pretrained weights say of network and images; refuses settings in which nobody names the network."""
    if start is None:
        if asked["model"] is None and before.get("model") is None:
            raise UserError("no model given; --model names the network to train from scratch")
        return {}
    names = ["channels", "image_size", "feature_modules"]
    if asked.get("channels", 3) in (None, start.channels):
        names += ["mean", "std"]  # which are of those channels
    known = {name: getattr(start.metadata, name) for name in names}
    return known if asked["model"] is not None else {**known, "model": start.model}


# Resuming


def check_saved(kind: type[TrainSettings], saved: Mapping[str, Any], file: Path) -> None:
    """Checks that the arguments of a run that is resumed are those of such a training, and texts where they must be.

    Raises:
        UserError: if they are not.
    """
    known = {other: {field.name for field in fields(other)} for other in KINDS}
    if len(known[kind] & saved.keys()) < len(known[kind]) / 4:
        raise UserError(f"{file} cannot be read as the settings of a run; repair it, or name another run")
    nearest = max(known, key=lambda other: len(known[other] & saved.keys()) - len(known[other] - saved.keys()))
    if nearest is not kind:
        raise UserError(f"{file.parent} holds a run of {nearest.command()}, not of {kind.command()}; continue it with "
                        f"sparkmim {nearest.command()} --resume")  # fmt: skip
    hints = get_type_hints(kind)
    for name, value in saved.items():
        text = set(get_args(hints.get(name, int))) or {hints.get(name)}
        if isinstance(value, int | float | dict) and (name in OBJECTS or text <= {str, type(None), nn.Module}):
            raise UserError(f"{name} is {value!r} in {file}; it must be text")


def resumed(
    kind: type[TrainSettings],
    asked: Mapping[str, Any],
    given: frozenset[str],
    saved: Mapping[str, Any],
    settled: Mapping[str, Any],
    objects: Sequence[str],
) -> dict[str, Any]:
    """Returns the arguments of a run that is resumed: those saved, except what is given anew and may change.

    Args:
        given: names of the arguments passed explicitly.
        objects: names of arguments that were Python objects, which no file can hold.

    Raises:
        UserError: if a given argument differs and may not, or an object is missing.
    """
    free = kind.MAY_CHANGE | set(objects)
    given = frozenset(name for name in given & asked.keys() if not open_value(name, asked[name]))
    clash = []
    for name in (name for name in asked if name in given - free):
        before = settled.get(name) if open_value(name, saved.get(name)) else saved.get(name)
        if not _same(asked[name], before):
            clash.append(f"{name} is {before} there and {plain(asked[name])} here")
    if clash:
        raise UserError(
            f"the run in {asked['out']} has other settings: {', '.join(clash)}; leave them out to resume it"
        )
    if missing := sorted(set(objects) - given):
        names = ", ".join(missing)
        raise UserError(f"the run in {asked['out']} was started from Python objects; pass {names} again to resume")
    left_open = {name for name, value in asked.items() if value is None} | set(objects) | given
    kept = {name: value for name, value in saved.items() if name in asked and (value is not None or name in left_open)}
    lost = {name: value for name, value in settled.items() if name in asked and name not in {*saved, *MACHINE, *ONCE}}
    changed = {name: asked[name] for name in given & free}
    return {**asked, **lost, **kept, **changed, "out": asked["out"], "resume": True}


def _same(given: Any, saved: Any) -> bool:
    if isinstance(given, int) and isinstance(saved, list):
        return saved == [given] * len(saved)
    return bool(given == saved or plain(given) == saved or str(given) == str(saved))
