"""The playground's page, made of Gradio components; needs `pip install 'sparkmim[playground]'`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sparkmim.data.decoding import max_pixels, open_picture
from sparkmim.errors import UserError
from sparkmim.visualize.masks import mask_text
from sparkmim.visualize.playground_session import Playground, Refused, Session, View, strip, to_bytes

UPLOAD = "64mb"
"""Maximum size of an uploaded file."""

WAITING = 32
"""Maximum number of waiting requests; more are refused. One is computed at a time."""

VISITORS = 200
"""Maximum number of sessions kept; the oldest is dropped for a new one."""

FORGET = 3600
"""Seconds after which idle sessions and old files are deleted."""

_HEAD = """
<script>
{ // Gradio's client warns so whenever it has closed a stream of events, by an abort signal.
  const warn = console.warn;
  console.warn = (...words) => words[0] === "Method not implemented." || warn.apply(console, words);
}
</script>
"""

_CSS = """
.gradio-container { max-width: 1180px !important; }
#seen img { cursor: pointer; }
#status { min-height: 3.2em; }
"""


def build_app(playground: Playground, samples: Sequence[str], folder: Path) -> Any:
    """Builds the page: samples are images to pick from, the first at the start; folder holds pictures to download."""
    names = _labels([model.path for model in playground.models])

    def picture_of(request: gr.Request) -> Path:
        if request.session_hash is None:  # a call from elsewhere, which would share its picture with all others
            raise Refused("the playground answers its own page only; open it in a browser")
        # The session hash comes from the visitor, who may send anything, such as a path.
        return folder / f"{hashlib.sha256(str(request.session_hash).encode()).hexdigest()}.png"

    def forget_old() -> None:
        for file in folder.glob("*.png"):
            with suppress(OSError):  # another visitor's request may delete it first
                if time.time() - file.stat().st_mtime > FORGET:
                    file.unlink()

    def render(session: Session, request: gr.Request) -> Any:
        view = playground.view(session)
        file = picture_of(request)
        forget_old()
        strip(view).save(file)
        pictures = map(to_bytes, (view.seen, *view.rebuilt))
        return session, *pictures, _status(session, view, names), mask_text(session.visible), str(file)

    def attempt(request: gr.Request, change: Callable[..., Session], *arguments: Any) -> Any:
        try:
            return render(change(*arguments), request)
        except Refused as error:
            gr.Warning(str(error), duration=8, title="Not possible")
        except (AttributeError, IndexError, TypeError, ValueError):
            gr.Warning("That request is none of this page's.", duration=8, title="Not possible")
        return (gr.skip(),) * len(shown)

    def start(ratio: float, request: gr.Request) -> Any:
        return attempt(request, playground.open, samples[0], ratio)

    def go_on(session: Session | None, request: gr.Request, change: Callable[..., Session], *arguments: Any) -> Any:
        if session is None:  # it was idle for too long, or had to make room
            gr.Info("Your session has ended; this is a new one.")
            return start(playground.mask_ratio, request)
        return attempt(request, change, session, *arguments)

    def pick(session: Session | None, ratio: float, chosen: gr.SelectData, request: gr.Request) -> Any:
        return attempt(request, lambda: playground.open(samples[chosen.index], ratio, session.seed if session else 0))

    def upload(path: str | None, session: Session | None, ratio: float, request: gr.Request) -> Any:
        return (gr.skip(),) * len(shown) if path is None else open_file(path, session, ratio, request)

    def open_file(path: str, session: Session | None, ratio: float, request: gr.Request) -> Any:
        return attempt(request, playground.open, path, ratio, session.seed if session else 0)

    def slide(session: Session | None, ratio: float, request: gr.Request) -> Any:
        return go_on(session, request, playground.redrawn, ratio)

    def draw(session: Session | None, ratio: float, request: gr.Request) -> Any:
        return go_on(session, request, playground.redrawn, ratio, 1)

    def click(session: Session | None, where: gr.SelectData, request: gr.Request) -> Any:
        return go_on(session, request, lambda session: playground.toggle(session, *where.index))

    def write(session: Session | None, text: str, request: gr.Request) -> Any:
        return go_on(session, request, playground.written, text)

    def leave(request: gr.Request) -> None:
        with suppress(Refused):
            picture_of(request).unlink(missing_ok=True)

    with gr.Blocks(title="sparkmim playground", analytics_enabled=False, delete_cache=(FORGET, FORGET)) as app:
        gr.Markdown(
            "# sparkmim playground\n"
            f"{'Two models rebuild' if len(names) > 1 else 'A model rebuilds'} the patches that you hide. Click a "
            "patch of the first picture to hide or show it."
        )
        state = gr.State(None, time_to_live=FORGET)
        look: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["fullscreen"], "show_label": False}
        with gr.Row():
            with gr.Column(min_width=280):
                gr.Markdown("**What the model sees**")  # above the picture: a label would lie on its first patches
                seen = gr.Image(elem_id="seen", alt_text="The image, its hidden patches in grey", **look)
            rebuilt = []
            for place, name in enumerate(names):
                with gr.Column(min_width=280):
                    gr.Markdown(f"**Rebuilt by {name}**" if len(names) > 1 else "**Rebuilt**")
                    alt = "The image with hidden patches rebuilt"
                    rebuilt.append(gr.Image(elem_id=f"rebuilt-{place}", alt_text=alt, **look))
        status = gr.Markdown(elem_id="status")
        with gr.Row():
            with gr.Column(min_width=280):
                ratio = gr.Slider(
                    0.05, 0.95, playground.mask_ratio, step=0.05, label="Share of patches that is hidden",
                    elem_id="ratio", buttons=[],
                )  # fmt: skip
                with gr.Row():
                    again = gr.Button("New mask", elem_id="again", variant="primary", min_width=120)
                    download = gr.DownloadButton("Download", elem_id="download", min_width=120)
                with gr.Accordion("The mask as text", open=False):
                    text = gr.Textbox(
                        label="x shows a patch, . hides it; a row per line", lines=min(8, playground.grid[0]),
                        max_lines=16, max_length=20_000, elem_id="mask",
                    )  # fmt: skip
                    take = gr.Button("Take this mask", elem_id="take")
            with gr.Column(min_width=280):
                file = gr.File(
                    label=f"Your image, up to {max_pixels() / 1e6:g} megapixels", file_types=["image"],
                    height=130, elem_id="upload",
                )  # fmt: skip
                gr.Markdown("Or pick one:", visible=len(samples) > 1)
                gallery = gr.Gallery(
                    [_thumbnail(path) for path in samples], columns=4, object_fit="cover", height="auto",
                    allow_preview=False, interactive=False, buttons=[], show_label=False, elem_id="samples",
                    visible=len(samples) > 1,
                )  # fmt: skip
        shown = [state, seen, *rebuilt, status, text, download]
        quiet: dict[str, Any] = {"outputs": shown, "api_visibility": "private", "concurrency_id": "model",
                                 "concurrency_limit": 1, "show_progress": "hidden"}  # fmt: skip
        app.load(start, [ratio], **quiet)
        gallery.select(pick, [state, ratio], trigger_mode="always_last", **quiet)
        file.upload(upload, [file, state, ratio], **quiet)
        ratio.input(slide, [state, ratio], trigger_mode="always_last", **quiet)
        again.click(draw, [state, ratio], trigger_mode="multiple", **quiet)
        seen.select(click, [state], trigger_mode="multiple", **quiet)
        take.click(write, [state, text], **quiet)
        app.unload(leave)
    app.queue(max_size=WAITING)
    return app


def _status(session: Session, view: View, names: Sequence[str]) -> str:
    losses = [f"**{loss:.3f}**" for loss in view.losses]
    if len(names) > 1:
        losses = [f"{name} {loss}" for name, loss in zip(names, losses, strict=True)]
    file = session.name.replace("`", "'")
    hides = f"`{file}`: **{int((~session.visible).sum())} of {session.visible.numel()}** patches hidden"
    return f"{hides}; error over these: {', '.join(losses)} (1 is a flat guess)."


def _labels(paths: Sequence[Path]) -> list[str]:
    """Returns short names of weight files: the run folder's, or the file's."""
    names = [path.parent.parent.name if path.parent.name == "weights" else path.stem for path in paths]
    return names if len(set(names)) == len(names) else [f"{name} ({place})" for place, name in enumerate(names, 1)]


def _thumbnail(path: str) -> Image.Image:
    with open_picture(path) as image:
        image.draft("RGB", (320, 320))
        small = image.convert("RGB")
    small.thumbnail((240, 240))
    return small


def serve(app: Any, host: str, port: int | None) -> None:
    """Serves the page until Ctrl-C; refuses a port that is taken."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="cyan", neutral_hue="slate", font=fonts)
    try:
        _, address, _ = app.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, footer_links=[],
            run_history=False, ssr_mode=False, max_file_size=UPLOAD, enable_monitoring=False, theme=theme, css=_CSS,
            head=_HEAD, state_session_capacity=VISITORS,
        )  # fmt: skip
    except OSError as error:
        if port is None:
            raise
        raise UserError(f"port {port} of {host} cannot be listened at; choose another --port") from error
    print(f"the playground is open at {address} ; Ctrl-C ends it", flush=True)
    try:
        app.block_thread()
    finally:
        app.close(verbose=False)
