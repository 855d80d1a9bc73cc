"""Fine-tuning: recipes, what is loaded, what is trained, resuming, and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import sparkmim
from sparkmim.data.problems import counted
from sparkmim.errors import UserError
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import open_weights, save
from sparkmim.models import SparK, create_classifier, create_encoder
from sparkmim.training.finetune import recipe_rows
from sparkmim.training.recipes import FINETUNE_RECIPES

RECIPES = {
    # batch, epochs, warm-up, optimiser, rate, layer decay, weight decay, mixup, repeats, drop path, EMA
    "convnext_small": (4096, 400, 20, "adamw", 2e-4, 0.7, 0.01, 0.8, 3, 0.3, 0.9999),
    "convnext_base": (4096, 400, 20, "adamw", 1e-4, 0.7, 0.01, 0.8, 3, 0.4, 0.9999),
    "convnext_large": (4096, 200, 10, "adamw", 1e-4, 0.7, 0.02, 0.8, 3, 0.5, 0.9999),
    "convnext_large_384": (1024, 200, 20, "adamw", 6e-5, 0.7, 0.01, 0.8, 3, 0.5, 0.99995),
    "resnet50": (2048, 300, 5, "lamb", 2e-3, 0.7, 0.02, 0.1, 1, 0.05, 0.9999),
    "resnet101": (2048, 300, 5, "lamb", 1e-3, 0.8, 0.02, 0.1, 1, 0.2, 0.9999),
    "resnet152": (2048, 300, 5, "lamb", 1e-3, 0.8, 0.02, 0.1, 1, 0.2, 0.9999),
    "resnet200": (2048, 300, 5, "lamb", 1e-3, 0.8, 0.02, 0.1, 1, 0.2, 0.9999),
}
"""The paper's table."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_print_the_papers_settings(name: str) -> None:
    batch, epochs, warmup, optimizer, rate, layers, decay, mixup, repeats, drop, ema = RECIPES[name]
    loss, size = ("bce" if optimizer == "lamb" else "ce"), (384 if name.endswith("384") else 224)
    augment, whole = ("auto", "whole image") if size == 384 else ("trivial", "crop 0.95")
    recipe = FINETUNE_RECIPES[name]
    assert recipe.image_size == size
    assert recipe_rows(SimpleNamespace(**vars(recipe))) == {
        "length": f"batch {batch}, {epochs} epochs, warm-up {warmup}",
        "optimiser": f"{optimizer}, rate {rate:g} per 256, layer decay {layers:g}, weight decay {decay:g}, clip none",
        "loss": f"{loss}, mixup {mixup:g}, cutmix 1, smoothing 0.1",
        "regularisation": f"drop path {drop:g}, EMA {ema:g}",
        "augmentation": f"{augment}, crops from 0.08, erasing 0.25, repeated {counted(repeats, 'time')}; validation "
        f"{whole}",
    }


def test_a_network_in_evaluation_mode_is_trained(tmp_path: Path) -> None:
    """As it comes out of another run: statistics of BatchNorm move from the first step on."""
    network = create_encoder("resnet18").eval()
    before = network.bn1.running_mean.clone()
    data = [(torch.rand(3, 64, 64), 0) for _ in range(8)]
    settings: dict[str, Any] = {"image_size": 64, "decoder_width": 32, "workers": 0, "picture_every": 0}
    result = sparkmim.pretrain(
        data=data, model=network, out=tmp_path / "run", epochs=1, batch_size=4, warmup_epochs=0, **settings
    )
    assert not torch.equal(result.model.encoder.bn1.running_mean, before)


