"""Code that weights or runs name, as `path/to/file.py:factory`. It is run only if the user has named the same code.

What the user passes as `model` is remembered by the digest of its file and the function's name, in a folder of the
user's own, which no weight file or run folder can write to. Weights may then name that function, wherever its file
lies; any other is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path

from sparkmim.errors import UserError
from sparkmim.files import replacing

trusting: ContextVar[bool] = ContextVar("trusting", default=False)
"""Whether any code is run (`--trust`)."""


def remember(name: str) -> None:
    """Remembers code that is about to be run, because the user has named it; not code that is trusted but once."""
    if trusting.get():
        return
    digest = _digest(name)
    known = _known()
    if digest is not None and digest not in known:
        with suppress(UserError, OSError), replacing(_memory()) as partial:  # without a place for it, it asks again
            partial.write_text(json.dumps({**known, digest: name}, indent=1) + "\n", encoding="utf-8")


def check_trusted(name: object, whose: str) -> None:
    """Checks that the user has named the code that something else names.

    Args:
        name: `path/to/file.py:factory`; other names of networks pass.
        whose: what names it, for the message.

    Raises:
        UserError: if it would run other code.
    """
    if not isinstance(name, str) or ".py:" not in name or trusting.get():
        return
    digest = _digest(name)
    if digest is not None and digest not in _known():
        raise UserError(
            f"{whose} would run code that you have not named before, {name}; if you trust it, give --model {name}, "
            "or --trust"
        )


def _digest(name: str) -> str | None:
    """Returns the digest of a file's content and a function's name; None without the file, as is told elsewhere."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    return hashlib.sha256(path.read_bytes() + b"\0" + function.encode()).hexdigest() if path.is_file() else None


def _known() -> dict[str, str]:
    try:
        found = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _memory() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "sparkmim" / "trusted.json"
