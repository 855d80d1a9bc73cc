"""The command line, generated from the functions in `sparkmim.commands`."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from sparkmim import commands, results
from sparkmim._version import __version__
from sparkmim.allocator import keep_freed_memory
from sparkmim.errors import UserError
from sparkmim.runs.config import commented_yaml
from sparkmim.terminal import Terminal, printable, say
from sparkmim.training.recipes import RECIPES, notes_for
from sparkmim.trust import trusting
from sparkmim.words import PYTHON_ONLY, TRUST, TRUST_HELP, spell

COMMANDS: dict[str, Callable[..., Any]] = {
    "pretrain": commands.pretrain,
    "finetune": commands.finetune,
    "detect": commands.detect,
    "segment": commands.segment,
    "evaluate": commands.evaluate,
    "predict": commands.predict,
    "embed": commands.embed,
    "reconstruct": commands.reconstruct,
    "explain": commands.explain,
    "features": commands.features,
    "neighbors": commands.neighbors,
    "report": commands.report,
    "playground": commands.playground,
    "verify": commands.verify,
    "statistics": commands.statistics,
    "export": commands.export,
    "weights": commands.weights,
}

_PICTURES = ("reconstruct", "explain", "features", "neighbors")
"""Commands that draw a picture; the shell always writes it."""


class _Formatter(DefaultHelpFormatter):
    """Shows what the recipe decides as the default of an argument."""

    notes: Mapping[str, str] = {}

    def _expand_help(self, action: Any) -> str:
        shown = super()._expand_help(action)
        return shown.replace("default: null", f"default: {self.notes.get(action.dest, 'none')}")


class _Parser(ArgumentParser):
    """Parser of a command.

    Shows flags with dashes, as the shell expects them; both spellings are understood. Help and `--print_config` say
    what the recipe decides.
    """

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        shown = super().format_help(*args, **kwargs)
        return re.sub(r"--(?!print_config)[a-z]+(_[a-z]+)+", lambda flag: flag[0].replace("_", "-"), shown)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(message.split()))

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        values = {name: value for name, value in vars(cfg).items() if name != "config"}
        return commented_yaml(values, notes_for(self.prog.rpartition(" ")[2], values))


def build_parser() -> ArgumentParser:
    """Makes a parser with one subcommand per function and one flag per argument."""
    parser = _Parser(
        prog="sparkmim",
        description="Self-supervised pretraining of any convolutional network.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        defaults = {key: parameter.default for key, parameter in inspect.signature(function).parameters.items()}
        epilog = TRUST_HELP if {"weights", "resume"} & defaults.keys() else None
        sub = _Parser(prog=f"sparkmim {name}", description=summary, epilog=epilog)
        sub.add_argument("--config", action=ActionConfigFile, help="YAML file of arguments; a run's config.yaml is one")
        sub.add_function_arguments(function, skip={*PYTHON_ONLY}, as_group=False, fail_untyped=False)
        subcommands.add_subcommand(name, sub, help=summary)
        sub.formatter_class = type("_Formatter", (_Formatter,), {"notes": notes_for(name, defaults)})
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs a command. A user's error is one line on stderr and status 2; an interrupted run ends with status 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    token = trusting.set(TRUST in words)
    try:
        _main([word for word in words if word != TRUST])
    finally:
        trusting.reset(token)


def _main(given: Sequence[str]) -> None:
    try:
        words = spell(given, COMMANDS)
        config = build_parser().parse_args(words)
    except UserError as error:
        _refuse(given[0] if given and given[0] in COMMANDS else "", str(error))
    arguments = config[config.command]
    arguments.pop("config", None)
    if config.command in _PICTURES and arguments.out is None:
        arguments.out = f"{config.command}.png"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if config.command in RECIPES:
        keep_freed_memory()
    try:
        result = COMMANDS[config.command](**_explicit(vars(arguments), words))
    except UserError as error:
        _refuse(config.command, str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if config.command == "verify":
        say(f"{arguments.model}: {result.message}")
        raise SystemExit(0 if result.exact else 1)
    if config.command == "statistics":
        _say_statistics(result)
        return
    if config.command in ("evaluate", "predict", "embed"):
        _say_evaluation(result)
        return
    if config.command in _PICTURES:
        _say_picture(result)
        return
    if config.command == "report":
        say(result.out)
        return
    if config.command == "playground":
        return
    if config.command == "export":
        say(result.message)
        return
    if config.command == "weights":
        from sparkmim.interop.published import print_published

        print_published(result)
        return
    if not result.finished:
        raise SystemExit(130)


def _refuse(command: str, why: str) -> NoReturn:
    say(f"{f'sparkmim {command}'.rstrip()}: {why}", sys.stderr)
    raise SystemExit(2)


def _explicit(arguments: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments given explicitly; a resumed run takes the others from its folder."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(COMMANDS[words[0]]).parameters.items()}
    flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return {name: value for name, value in arguments.items() if name in flags or value != defaults[name]}


def _say_evaluation(result: Any) -> None:
    """Prints accuracies or the file written on stdout, and unreadable images on stderr."""
    if isinstance(result, results.EvaluationResult):
        Terminal(out=True).print(result.table())
        if result.out is not None:
            say(f"details in {result.out}", sys.stderr)
    elif isinstance(result, results.PredictResult):
        say(f"{result.out}: {result.images:,} images classified")
    else:
        say(f"{result.out}: float32 {list(result.shape)}, stage {result.stage}")
    _say_unreadable(result.unreadable)


def _say_picture(result: Any) -> None:
    """Prints the picture's path and numbers on stdout, and unreadable images on stderr."""
    if isinstance(result, results.ReconstructResult):
        losses = result.losses.reshape(len(result.names), -1).mean(1)
        for name, loss in zip(result.names, losses, strict=True):
            say(f"{printable(name)}: loss {loss:.4f}")
    elif isinstance(result, results.VanishingResult):
        say(f"share of positions that are not zero after {', '.join(map(str, result.layers))} layers:")
        for shape, shares in result.shares.items():
            for kind, of_layers in shares.items():
                say(f"  {shape}, {kind}: " + ", ".join(f"{share:.1%}" for share in of_layers))
        say(f"distance to the whole image, of the image and each stage of {result.network}:")
        for kind, distances in result.distances.items():
            say(f"  {kind}: " + ", ".join(f"{distance:.3f}" for distance in distances))
    elif isinstance(result, results.NeighborsResult):
        for query, found, cosines in zip(result.queries, result.neighbors, result.similarities, strict=True):
            say(printable(query))
            for path, cosine in zip(found, cosines, strict=True):
                say(f"  {cosine:.3f}  {printable(path)}")
    elif isinstance(result, results.FeaturesResult):
        for stage, share in result.explained.items():
            say(f"stage {stage}: three directions hold {share:.0%} of the variance")
    say(f"picture: {result.out}")
    _say_unreadable(result.unreadable)


def _say_unreadable(unreadable: Sequence[str]) -> None:
    """Prints images that were left out, on stderr."""
    if unreadable:
        from sparkmim.data.problems import counted

        lines = [f"{counted(len(unreadable), 'unreadable image')} left out:", *map(printable, unreadable)]
        print(*lines, sep="\n  ", file=sys.stderr)


def _say_statistics(found: Any) -> None:
    """Prints statistics as flags of `sparkmim pretrain` on stdout, and the number of samples on stderr."""
    for name in ("mean", "std"):
        say(f"--{name} '[{', '.join(f'{value:.6g}' for value in getattr(found, name))}]'")
    skipped = f"; {len(found.unreadable)} unreadable, the first: {found.unreadable[0]}" if found.unreadable else ""
    say(f"of {found.samples:,} samples{skipped}", sys.stderr)
