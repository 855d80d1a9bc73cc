"""What the playground does, without a browser; tests/browser has the page."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sparkmim
from processes import run
from sparkmim.cli import main
from sparkmim.data.decoding import images_up_to
from sparkmim.visualize.masks import mask_text
from sparkmim.visualize.playground import sample_images
from sparkmim.visualize.playground_session import Playground, Refused, strip
from sparkmim.visualize.reconstruct import Reconstructor


@pytest.fixture
def playground(pretrained: Callable[..., Path]) -> Playground:
    return Playground([Reconstructor(pretrained(name, seed=seed)) for seed, name in enumerate("ab")])


@pytest.fixture
def photo(photos: Path) -> Path:
    return next(iter(sorted(photos.rglob("*.jpg"))))


def test_a_view(playground: Playground, photo: Path) -> None:
    session = playground.open(photo, 0.5, seed=1)
    view = playground.view(session)
    scale = playground.scale
    assert scale == 14
    assert view.seen.shape == view.rebuilt[0].shape == view.rebuilt[1].shape == (32 * scale, 48 * scale, 3)
    assert session.visible.sum() == 12
    by_command = sparkmim.reconstruct(
        weights=playground.models[0].path, images=str(photo), mask=session.visible.numpy()
    )
    assert view.losses[0] == pytest.approx(by_command.losses[0, 0], rel=1e-6)
    np.testing.assert_allclose(view.rebuilt[0][::scale, ::scale], by_command.pasted[0, 0], atol=1e-6)
    assert view.losses[0] != view.losses[1]
    middle = slice(4 * scale, None, 8 * scale)  # the middles of the patches
    grey = (view.seen[middle, middle] == 0.5).all(-1)
    assert np.array_equal(grey, ~session.visible.numpy())
    assert strip(view).size == (3 * 48 * scale + 16, 32 * scale)


def test_clicks(playground: Playground, photo: Path) -> None:
    session = playground.open(photo, 0.5)
    side = 8 * playground.scale
    places = [(0, 0, 0, 0), (6 * side - 1, 4 * side - 1, 3, 5), (2 * side, side - 1, 0, 2), (9e9, 9e9, 3, 5)]
    for x, y, row, column in places:
        clicked = playground.toggle(session, x, y)
        changed = (clicked.visible != session.visible).nonzero().tolist()
        assert changed == [[row, column]]


def test_something_must_be_seen_and_something_hidden(playground: Playground, photo: Path) -> None:
    session = playground.open(photo, 0.5)
    one = playground.written(session, "x" + "." * 5 + "/......" * 3)
    with pytest.raises(Refused, match="the last visible patch"):
        playground.toggle(one, 0, 0)
    rest = playground.written(session, "." + "x" * 5 + "/xxxxxx" * 3)
    with pytest.raises(Refused, match="the last hidden patch"):
        playground.toggle(rest, 0, 0)
    with pytest.raises(Refused, match="hides every patch"):
        playground.written(session, "......\n" * 4)


def test_sliding_hides_more_of_the_same(playground: Playground) -> None:
    before = playground.draw(0.1, seed=3)
    for ratio in (0.3, 0.5, 0.9):
        after = playground.draw(ratio, seed=3)
        assert not (after & ~before).any()
        before = after
    assert not torch.equal(playground.draw(0.5, 3), playground.draw(0.5, 4))


def test_text_is_no_path(playground: Playground, photo: Path, tmp_path: Path) -> None:
    """A visitor's text never opens a file."""
    session = playground.open(photo, 0.5)
    (tmp_path / "mask.txt").write_text(mask_text(session.visible))
    with pytest.raises(Refused, match="write x for visible patches"):
        playground.written(session, str(tmp_path / "mask.txt"))


def test_bad_uploads(playground: Playground, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:5000])
    with pytest.raises(Refused, match=r"broken\.jpg cannot be read as an image"):
        playground.open(tmp_path / "broken.jpg", 0.5)
    with images_up_to(50), pytest.raises(Refused, match=r"large\.png cannot be read as .*: larger than 50 megapixels"):
        playground.open(tmp_path / "large.png", 0.5)
    with pytest.raises(Refused, match=r"cut\.png"):
        playground.open(tmp_path / "cut.png", 0.5)


def test_a_session_is_small(playground: Playground, tmp_path: Path) -> None:
    Image.effect_noise((4000, 3000), 60).save(tmp_path / "photo.jpg")
    session = playground.open(tmp_path / "photo.jpg", 0.5)
    assert session.image.numel() < 250_000
    assert playground.view(session).seen.shape == (448, 672, 3)


def test_models_must_fit(pretrained: Callable[..., Path]) -> None:
    first, second = pretrained("a"), pretrained("b", patch=16)
    with pytest.raises(ValueError, match=r"has 2×3 patches on 32×48 pixels, but .* 4×6 on 32×48"):
        Playground([Reconstructor(first), Reconstructor(second)])
    grey = Reconstructor(first)
    grey.preparation = replace(grey.preparation, channels=1)
    with pytest.raises(ValueError, match=r"takes images of 1 channel, but .* of 3; only models"):
        Playground([Reconstructor(first), grey])


def test_samples(playground: Playground, photos: Path) -> None:
    (photos / "part0" / "00.png").write_bytes(b"broken")
    assert len(sample_images([str(photos)], playground)) == 11  # of twelve that were tried
    assert Path(sample_images(None, playground)[0]).is_file()
    with pytest.raises(ValueError, match="none of the images can be read"):
        sample_images([str(photos / "part0" / "00.png")], playground)


