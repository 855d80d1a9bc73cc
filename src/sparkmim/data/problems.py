"""Collects problems of annotated data, and reports them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkmim.errors import UserError


@dataclass
class Problems:
    """Problems of a data set, a line each.

    Attributes:
        fatal: what makes the data unusable.
        notes: what is only worth knowing.
    """

    fatal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, what: object) -> list[str]:
        """Returns the notes, unless a problem is fatal.

        Args:
            what: name of the data in the message.

        Raises:
            UserError: if a problem is fatal; lists all problems.
        """
        if self.fatal:
            lines = [f"{what} cannot be used as it is:", *(f"- {line}" for line in self.fatal)]
            if self.notes:
                lines += ["and worth knowing:", *(f"- {line}" for line in self.notes)]
            raise UserError("\n".join(lines))
        return self.notes


def counted(number: int, word: str, words: str | None = None) -> str:
    """Writes a number with its noun.

    Args:
        number: how many.
        word: the singular.
        words: the plural; None for the singular with an s.

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
    return ", ".join(map(str, items[:most])) + (", …" if len(items) > most else "")
