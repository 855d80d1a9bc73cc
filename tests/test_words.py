"""What people write on a command line is spelled as the parser takes it."""

from __future__ import annotations

import shlex

import pytest

from sparkmim.cli import COMMANDS
from sparkmim.words import spell


@pytest.mark.parametrize("written", ["96 160", "96x160", "96×160", "96,160", "'[96, 160]'", "'[96,160]'"])
def test_lists_of_numbers(written: str) -> None:
    words = spell(shlex.split(f"pretrain photos --image-size {written} --resume --out run"), COMMANDS)
    assert words == ["pretrain", "--image_size=[96, 160]", "--resume=true", "--out=run", "--data=photos"]


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("verify resnet18 --image-size 96", ["verify", "--image_size=96", "--model=resnet18"]),
        ("evaluate run --data d --shots 5", ["evaluate", "--data=d", "--shots=[5]", "--weights=run"]),
        ("pretrain a b/ --out run", ["pretrain", "--out=run", '--data=["a", "b/"]']),
        ("pretrain --data a b/ --probe c --out run", ["pretrain", '--data=["a", "b/"]', "--probe=c", "--out=run"]),
        ("reconstruct run a.jpg b/", ["reconstruct", "--weights=run", '--images=["a.jpg", "b/"]']),
        ("""reconstruct run '["a,b.jpg"]'""", ["reconstruct", "--weights=run", '--images=["a,b.jpg"]']),
        ("reconstruct run '[1].jpg'", ["reconstruct", "--weights=run", '--images=["[1].jpg"]']),
        ("embed d --weights run --pooled false", ["embed", "--weights=run", "--pooled=false", "--images=d"]),
        ("pretrain --out run --epochs 1e2", ["pretrain", "--out=run", "--epochs=1e2"]),
        ("pretrain --out run --batch-size 1e2", ["pretrain", "--out=run", "--batch_size=100"]),
        ("pretrain --out run --workers null", ["pretrain", "--out=run", "--workers=null"]),
        ("pretrain --help", ["pretrain", "--help"]),
    ],
)
def test_words(written: str, spelled: list[str]) -> None:
    assert spell(shlex.split(written), COMMANDS) == spelled
