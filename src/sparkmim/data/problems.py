"""What is wrong with annotated data, collected so that it can be told all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkmim.errors import UserError


@dataclass
class Findings:
    """What must be mended before data can be used, and what is only worth knowing; a line each."""

    fatal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, what: object) -> list[str]:
        """The notes.

        Args:
            what: the data, as messages call them.

        Raises:
            ValueError: if something is fatal, with all of it and the notes.
        """
        if self.fatal:
            lines = [f"{what} cannot be used as it is:", *(f"- {line}" for line in self.fatal)]
            if self.notes:
                lines += ["and worth knowing:", *(f"- {line}" for line in self.notes)]
            raise UserError("\n".join(lines))
        return self.notes


def counted(number: int, word: str, words: str | None = None) -> str:
    """A number of things.

    Example:
        >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
        ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {word if number == 1 else words or f'{word}s'}"


def few(items: Sequence[Any], most: int = 3) -> str:
    """The first of them.

    Example:
        >>> few("abcde")
        'a, b, c, …'
    """
    return ", ".join(map(str, items[:most])) + (", …" if len(items) > most else "")
