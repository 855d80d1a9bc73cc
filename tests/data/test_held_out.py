"""Images set apart from training by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparkmim.data.dataset import HeldOutDataset
from sparkmim.data.held_out import hold_out, names_of

SHARES = st.none() | st.floats(0, 0.99)


@given(st.lists(st.text(max_size=8), max_size=100), SHARES)
def test_every_image_is_in_one_part(names: list[str], share: float | None) -> None:
    items = [f"{place}:{name}" for place, name in enumerate(names)]
    kept, held, held_names = hold_out(items, names, share)
    assert sorted(kept + held) == sorted(items)
    assert [item.partition(":")[2] for item in held] == held_names
    assert not {item.partition(":")[2] for item in kept} & set(held_names)


@pytest.mark.parametrize(
    ("count", "apart"), [(0, 0), (9, 0), (24, 2), (320, 32), (1000, 32), (10_000, 200), (1_000_000, 2000)]
)
def test_how_many_are_set_apart(count: int, apart: int) -> None:
    names = [str(place) for place in range(count)]
    assert len(hold_out(names, names, None)[1]) == apart


def test_images_stay_where_they_are_when_others_are_added() -> None:
    names = [f"{place}.jpg" for place in range(1000)]
    before, after = (set(hold_out(names[:count], names[:count], 0.1)[1]) for count in (900, 1000))
    assert len(before) == 90
    assert len(before & after) > 75


def test_names_do_not_depend_on_where_the_data_are(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        root = tmp_path / folder
        items = [str(root / "a" / "1.jpg"), str(root / "2.jpg")]
        root.mkdir()
        assert names_of(items, root) == ["a/1.jpg", "2.jpg"]
        (root / "list.txt").touch()
        assert names_of(items, root / "list.txt") == ["a/1.jpg", "2.jpg"]
    (tmp_path / "1").mkdir()
    several = [f"{tmp_path}/1/2.jpg", f"{tmp_path}/2/2.jpg"]
    assert names_of(several, [tmp_path / "1", tmp_path / "2"]) == ["2.jpg", "../2/2.jpg"]
    assert names_of(torch.utils.data.TensorDataset(torch.zeros(2)), None) == ["0", "1"]


def test_masks_depend_on_seed_and_name() -> None:
    def masks(names: list[str], seed: int) -> Tensor:
        images = [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in names]
        dataset = HeldOutDataset(images, torch.Tensor.float, (8, 8), 0.6, seed, names=names)  # type: ignore[arg-type]
        return torch.stack([dataset[0, place]["visible"] for place in range(len(names))])

    ab, ba = masks(["a", "b"], 0), masks(["b", "a"], 0)
    assert torch.equal(ab, ba.flip(0))
    assert not torch.equal(ab[0], ab[1])
    assert not torch.equal(ab, masks(["a", "b"], 1))
