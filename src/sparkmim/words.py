"""The words of a command line: spelled as the parser takes them, and one sentence for each that is wrong.

Everything here is read off the commands' signatures and docstrings.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sparkmim.arguments import complaint_about, nearest, one_of
from sparkmim.errors import MissingPath, UserError
from sparkmim.runs.config import read_yaml

Command = Callable[..., Any]

POSITIONAL = {
    "pretrain": ("data",), "finetune": ("data",), "detect": ("data",), "segment": ("data",), "statistics": ("data",),
    "evaluate": ("weights",), "export": ("weights",), "playground": ("weights",), "verify": ("model",),
    "reconstruct": ("weights", "images"), "features": ("weights", "images"), "neighbors": ("weights", "query"),
    "predict": ("weights", "images"), "embed": ("weights", "images"), "explain": ("topic",), "report": ("run",),
}  # fmt: skip
"""Arguments that may be given without their flags, in this order."""

IMAGES_ALONE = ("predict", "embed")
"""Commands of which a single word without a flag names images."""

SEVERAL = {
    "reconstruct": ("images",), "explain": ("images",), "features": ("images",), "playground": ("images",),
    "neighbors": ("query", "data"), "detect": ("predict",), "segment": ("predict",),
}  # fmt: skip
"""Arguments that take several words, besides those whose type is a list."""

SYNONYMS = {
    "accelerator": ("device",), "batch_size": ("bs", "batch"), "data": ("dataset", "path"), "devices": ("gpus",),
    "ema": ("ema_decay",), "image_size": ("img_size", "input_size", "resolution", "size"), "images": ("image",),
    "init_weights": ("pretrained", "checkpoint", "ckpt"), "iterations": ("steps",), "k": ("neighbours", "neighbors"),
    "learning_rate": ("lr",), "model": ("arch", "backbone", "network"), "out": ("output", "output_dir"),
    "weight_decay": ("wd",), "weights": ("pretrained", "checkpoint", "ckpt"), "workers": ("num_workers",),
}  # fmt: skip
"""What others call arguments."""

PYTHON_ONLY = {"callbacks"}
"""Arguments that take objects."""

TRUST = "--trust"
"""Flag of every command that reads weights: run the code that they name."""

TRUST_HELP = (
    f"Code that weights name (FILE.py:FUNCTION) is run only if you have named it by --model before, or by {TRUST}."
)

ASKING = ("-h", "--help", "--print_config", "--print-config", "--version")
"""Flags that show something, and do nothing else."""


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        name: of the argument, as in Python.
        about: what it is, from the docstring.
        required: whether it must be given.
        choices: the words that it takes, if only some.
        switch: whether it may stand alone.
        several: whether it takes several words.
        alone: whether one of these may stand without a list.
        number: `int` or `float`, if its values are numbers.
        optional: whether it may be `null`.
    """

    name: str
    about: str
    required: bool
    choices: tuple[str, ...]
    switch: bool
    several: bool
    alone: bool
    number: type | None
    optional: bool

    @property
    def brief(self) -> str:
        """The first words of `about`, or the words that it takes."""
        if self.choices:
            return ", ".join(self.choices)
        return re.split(r"; |(, or)? \(|: ", self.about)[0]

    def __str__(self) -> str:
        return f"--{self.name.replace('_', '-')}"