class Images:
    """Two classes told apart by their brightness, 16×16."""

    classes = ("dark", "bright")

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [i % 2 for i in range(count)]
        noise = torch.rand(count, 3, 16, 16, generator=generator)
        self.images = [(n * 0.6 + 0.4 * t).mul(255).to(torch.uint8) for n, t in zip(noise, self.targets, strict=True)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.images[place], self.targets[place]


@pytest.fixture
def settings(tmp_path: Path, network: str) -> dict[str, Any]:
    return {
        "data": Images(32, 0), "val_data": Images(20, 1), "out": tmp_path / "run", "model": network, "image_size": 16,
        "epochs": 6, "warmup_epochs": 0.5, "batch_size": 8, "learning_rate": 0.05, "precision": "32-true", "workers": 0,
    }  # fmt: skip


def test_learns_and_keeps_its_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    result = sparkmim.finetune(**settings, ema=0.5)
    assert result.finished
    assert result.best_top1["model"] > 0.9
    names = ["classifier", "classifier_best", "classifier_ema", "classifier_ema_best"]
    assert sorted(path.stem for path in (tmp_path / "run" / "weights").iterdir()) == names
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["classes"] == ["dark", "bright"]
    assert metrics["best_model"]["top1"] == result.best_top1["model"]
    assert sum(map(sum, metrics["last_model"]["confusion"])) == 20
    with Image.open(tmp_path / "run" / "confusion.png") as picture:
        assert picture.size[0] > 300
    opened = open_weights(tmp_path / "run")
    assert opened.path.stem.endswith("_best")
    assert opened.classes == ["dark", "bright"]
    last = open_weights(tmp_path / "run" / "weights" / "classifier.safetensors").classifier()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(last(images), result.model(images))  # in another memory layout


@pytest.mark.parametrize(
    "extra",
    [
        {"mixup": 0.5, "cutmix": 1.0, "loss": "bce", "optimizer": "lamb", "augment": "trivial", "erase": 0.5},
        {"mixup": 0.5, "repeats": 3, "augment": "auto", "accumulate": 2, "fit_head": True},
    ],
)
def test_resumes_exactly(settings: dict[str, Any], tmp_path: Path, extra: dict[str, Any]) -> None:
    """Stopped after five steps and resumed, a run ends with the same weights and scores as one in one go."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                for callback in trainer.callbacks:
                    if type(callback).__name__ == "Keeper":
                        callback.signal = 15

    settings |= {"epochs": 3, "eval_every": 1.0, "ema": 0.9, **extra}
    whole = sparkmim.finetune(**settings)
    again = {**settings, "out": tmp_path / "again"}
    stopped = sparkmim.finetune(**again, callbacks=[Stop()])
    assert stopped.step == 5
    assert not stopped.finished
    resumed = sparkmim.finetune(out=again["out"], data=settings["data"], val_data=settings["val_data"], resume=True)
    assert resumed.finished
    assert resumed.top1 == whole.top1
    assert resumed.best_top1 == whole.best_top1
    for file in ("classifier", "classifier_ema", "classifier_best"):
        one, other = (load_file(folder / "weights" / f"{file}.safetensors") for folder in (whole.out, resumed.out))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_starts_with_the_fitted_head(settings: dict[str, Any]) -> None:
    """Of the model and of its average; a resumed run does not fit it again (above)."""
    start = {**settings, "epochs": 1, "learning_rate": 1e-9, "weight_decay": 0.0, "ema": 0.9}
    assert sparkmim.finetune(**start).top1["ema"] < 0.9
    fitted = sparkmim.finetune(**{**start, "out": f"{start['out']}-fitted", "fit_head": True})
    assert fitted.top1["model"] > 0.9
    assert fitted.top1["ema"] > 0.9


def pretrained(folder: Path, name: str) -> SparK:
    torch.manual_seed(5)
    model = SparK(create_encoder(name), image_size=64, decoder_width=32)
    metadata = {"model": name, "image_size": [64, 64], "patch_size": 32, "decoder_width": 32, "channels": 3,
                "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}  # fmt: skip
    save(model, folder / "weights", WeightsMetadata(**metadata))
    return model


def test_starts_from_pretrained_weights_and_their_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    """`freeze` leaves the pretrained encoder as it was, with its running statistics."""
    source = pretrained(tmp_path / "pre", "resnet18").encoder.state_dict()
    settings |= {"model": None, "image_size": None, "weights": tmp_path / "pre", "epochs": 1, "flip": 0.0}
    result = sparkmim.finetune(**settings, freeze=True)
    found = result.model.state_dict()
    assert all(torch.equal(found[name], source[name]) for name in source)
    assert found["fc.weight"].shape == (2, 512)
    metadata = open_weights(tmp_path / "run").metadata
    assert metadata.mean == [0.1, 0.2, 0.3]
    assert metadata.image_size == [64, 64]
    timm.create_model("resnet18", num_classes=2).load_state_dict(
        load_file(tmp_path / "run" / "weights" / "classifier.safetensors")
    )


def test_layer_decay_reaches_the_optimiser(settings: dict[str, Any], tmp_path: Path) -> None:
    seen: dict[float, int] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                seen[round(group["lr"] / module.rate, 6)] = len(group["params"])

    pretrained(tmp_path / "pre", "resnet18")
    settings |= {"model": None, "image_size": None, "weights": tmp_path / "pre", "epochs": 0.5, "layer_decay": 0.5}
    sparkmim.finetune(**settings, callbacks=[Look()])
    assert sorted(seen) == [round(0.5**e, 6) for e in range(7, -1, -1)]


SINGLE = [(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_data": None}, "there are no validation images; put them in a folder val/ .* --val-split 0.2"),
        ({"model": None}, "no model given; --model names the network to train from scratch"),
        ({"weights": "nowhere"}, "nowhere does not exist"),
        ({"recipe": "best"}, "there is no recipe 'best'; choose one of default, convnext_small"),
        ({"freeze": True}, "freeze trains the head alone, so it needs --weights"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose lamb or adamw"),
        ({"mean": [0.5]}, r"mean has 1 value for 3 channels"),
        ({"data": SINGLE, "val_data": SINGLE}, "there is 1 class; a classifier needs 2 or more"),
    ],
)
def test_mistakes(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparkmim.finetune(**{**settings, **change})
    assert not Path(settings["out"]).exists()


def test_a_classifier_of_other_classes_is_a_start_too(tmp_path: Path, network: str) -> None:
    """What no feature map depends on may be left out: a head of another size."""
    from sparkmim.interop.weights import write

    source = timm.create_model("resnet18", num_classes=7)
    metadata = {"model": "resnet18", "classes": list("abcdefg"), "channels": 3, "image_size": [64, 64]}
    write(source, tmp_path / "seven.safetensors", WeightsMetadata(**metadata))
    target = create_classifier("resnet18", 3)
    head = target.state_dict()["fc.weight"].clone()
    open_weights(tmp_path / "seven.safetensors").load_into_encoder(target)
    assert torch.equal(target.state_dict()["layer4.1.conv2.weight"], source.state_dict()["layer4.1.conv2.weight"])
    assert torch.equal(target.state_dict()["fc.weight"], head)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    pretrained(tmp_path / "pre", "resnet18")
    with pytest.raises(ValueError, match=r"do not fit this model"):
        open_weights(tmp_path / "pre").load_into_encoder(create_classifier("resnet34", 3))
    assert replace(FINETUNE_RECIPES["default"], epochs=3).epochs == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_all_commands_agree_on_the_channels_of_arrays(channels: int, network: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(5):
            shape = (20, 20) if channels == 1 else (20, 20, channels)
            np.save(tmp_path / "data" / name / f"{number}.npy", generator.normal(300, 50, shape))
    data, run, here = str(tmp_path / "data"), tmp_path / "run", {"workers": 0, "accelerator": "cpu"}
    learn = {"model": network, "image_size": 16, "val_split": 0.2, "epochs": 1, "warmup_epochs": 0, **here}
    with pytest.raises(UserError, match=rf"0\.npy: is of shape .*; for channels {4 - channels} "):
        sparkmim.finetune(data=data, out=tmp_path / "other", channels=4 - channels, **learn)
    assert not (tmp_path / "other").exists()
    sparkmim.finetune(data=data, out=run, channels=channels, **learn)
    assert open_weights(run).metadata.channels == channels
    assert open_weights(run).metadata.mean == pytest.approx([300] * channels, rel=0.05)
    assert sparkmim.evaluate(data=data, weights=run, val_split=0.2, k=1, **here).unreadable == []
    predicted = sparkmim.predict(images=data, weights=run, out=tmp_path / "classes.csv", **here)
    assert (predicted.images, predicted.unreadable) == (10, [])
    assert sparkmim.embed(images=data, weights=run, out=tmp_path / "features.npy", **here).shape == (10, 16)


def test_colour_weights_for_grey_images(settings: dict[str, Any], tmp_path: Path) -> None:
    pretrained(tmp_path / "pre", settings["model"])
    for images in (settings["data"], settings["val_data"]):
        images.images = [image[:1] for image in images.images]
    sparkmim.finetune(**{**settings, "weights": tmp_path / "pre", "channels": 1, "epochs": 1})
    known = open_weights(settings["out"]).metadata
    assert (known.channels, len(known.mean or ())) == (1, 1)
