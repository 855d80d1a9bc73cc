"""Other channels, shapes and ranks, and the other decoder, through the real command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparkmim
from processes import Cli
from sparkmim.runs.history import read_history, settled_settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")

RUN = ("--warmup-epochs", 1, "--workers", 0, "--log-every", 1, "--precision", "32-true", "--picture-every", 2,
       "--val-split", 0)  # fmt: skip


def smooth(generator: np.random.Generator, channels: int, *size: int) -> Any:
    """A field that can be guessed from its surroundings: `[channels, *size]` in 0…1."""
    axes = np.meshgrid(*(np.linspace(0, 1, extent) for extent in size), indexing="ij")
    out = np.zeros((channels, *size))
    for channel in range(channels):
        for axis in axes:
            out[channel] += np.sin(axis * generator.uniform(2, 8) + generator.uniform(0, 6))
    return (out + len(size)) / (2 * len(size))


def events_of(out: Path) -> EventAccumulator:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def assert_learned(out: Path) -> None:
    """The loss of the last epoch is well below the first step's."""
    values = [event.value for event in events_of(out).Scalars("loss")]
    assert len(values) >= 8
    assert sum(values[-3:]) / 3 < 0.97 * values[0], values


def test_thirteen_channels(cli: Cli, tmp_path: Path) -> None:
    """Multispectral 16-bit arrays of uneven size, patches of 16 with a network of stride 32."""
    generator = np.random.default_rng(0)
    (tmp_path / "tiles" / "north").mkdir(parents=True)
    for index in range(12):
        tile = (smooth(generator, 13, 180, 240 + index) * 9000 + 500).astype(np.uint16)
        if index % 2:
            tile = np.moveaxis(tile, 0, -1)  # [H, W, C] is understood too
        np.save(tmp_path / "tiles" / ("north" if index % 3 else ".") / f"{index}.npy", tile)

    measured = cli("statistics", "--data", "tiles", "--channels", 13)
    assert measured.returncode == 0, measured.stderr
    flags = [word for line in measured.stdout.splitlines() for word in line.replace("'", "").split(" ", 1)]
    assert flags[::2] == ["--mean", "--std"]
    mean = yaml.safe_load(flags[1])
    assert len(mean) == 13
    assert all(500 < value < 9500 for value in mean)

    done = cli("pretrain", "--data", "tiles", "--out", "run", "--model", "resnet10t", "--channels", 13,
               "--image-size", "[160, 224]", "--patch-size", 16, "--stages", 3, "--decoder-width", 32,
               "--batch-size", 4, "--epochs", 6, "--learning-rate", 0.4, *flags, *RUN)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 images at 160×224, 10×14 patches of 16" in done.stderr
    assert_learned(tmp_path / "run")
    assert events_of(tmp_path / "run").Tags()["images"]
    encoder = load_file(tmp_path / "run" / "weights" / "encoder.safetensors")
    timm.create_model("resnet10t", num_classes=0, in_chans=13).load_state_dict(encoder, strict=True)
    again = sparkmim.load(tmp_path / "run")
    assert (again.hierarchy.strides, again.grid, again.image_size) == ((4, 8, 16), (10, 14), (160, 224))


SIGNAL_NETWORK = """
from torch import nn


def network(in_chans=3):
    layers = []
    for width in (16, 32, 64):
        layers += [nn.Conv1d(in_chans, width, 5, 2, 2), nn.GroupNorm(4, width), nn.GELU()]
        in_chans = width
    return nn.Sequential(*layers)
"""


def test_signals(cli: Cli, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "signals").mkdir()
    for index in range(24):
        np.savez(tmp_path / "signals" / f"{index}.npz", image=smooth(generator, 2, 600), label=np.array(3))
    (tmp_path / "signals" / "broken.npz").write_bytes(b"PK nonsense")
    (tmp_path / "net.py").write_text(SIGNAL_NETWORK)
    network = ("--model", "net.py:network", "--channels", 2, "--image-size", "[512]")
    verified = cli("verify", *network)
    assert verified.returncode == 0, verified.stdout
    done = cli("pretrain", "--data", "signals", "--out", "run", *network, "--patch-size", 32, "--decoder-width", 32,
               "--batch-size", 8, "--epochs", 8, "--learning-rate", 0.1, "--max-unreadable", 0.5, *RUN)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_learned(tmp_path / "run")
    assert "broken.npz" in (tmp_path / "run" / "log.txt").read_text()
    saved = settled_settings(read_history(tmp_path / "run" / "history.jsonl"))
    assert saved["image_size"] == [512]
    assert saved["flip"] == 0.0  # time has a direction
    assert len(saved["mean"]) == 2  # measured


MONAI = """
from monai.networks.nets import resnet10


def network(in_chans=1):
    return resnet10(spatial_dims=3, n_input_channels=in_chans, num_classes=2, conv1_t_stride=1, no_max_pool=True)
"""