@functools.cache
def flags_of(command: Command) -> dict[str, Flag]:
    """Returns the flags of a command by the names of its arguments."""
    about = dict(re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", command.__doc__ or "", re.MULTILINE))
    hints = get_type_hints(command)
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if name in PYTHON_ONLY:
            continue
        parts = _parts(hints[name])
        listed = [part for part in parts if get_origin(part) not in (None, Literal)]
        elements = {element for part in listed for element in get_args(part)} | {*parts}
        numbers = [kind for kind in (float, int) if kind in elements]
        found[name] = Flag(
            name,
            " ".join(about.get(name, "").split()),
            parameter.default is inspect.Parameter.empty,
            next((get_args(part) for part in parts if get_origin(part) is Literal), ()),
            bool in parts,
            bool(listed) or name in SEVERAL.get(command.__name__, ()),
            int in parts or str in parts,
            numbers[0] if numbers and str not in elements else None,
            types.NoneType in parts,
        )
    return found


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def spell(words: Sequence[str], commands: Mapping[str, Command]) -> list[str]:
    """Spells a command line as the parser takes it: `--name=value` for each argument, lists as JSON.

    `pretrain --image-size 96 160 --resume` becomes `pretrain --image_size=[96, 160] --resume=true`, and
    `embed photos/`, `embed --images=photos/`.

    Raises:
        UserError: if a word is wrong, or one is missing.
    """
    if not words:
        raise UserError("give a command, such as sparkmim pretrain; sparkmim --help explains them")
    name, *rest = words
    if name in ASKING:
        return list(words)
    if name not in commands:
        if asked := nearest(name.lstrip("-"), [word.lstrip("-") for word in ASKING if len(word) > 2], cutoff=0.7):
            raise UserError(f"there is no command {name!r}; did you mean --{asked}?")
        if name in ("-v", "-V"):
            raise UserError(f"there is no flag {name}; did you mean --version?")
        if name.startswith("-"):
            raise UserError(f"{name} comes before the command; write sparkmim pretrain {name}, or another command")
        near = nearest(name, commands)
        hint = f"did you mean {near}?" if near else "sparkmim --help lists them"
        raise UserError(f"there is no command {name!r}; {hint}")
    return [name, *_Words(name, commands).spell(rest)]


class _Words:
    """Spells what follows the name of a command."""

    def __init__(self, name: str, commands: Mapping[str, Command]) -> None:
        self.name = name
        self.commands = commands
        self.flags = flags_of(commands[name])
        self.positional = [self.flags[argument] for argument in POSITIONAL.get(name, ())]

    def spell(self, words: Sequence[str]) -> list[str]:
        spelled: list[str] = []
        given: set[str] = set()
        alone: list[str] = []
        before: Flag | None = None
        left = list(words)
        while left:
            word = left.pop(0)
            if word in ASKING:
                spelled.append(word.replace("-config", "_config"))
                given.update(self.flags)
            elif not word.startswith(("-", "–", "—")) or _is_number(word):
                if before is not None and (_is_number(word) or not self.positional):
                    raise UserError(f"{before} takes one value; {word!r} is one too many")
                alone.append(word)
            else:
                argument, value = self._flag(word, left)
                before = self.flags.get(argument)
                given |= check_config(self.name, value, self.flags) if argument == "config" else {argument}
                spelled.append(f"--{argument}={value}")
        for argument, value in self._placed(alone, given):
            given.add(argument)
            spelled.append(f"--{argument}={value}")
        for flag in self.flags.values():
            if flag.required and flag.name not in given:
                raise UserError(f"{flag} is missing ({flag.brief})")
        return spelled

    def _flag(self, word: str, left: list[str]) -> tuple[str, str]:
        """Returns the argument of a flag, and its value; takes the words of the value from those left."""
        if not word.isascii() and word.lstrip("–—-") != word.lstrip("-"):
            raise UserError(f"{word} begins with a long dash; write --{word.lstrip('–—-')}")
        if not word.startswith("--"):
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            known = name in self.flags
            hint = f"did you mean {self.flags[name]}?" if known else "flags begin with two dashes"
            raise UserError(f"there is no flag {word}; {hint}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == "config":
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else ""
            if not value:
                raise UserError("--config has no value (YAML file of arguments)")
            return name, value
        flag = self.flags.get(name)
        if flag is None:
            raise UserError(self._unknown(name, word.partition("=")[0]))
        if equals:
            values = [value]
        elif flag.switch:
            values = [left.pop(0)] if left and left[0].lower() in ("true", "false") else ["true"]
        else:
            values = []
            while left and not left[0].startswith("--") and (flag.several or not values):
                values.append(left.pop(0))
            if not values:
                raise UserError(f"{flag} has no value ({flag.brief})")
        return name, value_of(self.name, flag, values)

    def _unknown(self, name: str, written: str) -> str:
        """Says what may have been meant by a flag that the command has not."""
        if asked := nearest(written, ["--print_config", "--help", "--version", TRUST], cutoff=0.8):
            return (
                f"{asked} takes no value" if asked == written else f"there is no flag {written}; did you mean {asked}?"
            )
        plain = name.removeprefix("no_")
        meant = meant_by(plain, self.flags, cutoff=0.9)
        others = [other for other, command in self.commands.items() if name in flags_of(command)]
        if meant is None and others:
            have = f"{', '.join(others[:3])} {'has' if len(others) == 1 else 'have'} one"
            return f"{self.name} has no flag {written}; {have}"
        meant = meant or meant_by(plain, self.flags)
        if meant is None:
            return f"there is no flag {written}; sparkmim {self.name} --help lists its flags"
        off = "=false" if plain != name and self.flags[meant].switch else ""
        return f"there is no flag {written}; did you mean {self.flags[meant]}{off}?"

    def _placed(self, alone: Sequence[str], given: set[str]) -> list[tuple[str, str]]:
        """Returns the arguments of words that stand without a flag, and their values."""
        open_ = [flag for flag in self.positional if flag.name not in given]
        if self.name in IMAGES_ALONE and len(alone) == 1:
            open_ = [flag for flag in open_ if flag.name == "images"]
        placed = []
        rest = list(alone)
        for place, flag in enumerate(open_):
            if rest:
                last = place == len(open_) - 1
                values = rest if last and flag.several else rest[:1]
                rest = rest[len(values) :]
                placed.append((flag.name, value_of(self.name, flag, values)))
        if rest and self.positional:
            taker = self.positional[-1]
            if taker.several:
                raise UserError(f"{rest[0]!r} belongs to no flag; write it behind {taker}, which takes several")
            raise UserError(f"{taker} takes one value; {rest[0]!r} is one too many")
        if rest:
            raise UserError(f"{rest[0]!r} belongs to no flag; sparkmim {self.name} --help lists them")
        return placed


def meant_by(name: str, flags: Mapping[str, Flag], cutoff: float = 0.6) -> str | None:
    """Returns the argument that another name may mean."""
    for argument, others in SYNONYMS.items():
        if name in others and argument in flags:
            return argument
    return nearest(name, flags, cutoff)


def value_of(command: str, flag: Flag, values: Sequence[str]) -> str:
    """Returns the value of a flag as the parser takes it.

    Raises:
        UserError: if the flag does not take it.
    """
    if flag.optional and list(values) == ["null"]:
        return "null"
    if any(not value.strip() for value in values):
        raise UserError(f"{flag} is empty ({flag.brief})")
    shown = " ".join(values)
    if flag.switch or flag.choices:
        choices = flag.choices or ("true", "false")
        if shown not in choices and not (flag.switch and shown.lower() in choices):
            raise UserError(f"{flag} is {shown!r}; {one_of(shown, choices)}")
        return shown.lower() if flag.switch else shown
    items = _items(flag, values)
    found: Any = items if flag.several else items[0]
    if flag.alone and len(items) == 1 and not values[0].startswith("["):
        found = items[0]
    if complaint := complaint_about(command, flag.name, found):
        mistyped = flag.number and any(isinstance(item, str) for item in items)
        raise UserError(f"{flag} is {repr(shown) if mistyped or not flag.number else shown}; {complaint}")
    if isinstance(found, list):
        return json.dumps(found)
    return str(int(found)) if flag.number is int else shown


def _items(flag: Flag, values: Sequence[str]) -> list[Any]:
    """Returns numbers or texts, however they were written: `96 160`, `96x160`, `96,160` or `[96, 160]`."""
    items: Sequence[Any] = values
    if flag.several and len(values) == 1 and values[0].startswith("["):
        with suppress(yaml.YAMLError):
            read = read_yaml(values[0])
            items = read if isinstance(read, list) else values
    elif flag.several and flag.number:
        items = [item for value in values for item in re.split(r"(?<=\d)[,x×](?=[\d-])|,$", value) if item] or values
    return [_number(str(item)) if flag.number else str(item) for item in items]


def _number(text: str) -> Any:
    """Returns the number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_number(word: str) -> bool:
    return not isinstance(_number(word), str)


def check_config(command: str, path: str, flags: Mapping[str, Flag]) -> set[str]:
    """Checks a file of arguments; returns the names that it gives.

    Raises:
        MissingPath: if it does not exist.
        UserError: if it is not such a file, or has a name that the command has not.
    """
    file = Path(path).expanduser()
    if not path or not file.exists():
        raise MissingPath(f"--config is {path!r}; there is no such file")
    if not file.is_file():
        raise UserError(f"{path} is {'a folder' if file.is_dir() else 'no ordinary file'}; --config names a YAML file")
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it in that encoding") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not YAML; each line is an argument, such as epochs: 100") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no arguments; each line is one, such as epochs: 100")
    for name, value in content.items():
        flag = flags.get(name)
        if name == "config":
            raise UserError(f"{path} names another file of arguments; put all of them into one file")
        if flag is None:
            meant = meant_by(str(name), flags)
            hint = f"did you mean {meant}?" if meant and name != "trust" else f"sparkmim {command} --help lists them"
            raise UserError(f"{path}: there is no argument {name!r}; {hint}")
        if flag is not None and value is not None:
            try:
                value_of(command, flag, [value if isinstance(value, str) else json.dumps(value)])
            except (UserError, TypeError) as error:
                raise UserError(f"{path}: {error}") from None
    return {name for name, value in content.items() if value is not None}
