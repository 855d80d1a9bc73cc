"""What a file is that was given as weights and cannot be read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_AGAIN = "copy or download it again"


def why_unreadable(path: Path, error: Exception) -> str:
    """Returns what follows the path in a message: what the file is, and the remedy.

    Of what a library says, nothing is passed on: PyTorch recommends to run the code in a file.

    Args:
        path: the file.
        error: what the library raised that reads files of this ending.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(2**20)
    except OSError as missing:
        return f"cannot be opened: {missing.strerror}"
    if not size:
        return f"is empty; {_AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer; fetch the file itself by `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page (a download page?); download the file itself"
    tensors = head[8:9] == b"{"  # safetensors: eight bytes that tell the length of a header, in JSON
    if tensors and (whole := _safetensors_bytes(head)) > size:
        return f"ends too early ({size:,} of {whole:,} bytes); {_AGAIN}"
    archive = head.startswith(b"PK\x03\x04")
    if (archive and not zipfile.is_zipfile(path)) or isinstance(error, EOFError) or "unexpected EOF" in str(error):
        return f"ends too early (after {size:,} bytes); {_AGAIN}"
    if path.suffix == ".safetensors":
        by_torch = "; if PyTorch wrote it, let its name end in .pth" if archive else f", or is damaged; {_AGAIN}"
        return f"is no safetensors file{by_torch}"
    if tensors:
        return "is a safetensors file; let its name end in .safetensors"
    if "Unsupported" in str(error) and (archive or head.startswith(b"\x80")):  # a pickle
        return "holds Python objects, and loading them could run code; save the state_dict of the network instead"
    return f"is no weight file of PyTorch, or is damaged; {_AGAIN}"


def _safetensors_bytes(head: bytes) -> int:
    """Returns how many bytes a safetensors file should have; those of its header alone, if that is not whole."""
    length = 8 + int.from_bytes(head[:8], "little")
    try:
        header = json.loads(head[8:length])
        return length + max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return length
