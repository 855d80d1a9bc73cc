"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from sparkmim.errors import MissingPath, UserError
from sparkmim.files import replacing


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "a[1].json"
    with replacing(out) as first, replacing(out) as second:
        assert first != second
        assert first.parent == second.parent == out.parent
        assert first.suffix == second.suffix == ".json"
        first.write_text("first")
        second.write_text("second")
    assert out.read_text() == "first"
    assert list(out.parent.iterdir()) == [out]


def test_old_content_stays_on_an_error_and_in_maps(tmp_path: Path) -> None:
    out = tmp_path / "a.npy"
    np.save(out, np.zeros(4))
    mapped = np.load(out, mmap_mode="r")
    with pytest.raises(TypeError), replacing(out) as partial:
        partial.write_text(5)  # type: ignore[arg-type]
    assert np.load(out).sum() == 0
    with replacing(out) as partial:
        np.save(partial, np.ones(4))
    assert (mapped.sum(), np.load(out).sum()) == (0, 4)
    assert list(tmp_path.iterdir()) == [out]


def test_errors_of_the_file_are_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken cannot be made a folder"), replacing(tmp_path / "taken" / "a.json"):
        pass
    full = r"a\.json cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=full), replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "a.json"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(MissingPath, match="as it is"), replacing(tmp_path / "a.json"):
        raise MissingPath("as it is")


def test_what_killed_writers_left_is_deleted_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f"{name}.partial.json" for name in ("a.1-0", "a.2-0", "ab.1-0"))
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (0, 0))
    with replacing(tmp_path / "a.json") as partial:
        partial.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "a.json", other.name]
