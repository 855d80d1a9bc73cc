"""Text as terminals, logs, pages and tables show it: nothing in a name is obeyed, or cannot be written."""

from __future__ import annotations

import os
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text


def printable(text: object) -> str:
    r"""Writes control characters, and bytes of file names that are no UTF-8, as `\x` and two digits for each byte.

    Example:
        >>> printable("a\nb"), printable(os.fsdecode(b"caf\xe9.jpg"))
        ('a\\x0ab', 'caf\\xe9.jpg')
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))


def written(name: str) -> str:
    r"""Writes a path for files of paths, so that it can be turned back: `printable`, with every other `\` doubled.

    Example:
        >>> path = os.fsdecode(b"caf\xe9/a\\b.jpg")
        >>> written(path)
        'caf\\xe9/a\\\\b.jpg'
        >>> os.fsdecode(written(path).encode().decode("unicode_escape").encode("latin-1")) == path
        True
    """
    return printable(name if os.sep == "\\" else name.replace("\\", "\\\\"))


def say(text: object, file: TextIO | None = None) -> None:
    """Prints lines, on stdout if no file is given."""
    print(*map(printable, str(text).split("\n")), sep="\n", file=file)


class Terminal(Console):
    """A console that prints text as it is: `[red]` and `:car:` are letters; what cannot be printed is escaped.

    Args:
        out: whether it is stdout rather than stderr.
        quiet: whether nothing is printed.
    """

    def __init__(self, out: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=not out, quiet=quiet, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes the text of a line, or of a cell of a table."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)
