"""The list of published weights: what the authors' page says, in Python, on the terminal and in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

import sparkmim
from sparkmim.cli import main
from sparkmim.interop.published import PUBLISHED

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"


def test_every_network_is_timms() -> None:
    assert len(PUBLISHED) == 9
    for one in PUBLISHED:
        with torch.device("meta"):
            network = timm.create_model(one.model)
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        assert abs(millions - one.parameters) < 1
    assert len({one.file for one in PUBLISHED}) == len({one.link for one in PUBLISHED}) == 9
    assert [one.file for one in PUBLISHED if one.decoder] == ["cnxL384_withdecoder_1kpretrained_spark_style.pth"]
    assert [one.top1 for one in PUBLISHED] == [80.6, 82.2, 82.7, 83.1, 84.1, 84.8, 85.4, 86.0, 86.0]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparkmim.weights() == PUBLISHED
    main(["weights"])
    out = capsys.readouterr().out
    for one in PUBLISHED:
        assert one.link in out.splitlines()[-1] or f"     {one.link}\n" in out  # whole, to click on
        assert re.search(rf"{one.model} +{one.image_size} +{one.top1} +{one.parameters} M +{one.flops} G", out)
    assert "sparkmim finetune --weights FILE" in out


def test_documentation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for one in PUBLISHED:
        row = f"| {one.model} | {one.image_size} | {one.top1} | {one.parameters} M | {one.flops} G | [{one.file}]"
        assert f"{row}({one.link}) |" in page
