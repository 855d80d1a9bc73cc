"""Finds the images of a folder, or of a text file of paths."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.status import Status

from sparkmim.data.problems import counted, few
from sparkmim.errors import MissingPath, UserError
from sparkmim.files import replacing
from sparkmim.terminal import Terminal, printable

log = logging.getLogger(__name__)

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm", ".avif",
    ".heic", ".heif",
)  # fmt: skip
"""Endings of image files' names, in upper or lower case."""

CACHE_ABOVE = 10_000
"""Scans that find more images than this are cached."""

_COMPANIONS = frozenset((
    "", ".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".pdf", ".py", ".txt", ".xml", ".yaml", ".yml",
))  # fmt: skip
"""Endings of files that are beside images without being any."""

_SETTLED_NS = 2_000_000_000
"""A folder that changed this shortly before it was listed may have changed again within the same tick of its clock."""


class Listing(NamedTuple):
    """Content of one folder, at one modification time."""

    mtime_ns: int
    images: list[str]
    folders: list[str]
    others: dict[str, int]  # number of other files, by ending


def find_images(
    data: str | Path,
    cache: Path | None = None,
    progress: bool = True,
    suffixes: tuple[str, ...] = SUFFIXES,
    others: Counter[str] | None = None,
) -> list[str]:
    """Finds the images of a folder, at any depth, or those that a text file names.

    A folder is searched for names that end in one of `suffixes`; hidden files and folders are left out, links are
    followed, and no folder is entered twice. Large scans are cached, and only folders whose modification time has
    changed since are listed again.

    A text file has one path per line, absolute or relative to the file's own folder. Empty lines and lines that
    start with `#` are skipped; the order is kept.

    Args:
        data: folder or text file.
        cache: folder of cached scans; `sparkmim` in the user's cache folder by default.
        progress: whether a scan of more than a second shows a count on stderr.
        suffixes: endings of the names, in lower case.
        others: receives the number of files of a folder with other endings, by ending, without texts and the like.

    Returns:
        Absolute paths; those of a folder are sorted.
    """
    root = Path(os.path.abspath(Path(data).expanduser()))  # noqa: PTH100 (removes "..", resolves no links)
    if root.is_dir():
        return _find_in_folder(
            root, cache or _user_cache(), progress, suffixes, Counter() if others is None else others
        )
    if not root.exists():
        raise MissingPath(f"there is no folder or text file {root}")
    if not root.is_file():
        raise UserError(f"{root} is neither a folder of images nor a text file of paths")
    if root.name.lower().endswith(suffixes):
        raise UserError(f"{root} is a single image; give a folder of images, or a text file of paths")
    return _read_list(root)


def _read_list(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names are bytes, of any encoding
    if "\0" in text:
        raise UserError(f"{file} is neither a folder of images nor a text file of paths")
    lines = [line.strip() for line in text.splitlines()]
    paths = [os.path.join(file.parent, line) for line in lines if line and not line.startswith("#")]  # noqa: PTH118
    if not paths:
        raise UserError(f"{file} names no image; it should have one path per line")
    check_files(paths, file)
    return paths


def existing_folder(folder: str | Path, what: str = "folder") -> Path:
    """Returns the absolute path of a folder; raises a `MissingPath` if there is none."""
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise MissingPath(f"there is no {what} {path}")
    return path


def check_files(paths: list[str], named_by: Path) -> None:
    """Raises a `MissingPath` if a file does not exist."""
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113 (a million of them)
    if missing:
        what = f"{len(missing):,} of the {len(paths):,} files that {named_by} names do not exist"
        raise MissingPath(f"{what}; the first is {missing[0]}")


def _find_in_folder(
    root: Path, cache: Path, progress: bool, suffixes: tuple[str, ...], others: Counter[str]
) -> list[str]:
    key = b"" if suffixes == SUFFIXES else " ".join(suffixes).encode()
    memory = cache / f"images-{hashlib.sha256(os.fsencode(root) + key).hexdigest()[:16]}.json"
    known = _load(memory, root, suffixes)
    listings: dict[str, Listing] = {}
    paths: list[str] = []
    begun = time.time_ns()
    visited: set[tuple[int, int]] = set()
    status: Status | None = None
    todo = [str(root)]
    try:
        while todo:
            folder = todo.pop()
            try:
                stat = os.stat(folder)  # noqa: PTH116
                if (stat.st_dev, stat.st_ino) in visited:  # a link back
                    continue
                visited.add((stat.st_dev, stat.st_ino))
                listing = known.get(folder)
                if listing is None or listing.mtime_ns != stat.st_mtime_ns:
                    listing = _list(folder, stat.st_mtime_ns, suffixes)
            except OSError as error:
                if folder == str(root):
                    raise
                log.warning("left out a folder that can't be read: %s (%s)", printable(folder), error.strerror)
                continue
            listings[folder] = listing
            others.update(listing.others)
            paths.extend(os.path.join(folder, name) for name in listing.images)  # noqa: PTH118
            # The first by name is entered first, so that of two links to one folder always the same one is followed.
            todo.extend(os.path.join(folder, name) for name in reversed(listing.folders))  # noqa: PTH118
            if progress and status is None and time.time_ns() - begun > 1_000_000_000:
                status = Terminal().status("")
                status.start()
            if status is not None:
                status.update(f"searching {escape(printable(root))}: {len(paths):,} images")
    finally:
        if status is not None:
            status.stop()
    if not paths:
        raise UserError(f"no images in {root}: looked for {few(suffixes, 5)} at any depth, found {_inside(root)}")
    if len(paths) > CACHE_ABOVE:
        settled = {folder: found for folder, found in listings.items() if found.mtime_ns < begun - _SETTLED_NS}
        if settled != known:
            _save(memory, root, suffixes, settled)
    return sorted(paths)


def _list(folder: str, mtime_ns: int, suffixes: tuple[str, ...]) -> Listing:
    images, folders = [], []
    others: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    if entry.name.lower().endswith(suffixes):
                        images.append(entry.name)
                    elif (ending := os.path.splitext(entry.name)[1].lower()) not in _COMPANIONS:  # noqa: PTH122
                        others[ending] += 1
                else:
                    log.warning("left out %s (no ordinary file)", printable(entry.path))
            except OSError as error:  # a link to itself
                log.warning("left out %s (%s)", printable(entry.path), error.strerror)
    return Listing(mtime_ns, sorted(images), sorted(folders), others)


def _inside(root: Path) -> str:
    """Describes what a folder without images holds."""
    folders, count, example = 0, 0, ""
    for _, inner, files in os.walk(root):
        folders += len(inner)
        count += len(files)
        example = example or min(files, default="")
    if not folders and not count:
        return "nothing"
    files_found = f"{counted(count, 'file')} such as {example}" if count else "no files"
    return f"{counted(folders, 'sub-folder')} and {files_found}"


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparkmim"


def _load(memory: Path, root: Path, suffixes: tuple[str, ...]) -> dict[str, Listing]:
    try:
        stored = json.loads(memory.read_text(encoding="utf-8"))
        if stored["root"] != str(root) or stored["suffixes"] != list(suffixes):
            return {}
        return {folder: Listing(*listing) for folder, listing in stored["folders"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: scan afresh
        return {}


def _save(memory: Path, root: Path, suffixes: tuple[str, ...], listings: dict[str, Listing]) -> None:
    stored = {"root": str(root), "suffixes": suffixes, "folders": listings}
    try:
        with replacing(memory) as partial:
            partial.write_text(json.dumps(stored), encoding="utf-8")
    except UserError as error:
        log.warning("could not remember the scan of %s: %s", printable(root), printable(error))
