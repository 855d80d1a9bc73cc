"""Collects problems of annotated data, and reports them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkmim.errors import UserError
from sparkmim.terminal import Terminal, printable


@dataclass
class Problems:
    """Problems of a data set, a line each: those that make it unusable, and what is only worth knowing."""

    fatal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, what: object) -> list[str]:
        """Returns the notes; raises a `UserError` that lists all problems of `what` if one is fatal."""
        if self.fatal:
            lines = [f"{what} cannot be used as it is:", *(f"- {line}" for line in self.fatal)]
            if self.notes:
                lines += ["and worth knowing:", *(f"- {line}" for line in self.notes)]
            raise UserError("\n".join(lines))
        return self.notes


def counted(number: int, word: str, words: str | None = None) -> str:
    """Writes a number with its noun, whose plural is `words`, or the singular with an s.

    Example:
        >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
        ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {word if number == 1 else words or f'{word}s'}"


def few(items: Sequence[Any], most: int = 3) -> str:
    """Lists the first items.

    Example:
        >>> few("abcde")
        'a, b, c, …'
    """
    return ", ".join(map(printable, items[:most])) + (", …" if len(items) > most else "")


def print_notes(console: Terminal, notes: Sequence[str]) -> None:
    """Prints what is noteworthy about data without being an error."""
    for note in notes:
        console.print("note: ", end="", style="yellow")
        console.print(note)


def report(lines: list[str], items: Sequence[Any], what: str, word: str, words: str | None = None) -> None:
    """Adds a line that counts the items and lists the first, if there are any."""
    if items:
        lines.append(f"{counted(len(items), word, words)} {what}: {few(items)}")


def repeated(items: Iterable[Any]) -> list[Any]:
    """Returns the items that occur more than once."""
    return [item for item, count in Counter(items).items() if count > 1]