def test_the_page_is_built(tmp_path: Path, pretrained: Callable[..., Path], photo: Path) -> None:
    """In a process of its own, as Gradio leaves event loops open. No event can be called but by the page."""
    pytest.importorskip("gradio")
    script = f"""
from pathlib import Path
import gradio as gr
from sparkmim.visualize.playground_page import build_app
from sparkmim.visualize.playground import Playground
from sparkmim.visualize.reconstruct import Reconstructor
app = build_app(Playground([Reconstructor({str(pretrained("a"))!r})]), [{str(photo)!r}], Path())
events = app.config["dependencies"]
assert len(events) >= 7
assert all(event["api_visibility"] == "private" for event in events if event["outputs"])
assert not app.analytics_enabled
# What a visitor calls himself is no path, and old pictures go.
import os, types
folder, outside = Path({str(tmp_path)!r}) / "kept", Path({str(tmp_path)!r}) / "victim.png"
folder.mkdir()
outside.write_text("mine")
old = folder / "old.png"
old.write_text("")
os.utime(old, (0, 0))
app = build_app(Playground([Reconstructor({str(pretrained("b"))!r})]), [{str(photo)!r}], folder)
by_name = {{function.fn.__name__: function.fn for function in app.fns.values() if function.fn}}
visitor = types.SimpleNamespace(session_hash="../victim")
by_name["start"](0.5, visitor)
assert not old.exists() and len(list(folder.iterdir())) == 1
# A session that has ended begins anew.
where = types.SimpleNamespace(index=(1, 1))
for name, arguments in (("slide", [0.5]), ("draw", [0.5]), ("click", [where]), ("write", ["x....." + "/......" * 3])):
    session = by_name[name](None, *arguments, visitor)[0]
    assert session.name == {photo.name!r}
    if name != "slide":
        changed = by_name[name](session, *arguments, visitor)[0]
        assert (changed.visible != session.visible).any()
# What the page would not send changes nothing.
bad = [("slide", [None]), ("slide", ["x"]), ("click", [None]), ("click", [types.SimpleNamespace(index=None)]),
       ("write", [None]), ("pick", [0.5, types.SimpleNamespace(index=7)]), ("pick", [0.5, None]), ("upload", [None])]
for name, arguments in bad:
    words = [None, session, 0.5] if name == "upload" else [session, *arguments]
    assert all(part == gr.skip() for part in by_name[name](*words, visitor)), name
by_name["leave"](visitor)
assert outside.read_text() == "mine" and not list(folder.iterdir())
# A call from elsewhere has no session, and leaves nothing.
nobody = types.SimpleNamespace(session_hash=None)
for answer in (by_name["start"](0.5, nobody), by_name["draw"](None, 0.5, nobody)):
    assert all(part == gr.skip() for part in answer)
by_name["leave"](nobody)
assert not list(folder.iterdir())
"""
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answers its own page only" in done.stderr


def test_the_space_serves_the_page(tmp_path: Path, pretrained: Callable[..., Path]) -> None:
    """examples/space/app.py as a Space runs it; a port that is taken is said in a sentence.

    SIGTERM ends it as Ctrl-C does, and nothing of its visitors stays.
    """
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"WEIGHTS": str(pretrained("a")), "GRADIO_SERVER_NAME": "127.0.0.1",
                "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary"),
                "GRADIO_TEMP_DIR": str(tmp_path / "temporary")}  # fmt: skip
    (tmp_path / "temporary").mkdir()
    app = Path(__file__).parents[2] / "examples" / "space" / "app.py"
    with subprocess.Popen(
        [sys.executable, app], stdout=subprocess.PIPE, text=True, env=os.environ | settings
    ) as server:
        try:
            assert server.stdout is not None
            assert "is open at" in server.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}") as page:
                content = page.read()
            assert b"sparkmim playground" in content
            assert b"Method not implemented." in content  # is silenced
            sent = b'--x\r\nContent-Disposition: form-data; name="files"; filename="mine.png"\r\n\r\nmine\r\n--x--\r\n'
            upload = urllib.request.Request(
                f"http://127.0.0.1:{port}/gradio_api/upload", sent, {"Content-Type": "multipart/form-data; boundary=x"}
            )
            with urllib.request.urlopen(upload):
                assert [path.read_bytes() for path in (tmp_path / "temporary").rglob("mine.png")] == [b"mine"]
            command = [sys.executable, "-m", "sparkmim", "playground", "--weights", settings["WEIGHTS"], "--port", port]
            second = run(command, tmp_path)
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=30)
    assert server.returncode == 0
    assert not list((tmp_path / "temporary").rglob("*.png"))
    assert not list((tmp_path / "temporary").glob("sparkmim-*"))
    assert second.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be listened at; choose another --port" in second.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "nowhere"], "nowhere does not exist"),
        (["--weights", "a", "--images", "nowhere"], "nowhere does not exist; --images names"),
        (["--weights", "a", "--max-megapixels", "0"], "--max-megapixels is 0"),
        (["--weights", "a", "--port", "99999"], "port is 99999; it must be between 1 and 65535"),
        (["--weights", "a/weights/encoder.safetensors"], "no decoder"),
        (["--weights", "a", "--host", "not.a.host.invalid"], "host not.a.host.invalid is no address of this machine"),
        (["--weights", "a", "--host", "192.0.2.1"], "host 192.0.2.1 is no address of this machine"),
        (["--weights", "a", "--host", "not..a.host"], "host not..a.host is no address of this machine"),
    ],
)
def test_mistakes(
    tmp_path: Path, pretrained: Callable[..., Path], flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("gradio")
    pretrained("a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["playground", *flags])
    assert message in capsys.readouterr().err
