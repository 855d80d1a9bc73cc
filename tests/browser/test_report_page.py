"""A report opened from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparkmim


@pytest.mark.parametrize("width", [390, 1200])
def test_report_asks_for_nothing(browser: Any, tmp_path: Path, photos: Path, network: str, width: int) -> None:
    result = sparkmim.pretrain(
        data=str(photos), model=network, out=tmp_path / "run", image_size=32, decoder_width=16, epochs=3, batch_size=8,
        warmup_epochs=1, workers=0, picture_every=1,
    )  # fmt: skip
    assert result.finished
    report = tmp_path / "run" / "report.html"
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(report.as_uri())
    pictures = page.locator("img")
    assert pictures.count() > 2
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert not errors