@pytest.mark.parametrize("name", ["convnext", "monai"])
def test_volumes(cli: Cli, tmp_path: Path, name: str) -> None:
    """NIfTI files, through a plain 3-D ConvNeXt and through MONAI's ResNet."""
    nibabel = pytest.importorskip("nibabel")
    generator = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for index in range(8):
        volume = (smooth(generator, 1, 40, 36, 44)[0] * 2000 - 1000).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "scans" / f"{index}.nii.gz")
    if name == "monai":
        pytest.importorskip("monai")
        (tmp_path / "net.py").write_text(MONAI)
        model, size = "net.py:network", "[16, 16, 24]"
    else:
        shutil.copy(Path(__file__).parent.parent / "examples" / "convnext_3d.py", tmp_path / "net.py")
        model, size = "net.py:convnext_3d", "[32, 32, 48]"
    done = cli("pretrain", "--data", "scans", "--out", "run", "--model", model, "--channels", 1,
               "--image-size", size, "--decoder-width", 32, "--batch-size", 4, "--epochs", 6,
               "--learning-rate", 0.1, *RUN)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_learned(tmp_path / "run")
    assert events_of(tmp_path / "run").Tags()["images"]  # a slice
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # the file of the network is named relative to it
        assert len(sparkmim.load("run").image_size) == 3


def test_fcmae(cli: Cli, photos: Path, tmp_path: Path) -> None:
    done = cli("pretrain", "--data", photos, "--out", "run", "--model", "convnextv2_atto", "--decoder", "fcmae",
               "--image-size", 96, "--decoder-width", 64, "--batch-size", 8, "--epochs", 5, "--learning-rate", 0.03,
               *RUN)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_learned(tmp_path / "run")
    encoder = load_file(tmp_path / "run" / "weights" / "encoder.safetensors")
    timm.create_model("convnextv2_atto", num_classes=0).load_state_dict(encoder, strict=True)
    model = sparkmim.load(tmp_path / "run")
    out = model(torch.randn(2, 3, 96, 96))
    assert out.reconstruction.shape == (2, 3, 96, 96)
    assert model.decoder.stride == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--channels", 13, "--data", "photos"], "photos holds image files only, which have 1 or 3 channels"),
        (["--image-size", "[64, 64, 64]"], "ResNet convolves in 2-D, but images of 3 spatial axes were asked for"),
        (["--image-size", "[64, 64, 64, 64]"], "--image-size is [64, 64, 64, 64]; it must have 1 to 3 values"),
        (["--stages", 5], "stages is 5; ResNet has 4 to use, so it takes 1 to 4"),
        (["--stages", 2, "--patch-size", 4], "patch_size 4 is not a multiple of the encoder's stride 8; use 8"),
        (["--feature-modules", "[layer1, layer5]"], "no module named 'layer5' for feature_modules; there is layer"),
        (["--feature-modules", "[layer2, layer1]"], "must divide the image evenly and have ascending strides"),
        (["--decoder", "unet"], "decoder"),
        (["--decoder", "fcmae", "--decoder-width", 0], "--decoder-width is 0; it must be above 0"),
        (["--channels", 0], "channels is 0; it must be above 0"),
        (["--channels", 4, "--model", "torchvision/resnet18"], "torchvision's models take 3 channels, not 4"),
        (["--mean", "[0.5]"], "mean has 1 value for 3 channels; `sparkmim statistics` measures them"),
        (["--std", "[1, 1, 0]"], "--std is [1, 1, 0]; each of its values must be above 0"),
        (["--channels", 2, "--data", "arrays"], "for channels 2 and an image_size of 2 numbers it must be [2, H, W]"),
        (["--model", "unet.py:unet"], "name its maps, shallow to deep, with feature_modules=[...]: down1 4×128×128"),
        (["--model", "valid.py:net"], "has no module whose output is a 2-D feature map that divides an image of"),
        (["--model", "inception_v3"], "no feature map of InceptionV3 divides the image evenly"),
        (["--model", "inception.py:net"], "could not be run on an image of"),
    ],
)
def test_mistakes_in_model_and_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photos: Path, tmp_path: Path,
    arguments: list[object], message: str,
) -> None:  # fmt: skip
    """One sentence that names the thing and the remedy; nothing is written."""
    from sparkmim.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.zeros((5, 40, 40)))
    (tmp_path / "unet.py").write_text(
        "from torch import nn\n\n\nclass UNet(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.down1, self.down2 = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)\n"
        "        self.up = nn.ConvTranspose2d(8, 4, 2, 2)\n\n"
        "    def forward(self, x):\n        x = self.down1(x)\n        return x + self.up(self.down2(x))\n\n\n"
        "def unet():\n    return UNet()\n"
    )
    (tmp_path / "valid.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 2))\n"
    )
    (tmp_path / "inception.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(4, 4, 2, 2))\n"
    )
    given = {"--data": "photos", "--model": "resnet10t", "--out": "run", "--image-size": 64, "--decoder-width": 32}
    given |= dict(zip(map(str, arguments[::2]), arguments[1::2], strict=True))
    with pytest.raises(SystemExit) as left:
        main(["pretrain", *(str(word) for pair in given.items() for word in pair)])
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()
