"""The page as its visitors use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PATCHES = 64


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Any]:
    """A page of its own, opened and ready; that it asked nobody but the server, and complained of nothing, is checked
    at the end."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    opened(page, address)
    yield page
    context.close()
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked
    assert not outside
    assert "Method not implemented." not in said


def opened(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#rebuilt-1 img", timeout=60_000)
    page.wait_for_selector("#status code", timeout=60_000)


def hidden(page: Any) -> int:
    """Number of hidden patches, as the page says."""
    found = re.search(r"(\d+) of (\d+) patches", page.inner_text("#status"))
    assert found is not None
    assert int(found[2]) == PATCHES
    return int(found[1])


def wait_for_hidden(page: Any, count: int) -> None:
    page.wait_for_function(
        "count => document.querySelector('#status').innerText.includes(`${count} of`)", arg=count, timeout=30_000
    )


def click_patch(page: Any, row: int, column: int) -> None:
    box = page.locator("#seen img").bounding_box()
    page.mouse.click(box["x"] + (column + 0.5) * box["width"] / 8, box["y"] + (row + 0.5) * box["height"] / 8)


def test_first_sight(visitor: Any) -> None:
    assert hidden(visitor) == round(0.6 * PATCHES)
    assert visitor.locator("#samples img").count() == 5
    assert "first" in visitor.inner_text("#status")
    assert "second" in visitor.inner_text("#status")


def test_clicking_patches(visitor: Any) -> None:
    count = hidden(visitor)
    mask = visitor.locator("#mask textarea")
    visitor.click("text=The mask as text")
    before = mask.input_value()
    picture = visitor.get_attribute("#rebuilt-0 img", "src")
    row, column = divmod(before.replace("\n", "").index("."), 8)
    click_patch(visitor, row, column)
    wait_for_hidden(visitor, count - 1)
    after = mask.input_value()
    changed = [place for place, (a, b) in enumerate(zip(before.split(), after.split(), strict=True)) if a != b]
    assert changed == [row]
    assert after.split()[row][column] == "x"
    assert visitor.get_attribute("#rebuilt-0 img", "src") != picture
    click_patch(visitor, row, column)
    wait_for_hidden(visitor, count)


def test_sliding_and_drawing(visitor: Any) -> None:
    visitor.locator("#ratio input[type=range]").fill("0.25")
    wait_for_hidden(visitor, PATCHES // 4)
    visitor.click("text=The mask as text")
    before = visitor.locator("#mask textarea").input_value()
    visitor.click("#again")
    visitor.wait_for_function("text => document.querySelector('#mask textarea').value != text", arg=before)
    assert hidden(visitor) == PATCHES // 4


def test_picking_and_downloading(visitor: Any, tmp_path: Path) -> None:
    visitor.locator("#samples button img").nth(2).click()
    visitor.wait_for_function("document.querySelector('#status').innerText.includes('2.jpg')", timeout=30_000)
    with visitor.expect_download(timeout=30_000) as download:
        visitor.click("#download")
    download.value.save_as(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (3 * 448 + 16, 448)
        assert picture.convert("L").entropy() > 3


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#upload input[type=file]", path)


def message(page: Any) -> str:
    toast = page.locator(".toast-body").last
    toast.wait_for(timeout=60_000)
    text: str = toast.inner_text()
    return text


def test_uploading(visitor: Any, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).save(tmp_path / "mine.png")
    upload(visitor, tmp_path / "mine.png")
    visitor.wait_for_function("document.querySelector('#status').innerText.includes('mine.png')", timeout=30_000)
    assert hidden(visitor) == round(0.6 * PATCHES)


def test_corrupt_upload(visitor: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    before = visitor.inner_text("#status")
    upload(visitor, tmp_path / "broken.jpg")
    assert "broken.jpg cannot be read as an image" in message(visitor)
    assert visitor.inner_text("#status") == before
    click_patch(visitor, 0, 0)  # the page goes on
    visitor.wait_for_function("text => document.querySelector('#status').innerText != text", arg=before)


def test_hundred_megapixels(visitor: Any, tmp_path: Path) -> None:
    Image.new("L", (10_000, 10_000), 7).save(tmp_path / "huge.png")
    upload(visitor, tmp_path / "huge.png")
    assert "huge.png cannot be read as an image: larger than 50 megapixels" in message(visitor)


def test_a_mask_that_hides_everything(visitor: Any) -> None:
    count = hidden(visitor)
    visitor.click("text=The mask as text")
    visitor.locator("#mask textarea").fill("........\n" * 8)
    visitor.click("#take")
    assert "hides every patch" in message(visitor)
    assert hidden(visitor) == count
    visitor.locator("#mask textarea").fill("x.......\n" + "........\n" * 7)
    visitor.click("#take")
    wait_for_hidden(visitor, PATCHES - 1)
    click_patch(visitor, 0, 0)
    visitor.wait_for_function("document.body.innerText.includes('the last visible patch')", timeout=30_000)
    assert hidden(visitor) == PATCHES - 1


def test_two_visitors_at_once(browser: Any, address: str, visitor: Any) -> None:
    context = browser.new_context()
    other = context.new_page()
    opened(other, address)
    for ratio, hers in ((0.25, 0.75), (0.5, 0.9), (0.1, 0.4)):  # asked at once, answered to each
        visitor.locator("#ratio input[type=range]").fill(str(ratio))
        other.locator("#ratio input[type=range]").fill(str(hers))
        wait_for_hidden(visitor, PATCHES - round((1 - ratio) * PATCHES))
        wait_for_hidden(other, PATCHES - round((1 - hers) * PATCHES))
    context.close()
    click_patch(visitor, 0, 0)
    visitor.wait_for_function("document.querySelector('#status').innerText.match(/(5|7) of 64/)", timeout=30_000)


def test_phone(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    opened(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    count = hidden(page)
    box = page.locator("#seen img").bounding_box()
    assert box["width"] > 250
    page.touchscreen.tap(box["x"] + box["width"] / 16, box["y"] + box["height"] / 16)
    page.wait_for_function("text => !document.querySelector('#status').innerText.includes(text)", arg=f"{count} of")
    context.close()
