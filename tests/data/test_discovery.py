"""Images are found in folders and text files, and large scans are remembered for as long as they hold."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sparkmim.data import discovery
from sparkmim.data.discovery import find_images
from sparkmim.errors import UserError


def touch(root: Path, *names: str, old: bool = False) -> None:
    """Makes empty files, in folders that are old enough for their listings to be trusted, if so wanted."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for folder in root, *root.rglob("*"):
        if old and folder.is_dir():
            os.utime(folder, (1_000_000_000, 1_000_000_000))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are really listed, by name; even small scans are remembered."""
    calls: list[str] = []
    true_list = discovery._list

    def spy(folder: str, mtime_ns: int, suffixes: tuple[str, ...]) -> discovery.Listing:
        calls.append(Path(folder).name)
        return true_list(folder, mtime_ns, suffixes)

    monkeypatch.setattr(discovery, "_list", spy)
    monkeypatch.setattr(discovery, "CACHE_ABOVE", 0)
    return calls


def test_any_depth_sorted_and_only_images(root: Path) -> None:
    images = ["b.JPG", "a/z.jpeg", "a/b/c/deep.Png", "x.webp", "y.bmp", "z.tif", "a/w.TIFF", "Ä.jpg"]
    touch(root, *images, "notes.txt", ".hidden.jpg", ".git/x.jpg", "jpg", "a/b.jpg.txt")
    (root / "folder.jpg").mkdir()
    assert find_images(root) == sorted(str(root / name) for name in images)
    assert find_images(str(root)) == find_images(root)


def test_paths_are_absolute(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(root, "a.jpg")
    monkeypatch.chdir(root.parent)
    assert find_images("images") == find_images("./x/../images") == [str(root / "a.jpg")]


def test_links_are_followed_once(root: Path, tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg", "single.jpg")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "file.jpg").symlink_to(tmp_path / "single.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert find_images(root) == [str(root / "again/a.jpg"), str(root / "file.jpg")]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "nothing"),
        (["a/b/"], "2 sub-folders and no files"),
        (["a/a.txt"], "1 sub-folder and 1 file such as a.txt"),
        (["b.txt", "a.txt", "c/d.csv", "e/f/g.csv"], "3 sub-folders and 4 files such as a.txt"),
    ],
)
def test_no_images(root: Path, names: list[str], found: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True) if name.endswith("/") else touch(root, name)
    with pytest.raises(ValueError, match=r"no images in .*images: looked for \.jpg, .* at any depth") as caught:
        find_images(root)
    assert str(caught.value).endswith(f"found {found}")


def test_wrong_places(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder or text file .*nowhere"):
        find_images(root / "nowhere")
    touch(root, "a.jpg")
    with pytest.raises(ValueError, match="single image"):
        find_images(root / "a.jpg")
    (root / "data.tar").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="neither a folder of images nor a text file"):
        find_images(root / "data.tar")


def test_unreadable_folder_is_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(root, "a.jpg", "locked/b.jpg")
    true_list = discovery._list

    def locked(folder: str, mtime_ns: int, suffixes: tuple[str, ...]) -> discovery.Listing:
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return true_list(folder, mtime_ns, suffixes)

    monkeypatch.setattr(discovery, "_list", locked)
    assert find_images(root) == [str(root / "a.jpg")]
    assert "locked" in caplog.text
    assert "Permission denied" in caplog.text


def test_text_file(root: Path, tmp_path: Path) -> None:
    touch(root, "b.jpg", "a.jpg", "sub/c#1.jpg", "no suffix")
    touch(tmp_path, "far.png")
    file = root / "list.txt"
    names = (
        f"# the images\nb.jpg\n\n  a.jpg  \nsub/c#1.jpg\r\n{tmp_path / 'far.png'}\n  # more\n../far.png\nno suffix\n"
    )
    file.write_text("\ufeff" + names, encoding="utf-8")
    expected = [root / "b.jpg", root / "a.jpg", root / "sub/c#1.jpg", tmp_path / "far.png", root / "../far.png"]
    assert find_images(file) == [*map(str, expected), str(root / "no suffix")]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_list_of_names_that_are_no_utf8(root: Path) -> None:
    name = "café.jpg".encode("latin-1")
    Path(os.fsdecode(os.fsencode(root) + b"/" + name)).touch()
    (root / "list.txt").write_bytes(name + b"\n")
    (found,) = find_images(root / "list.txt")
    assert Path(found).exists()


def test_text_file_errors(root: Path) -> None:
    touch(root, "a.jpg")
    file = root / "list.txt"
    file.write_text("a.jpg\nb.jpg\nc.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 files that .*list\.txt names .* first is .*b\.jpg"):
        find_images(file)
    file.write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="names no image"):
        find_images(file)


def test_scan_is_remembered_until_a_folder_changes(root: Path, listed: list[str]) -> None:
    touch(root, "a.jpg", "x/b.jpg", "y/c.jpg", old=True)
    first = find_images(root)
    assert sorted(listed) == ["images", "x", "y"]
    listed.clear()
    assert find_images(root) == first
    assert listed == []
    touch(root, "x/new.jpg")
    assert find_images(root) == sorted([*first, str(root / "x/new.jpg")])
    assert listed == ["x"]
    (root / "y/c.jpg").unlink()
    assert str(root / "y/c.jpg") not in find_images(root)
    touch(root, "z/deep/d.jpg")
    assert str(root / "z/deep/d.jpg") in find_images(root)


def test_fresh_folders_are_not_trusted(root: Path, listed: list[str]) -> None:
    touch(root, "a.jpg")
    now = time.time_ns()
    os.utime(root, ns=(now, now))
    find_images(root)
    touch(root, "b.jpg")
    os.utime(root, ns=(now, now))  # as on a file system with a coarse clock
    assert len(find_images(root)) == 2


def test_where_scans_are_remembered(root: Path, listed: list[str], user_cache: Path, tmp_path: Path) -> None:
    touch(root, "a.jpg", old=True)
    find_images(root)
    (memory,) = user_cache.iterdir()
    assert json.loads(memory.read_text())["root"] == str(root)
    find_images(root, cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_small_scans_are_not_remembered(root: Path, user_cache: Path) -> None:
    touch(root, "a.jpg", old=True)
    find_images(root)
    assert not user_cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"root": "/other", "suffixes": [], "folders": {}}'])
def test_damaged_memory_is_ignored(root: Path, listed: list[str], user_cache: Path, content: str) -> None:
    touch(root, "a.jpg", old=True)
    find_images(root)
    (memory,) = user_cache.iterdir()
    memory.write_text(content)
    listed.clear()
    assert find_images(root) == [str(root / "a.jpg")]
    assert listed == ["images"]


def test_unwritable_cache_is_no_reason_to_stop(
    root: Path, listed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(root, "a.jpg", old=True)
    (tmp_path / "file").touch()
    assert find_images(root, cache=tmp_path / "file" / "below") == [str(root / "a.jpg")]
    assert "could not remember" in caplog.text


def test_slow_scan_shows_a_count_on_stderr(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    touch(root, *(f"{name}/a.jpg" for name in "abc"))
    ticks = iter(range(10**9, 10**12, 10**9))
    monkeypatch.setattr(discovery.time, "time_ns", lambda: next(ticks))
    shown: list[str] = []
    monkeypatch.setattr(discovery.Status, "update", lambda self, text: shown.append(text))
    find_images(root, progress=False)
    assert shown == []
    find_images(root)
    assert shown[-1] == f"searching {root}: 3 images"
    assert capfd.readouterr().out == ""


def test_a_link_to_itself_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert find_images(tmp_path) == [str(tmp_path / "photo.png")]
    assert f"left out {tmp_path / 'loop.png'}" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_among_images_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(root, "a.jpg")
    os.mkfifo(root / "b.jpg")
    assert find_images(root) == [str(root / "a.jpg")]
    assert f"left out {root / 'b.jpg'} (no ordinary file)" in caplog.text


def test_a_pipe_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(UserError, match="is neither a folder of images nor a text file of paths"):
        find_images(tmp_path / "list.txt")
