"""What a model rebuilds, as arrays and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sparkmim
from sparkmim.cli import main
from sparkmim.data.source import images_source
from sparkmim.models.spark import reconstruction_loss
from sparkmim.sparse import PatchLayout
from sparkmim.visualize.reconstruct import Reconstructor


@pytest.fixture
def run(pretrained: Callable[..., Path]) -> Path:
    return pretrained("run", mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])


def test_arrays(run: Path, photos: Path) -> None:
    result = sparkmim.reconstruct(weights=run, images=str(photos), limit=3, masks=2, mask_ratio=0.5)
    assert result.inputs.shape == (3, 32, 48, 3)
    assert result.masked.shape == result.predicted.shape == result.pasted.shape == (3, 2, 32, 48, 3)
    assert result.visible.shape == result.errors.shape == (3, 2, 4, 6)
    assert (result.visible.sum((2, 3)) == 12).all()
    assert result.out is None
    seen = np.kron(result.visible, np.ones((8, 8)))[..., None] > 0
    inputs = np.broadcast_to(result.inputs[:, None], result.pasted.shape)
    assert np.array_equal(np.where(seen, inputs, 0.5), result.masked)
    np.testing.assert_allclose(np.where(seen, inputs, result.predicted), result.pasted, atol=1e-6)


def test_colours_are_those_of_the_image(tmp_path: Path, run: Path) -> None:
    """The normalisation of training is undone, whatever it was."""
    colour = np.array([200, 40, 90], np.uint8)
    Image.fromarray(np.broadcast_to(colour, (32, 48, 3))).save(tmp_path / "plain.png")
    result = sparkmim.reconstruct(weights=run, images=str(tmp_path / "plain.png"))
    np.testing.assert_allclose(result.inputs, np.broadcast_to(colour / 255, result.inputs.shape), atol=1e-6)


def test_losses_are_those_of_training(run: Path, photos: Path) -> None:
    result = sparkmim.reconstruct(weights=run, images=str(photos), limit=2, seed=3)
    reconstructor = Reconstructor(run)
    transform = reconstructor.preparation.transform
    source = images_source(str(photos), channels=3, rank=2)
    images = torch.stack([transform(source)(source.read(item)) for item in source.items[:2]])
    visible = torch.from_numpy(result.visible[:, 0])
    output = reconstructor.model(images, visible)
    assert result.losses.mean() == pytest.approx(output.loss.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(
        reconstruction_loss(output.prediction, images, PatchLayout(visible)).item(), rel=1e-6
    )


def test_masks_do_not_depend_on_what_follows(run: Path, photos: Path) -> None:
    few, more = (sparkmim.reconstruct(weights=run, images=str(photos), limit=limit) for limit in (2, 5))
    assert np.array_equal(few.visible, more.visible[:2])
    other = sparkmim.reconstruct(weights=run, images=str(photos), limit=2, seed=1)
    assert not np.array_equal(few.visible, other.visible)


def test_another_size(run: Path, photos: Path) -> None:
    result = sparkmim.reconstruct(weights=run, images=str(photos), limit=1, image_size=[64, 40])
    assert result.inputs.shape == (1, 64, 40, 3)
    assert result.visible.shape == (1, 1, 8, 5)


@pytest.mark.parametrize("errors", [False, True])
@pytest.mark.parametrize("masks", [1, 3])
def test_picture(run: Path, photos: Path, tmp_path: Path, masks: int, errors: bool) -> None:
    out = tmp_path / "recon.png"
    flags = ["--errors"] if errors else []
    files = [str(path) for path in sorted(photos.rglob("*.jpg"))[:2]]
    main(["reconstruct", "--weights", str(run), "--images", *files, "--out", str(out), "--masks", str(masks), *flags])
    with Image.open(out) as picture:
        assert picture.width > 600


def test_shows_itself(run: Path, photos: Path) -> None:
    result = sparkmim.reconstruct(weights=run, images=str(photos), limit=1)
    assert result._repr_png_().startswith(b"\x89PNG")
    assert len(repr(result)) < 1000


def test_command(run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    """Images, folders and what cannot be read, in one command; the picture has a name of its own if none is given."""
    monkeypatch.chdir(tmp_path)
    (photos / "part0" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    one = next(iter(sorted((photos / "part1").iterdir())))
    main(["reconstruct", "--images", str(one), str(photos / "part0"), "--weights", str(run), "--limit", "20"])
    shown = capsys.readouterr()  # type: ignore[attr-defined]
    assert (tmp_path / "reconstruct.png").is_file()
    assert shown.out.count("loss") == 13
    assert "broken.jpg" in shown.err


def test_given_masks(run: Path, photos: Path, tmp_path: Path) -> None:
    text = "x.x.x./......\n.x.x.x/xxxxxx"
    result = sparkmim.reconstruct(weights=run, images=str(photos), limit=2, mask=text)
    assert result.visible[1, 0].tolist() == [[sign == "x" for sign in row] for row in text.replace("/", "\n").split()]
    result = sparkmim.reconstruct(weights=run, images=str(photos), limit=1, visible="0,0 3,5")
    assert result.visible.sum() == 2


def test_grey_images_and_volumes_and_signals(tmp_path: Path, photos: Path, pretrained: Callable[..., Path]) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(rank, c):\n"
        "    conv, norm = getattr(nn, f'Conv{rank}d'), getattr(nn, f'BatchNorm{rank}d')\n"
        "    return nn.Sequential(nn.Sequential(conv(c, 8, 3, 2, 1), norm(8), nn.ReLU()),\n"
        "                         nn.Sequential(conv(8, 8, 3, 2, 1), norm(8), nn.ReLU()))\n"
        "def signal(in_chans=3): return net(1, in_chans)\n"
        "def image(in_chans=3): return net(2, in_chans)\n"
        "def volume(in_chans=3): return net(3, in_chans)\n"
    )
    rng = np.random.default_rng(0)
    names = ["image", "signal", "volume"]
    sizes, channels = [[32, 32], [64], [16, 24, 32]], [1, 2, 1]
    for rank, (name, size, count) in enumerate(zip(names, sizes, channels, strict=True)):
        run = pretrained(name, f"{tmp_path}/nets.py:{name}", size, channels=count)
        data = str(photos)
        if rank:
            data = str(tmp_path / f"{name}.npy")
            np.save(data, rng.normal(size=(count, *size)).astype(np.float32))
        result = sparkmim.reconstruct(weights=run, images=data, limit=1, out=tmp_path / f"{name}.png", errors=True)
        shown = [(32, 32, 3), (64, 2), (24, 32, 3)][rank]
        assert result.pasted.shape == (1, 1, *shown)
        assert (tmp_path / f"{name}.png").is_file()
        assert result.visible.shape[2:] == tuple(side // 8 for side in size)


@pytest.mark.parametrize("known", [True, False])
def test_signals_keep_their_units(tmp_path: Path, known: bool, pretrained: Callable[..., Path]) -> None:
    """Whether the weights know their mean and deviation, or these are measured; errors colour what is hidden."""
    net = nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 8, 4, 4), nn.ReLU()), nn.Sequential(nn.Conv1d(8, 8, 2, 2), nn.ReLU())
    )
    colours = {"mean": [100.0, 1.0], "std": [5.0, 0.1]} if known else {"mean": None, "std": None}
    run = pretrained("run", net, [64], channels=2, **colours)
    signal = np.stack([np.linspace(90, 110, 64), np.linspace(0.9, 1.1, 64)]).astype(np.float32)  # [C, length]
    np.save(tmp_path / "signal.npy", signal)
    result = sparkmim.reconstruct(
        weights=run, model=net, images=str(tmp_path / "signal.npy"), out=tmp_path / "plain.png"
    )
    np.testing.assert_allclose(result.inputs[0], signal.T, rtol=1e-4)
    seen = np.repeat(result.visible[0, 0], 8)
    np.testing.assert_allclose(result.pasted[0, 0][seen], signal.T[seen], rtol=1e-4)
    assert len(result.figure(errors=True).axes) == len(result.figure().axes) + 1  # the colour bar


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5"),
        ({"masks": 0}, "masks is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"mask": "x.", "visible": "0,0"}, "mask says what is hidden, and so does visible"),
        ({"visible": "0,0", "mask_ratio": 0.5}, "visible says what is hidden, and so does mask_ratio"),
        ({"mask": "x.", "masks": 2}, "mask says what is hidden, and so does masks"),
        ({"out": "picture.webp"}, "ends in .png"),
        ({"image_size": 30}, "is not a multiple of the patch size 8"),
        ({"images": None}, "no images given"),
        ({"weights": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_mistakes(run: Path, photos: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparkmim.reconstruct(**{"weights": run, "images": str(photos), **settings})


def test_weights_without_decoder(run: Path, photos: Path) -> None:
    with pytest.raises(ValueError, match="holds an encoder alone, and no decoder"):
        sparkmim.reconstruct(weights=run / "weights" / "encoder.safetensors", images=str(photos))


def test_nothing_readable(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no image can be read"):
        sparkmim.reconstruct(weights=run, images=str(tmp_path / "a.jpg"))


def test_out_is_taken(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "r.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match="exists already"):
        sparkmim.reconstruct(weights=run, images=str(photos), out=tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes() == b"precious"
    sparkmim.reconstruct(weights=run, images=str(photos), out=tmp_path / "r.png", limit=1, overwrite=True)
    assert (tmp_path / "r.png").read_bytes() != b"precious"
    assert not list(tmp_path.glob("*.partial*"))
