"""Small images on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import checker
from PIL import Image


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the cache of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "sparkmim"


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Twelve JPEGs of different content."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{number:02}.jpg" for number in range(12)]
    for number, path in enumerate(paths):
        Image.fromarray(checker(40, 48, number)).save(path, quality=95)
    return [str(path) for path in paths]
