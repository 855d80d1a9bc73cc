"""Pretraining from Python: what a run leaves behind, that it can be repeated and resumed, and what it refuses."""

from __future__ import annotations

import copy
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import Dataset

import sparkmim
from sparkmim.cli import main
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.dataset import HeldOutDataset
from sparkmim.data.discovery import find_images
from sparkmim.data.held_out import hold_out, names_of
from sparkmim.interop import weights
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.results import PretrainResult
from sparkmim.runs.history import read_history, settled_settings
from sparkmim.training.modules import NonFiniteLoss
from sparkmim.training.schedules import learning_rate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "decoder_width": 16, "batch_size": 8, "epochs": 4, "warmup_epochs": 1,
    "learning_rate": 0.5, "workers": 0, "log_every": 1, "picture_every": 2, "precision": "32-true",
    "val_split": 0.0,
}  # fmt: skip


def pretrain(photos: Path | None, network: Any, out: Path, **settings: Any) -> PretrainResult:
    data = {} if photos is None else {"data": str(photos)}
    return sparkmim.pretrain(**{**SMALL, **data, "model": network, "out": out, **settings})


class StopAt(pl.Callback):
    """Asks the run to stop after a step, as a signal would."""

    def __init__(self, step: int, number: int = 15) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            import os

            os.kill(os.getpid(), self.number)


def scalars(out: Path, name: str = "loss") -> dict[int, float]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def settled(out: Path) -> Any:
    return settled_settings(read_history(out / "history.jsonl"))


def same_weights(a: Path, b: Path) -> bool:
    one, two = (load_file(folder / "weights" / "spark.safetensors") for folder in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_learns_and_leaves_what_it_promises(photos: Path, network: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = pretrain(photos, network, out, epochs=12)
    assert result.finished
    assert result.step == result.steps == 36
    losses = scalars(out)
    assert sorted(losses) == list(range(1, 37))
    assert sum(losses[step] for step in range(34, 37)) < 0.9 * sum(losses[step] for step in range(1, 4))
    for name in ("learning_rate", "weight_decay", "gradient_norm", "images_per_second"):
        assert len(scalars(out, name)) == 36
    assert scalars(out, "weight_decay")[1] == pytest.approx(0.04)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert len(events.Images("input, masked, reconstruction")) == 6

    asked, settings = yaml.safe_load((out / "config.yaml").read_text()), settled(out)
    assert asked["epochs"] == settings["epochs"] == 12
    assert (asked["beta2"], settings["beta2"]) == (None, 0.95)
    assert (asked["mean"], settings["mean"]) == (None, [0.485, 0.456, 0.406])
    assert (asked["accelerator"], settings["accelerator"]) == ("auto", device_named("auto").type)
    assert "epoch 12/12" in (out / "log.txt").read_text()
    assert (out / "checkpoints" / "last.ckpt").is_file()

    encoder = load_file(out / "weights" / "encoder.safetensors")
    fresh = sparkmim.SparK(network, 32, patch_size=8, decoder_width=16).encoder
    fresh.load_state_dict(encoder)  # strict
    assert not torch.equal(
        encoder["stem.0.weight"], sparkmim.SparK(network, 32, decoder_width=16).encoder.stem[0].weight
    )
    again = sparkmim.load(out)
    assert again.grid == (4, 4)
    images, visible = torch.randn(2, 3, 32, 32), again.draw_visible(2)
    with torch.no_grad():
        torch.testing.assert_close(again(images, visible).loss, result.model(images, visible).loss)


def test_exported_weights_load_strictly_into_timm(photos: Path, tmp_path: Path) -> None:
    pretrain(photos, "resnet10t", tmp_path / "run", image_size=64, patch_size=32, decoder_width=32, epochs=1,
             batch_size=12)  # fmt: skip
    model = timm.create_model("resnet10t", num_classes=0)
    model.load_state_dict(load_file(tmp_path / "run" / "weights" / "encoder.safetensors"), strict=True)


class Volumes(Dataset[dict[str, Tensor]]):
    """Sixteen small volumes of two channels, in units of their own."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ramps = torch.linspace(0, 1, 12) * torch.rand(2, 1, 1, 1, generator=generator)
        return {"image": 300 * ramps.expand(2, 10, 14, 12) - 100, "label": torch.tensor(index)}


def test_a_dataset_of_volumes_and_resuming_it(tmp_path: Path) -> None:
    """From Python, with a network in hand; means and deviations are measured once, and kept."""
    network = nn.Sequential(nn.Conv3d(2, 8, 3, 2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv3d(8, 16, 2, 2))
    settings = {"data": Volumes(), "channels": 2, "image_size": [8, 16, 8], "patch_size": 4, "epochs": 2}
    whole = pretrain(None, copy.deepcopy(network), tmp_path / "whole", **settings)
    assert whole.step == 4
    stopped = pretrain(None, copy.deepcopy(network), tmp_path / "run", **settings, callbacks=[StopAt(2)])
    assert not stopped.finished
    saved = settled(tmp_path / "run")
    assert all(-100 < mean < 200 for mean in saved["mean"])
    assert saved["flip"] == 0.0
    resumed = sparkmim.pretrain(out=tmp_path / "run", resume=True, data=Volumes(), model=copy.deepcopy(network))
    assert resumed.finished
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_recipes_batch_shrinks_to_the_images_there_are(photos: Path, network: str, tmp_path: Path) -> None:
    """The default recipe's 128 are more than these 24; what is in force is saved, so that resuming agrees."""
    result = pretrain(photos, network, tmp_path / "run", batch_size=None, accumulate=5, epochs=2)
    assert result.steps == 2
    assert settled(tmp_path / "run")["batch_size"] == 20


def test_two_runs_with_one_seed_agree_to_the_bit(photos: Path, network: str, tmp_path: Path) -> None:
    # The results are kept, and with them Lightning's trainer.
    results = [pretrain(photos, network, tmp_path / name, workers=workers) for name, workers in (("a", 0), ("b", 2))]
    assert len(results) == 2
    assert not multiprocessing.active_children()  # Python would wait for loader workers when it exits
    pretrain(photos, network, tmp_path / "c", seed=1)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert scalars(tmp_path / "a") == scalars(tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(("accumulate", "stop"), [(1, 5), (2, 6), (1, 3)])
def test_a_stopped_run_resumes_as_if_it_had_never_stopped(
    photos: Path, network: str, tmp_path: Path, accumulate: int, stop: int
) -> None:
    settings = {"accumulate": accumulate, "ema": 0.9}
    whole = pretrain(photos, network, tmp_path / "whole", **settings)
    part = pretrain(photos, network, tmp_path / "part", callbacks=[StopAt(stop)], **settings)
    assert (part.step, part.finished) == (stop, False)
    resumed = sparkmim.pretrain(out=tmp_path / "part", resume=True)
    assert resumed.step == whole.step == 12
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "part")
    averages = [load_file(tmp_path / run / "weights" / "spark_ema.safetensors") for run in ("whole", "part")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def validations(out: Path) -> dict[tuple[str, int], float]:
    """Held-out losses by weights and step."""
    events = (event for event in read_history(out / "history.jsonl") if event.kind == "validation")
    return {(event.fields["weights"], event.step): event.fields["figures"]["loss"] for event in events}


class Recording(Dataset[Tensor]):
    """Images of noise, which notes those that are read with gradients, as in training, and without."""

    def __init__(self, count: int) -> None:
        self.images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        self.seen: dict[bool, set[int]] = {True: set(), False: set()}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        self.seen[torch.is_grad_enabled()].add(place)
        return self.images[place]


def test_held_out_images_are_never_trained_on(network: str, tmp_path: Path) -> None:
    data = Recording(40)
    pretrain(None, network, tmp_path / "run", data=data, val_split=0.25, picture_every=0)
    assert len(data.seen[False]) == 10
    assert data.seen[True] == set(range(40)) - data.seen[False]


def test_the_held_out_loss(photos: Path, network: str, tmp_path: Path) -> None:
    """Before the first step and after every epoch, of the model and its average, in evaluation mode."""
    settings = {"val_split": 0.34, "ema": 0.9, "epochs": 2}
    result = pretrain(photos, network, tmp_path / "run", **settings)
    found = validations(tmp_path / "run")
    assert result.steps == 4
    assert set(found) == {(weights, step) for weights in ("model", "ema") for step in (0, 2, 4)}
    assert settled(tmp_path / "run")["val_split"] == pytest.approx(8 / 24)
    assert scalars(tmp_path / "run", "val/loss") == pytest.approx({s: v for (w, s), v in found.items() if w == "model"})
    assert scalars(tmp_path / "run", "val/ema_loss")[4] == pytest.approx(found["ema", 4])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["loss"] == found["model", 4]
    assert "validation: loss" in (tmp_path / "run" / "log.txt").read_text()

    opened = open_weights(tmp_path / "run").spark().eval()
    items = find_images(photos)
    _, held, names = hold_out(items, names_of(items, photos), 0.34)
    dataset = HeldOutDataset(held, eval_transform((32, 32), crop=1.0), opened.grid, 0.6, names=names)
    samples = [dataset[0, place] for place in range(8)]
    with torch.no_grad():
        loss = opened(*(torch.stack([sample[name] for sample in samples]) for name in ("image", "visible"))).loss
    assert loss.item() == pytest.approx(found["model", 4], rel=1e-5)


def test_the_held_out_loss_of_a_resumed_run(photos: Path, network: str, tmp_path: Path) -> None:
    for name, callbacks in (("whole", []), ("part", [StopAt(3)])):
        pretrain(photos, network, tmp_path / name, val_split=0.3, callbacks=callbacks)
    sparkmim.pretrain(out=tmp_path / "part", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    assert validations(tmp_path / "whole") == validations(tmp_path / "part")


def test_weights_and_checkpoints_are_kept(photos: Path, network: str, tmp_path: Path) -> None:
    """Each is what a run of that length in the same schedule had then."""
    out = tmp_path / "run"
    pretrain(photos, network, out, keep_every=2, ema=0.9, val_split=0.2, keep_best="val_loss", epochs=6)
    kept = [f"{name}_epoch{epoch:04d}" for name in ("encoder", "spark") for epoch in (2, 4, 6)]
    kept += [name.replace("_", "_ema_") for name in kept]
    last = [name.rpartition("_")[0] for name in kept if name.endswith("6")]
    best = {path.stem for path in (out / "weights").glob("*_best.safetensors")}
    assert {path.stem for path in (out / "weights").iterdir()} - best == {*kept, *last}
    one, two = (load_file(out / "weights" / f"spark{end}.safetensors") for end in ("", "_epoch0006"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "epoch0002.ckpt", "epoch0004.ckpt", "epoch0006.ckpt", "last.ckpt", "previous.ckpt",
    ]  # fmt: skip
    part = pretrain(photos, network, tmp_path / "part", ema=0.9, val_split=0.2, epochs=6, callbacks=[StopAt(8)])
    assert part.step == 8
    early, stopped = (
        load_file(path / "weights" / name)
        for path, name in ((out, "spark_epoch0004.safetensors"), (tmp_path / "part", "spark.safetensors"))
    )
    assert all(torch.equal(early[name], stopped[name]) for name in early)


def test_a_run_is_made_longer(photos: Path, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest follows the schedule of the new length."""
    out = tmp_path / "run"
    pretrain(photos, network, out, callbacks=[StopAt(6)])
    longer = sparkmim.pretrain(out=out, resume=True, epochs=8)
    assert "the run has 24 steps now, instead of 12: its learning rate goes from " in capsys.readouterr().err
    assert (longer.step, longer.finished) == (24, True)
    rates = scalars(out, "learning_rate")
    for step, rate in rates.items():
        length = 12 if step <= 6 else 24
        assert rate == pytest.approx(learning_rate(step - 1, length, 3, 0.5 * 8 / 256), rel=1e-5)
    assert sparkmim.pretrain(out=out, resume=True, epochs=10).step == 30  # also after its end
    with pytest.raises(ValueError, match=r"stands at step 30, and epochs 2 are 6 steps; give 10 epochs or more"):
        sparkmim.pretrain(out=out, resume=True, epochs=2)


def test_a_run_from_before_images_were_set_apart_goes_on_with_all(photos: Path, network: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(photos, network, out, callbacks=[StopAt(5)])
    for file in (out / "history.jsonl", out / "config.yaml"):
        text = file.read_text()
        assert "val_split" in text
        file.write_text(text.replace('"val_split": 0.0, ', "").replace("val_split: 0.0\n", ""))
    assert sparkmim.pretrain(out=out, resume=True).step == 12
    assert not validations(out)


def test_validation_images_of_their_own(photos: Path, network: str, tmp_path: Path) -> None:
    parts = photos / "part0", photos / "part1"
    result = pretrain(parts[0], network, tmp_path / "run", val_data=str(parts[1]), val_split=None, epochs=1)
    assert result.steps == 1
    assert set(validations(tmp_path / "run")) == {("model", 0), ("model", 1)}
    with pytest.raises(ValueError, match="val_data and val_split both say what to validate on; give one"):
        pretrain(parts[0], network, tmp_path / "other", val_data=str(parts[1]), val_split=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch.compile itself
def test_several_folders_and_files_are_one_data_set(photos: Path, network: str, tmp_path: Path) -> None:
    parts = [photos / "part0", photos / "part1", sorted((photos / "part0").iterdir())[0]]  # the last one again
    result = sparkmim.pretrain(
        **{**SMALL, "val_split": 0.25, "epochs": 2}, data=parts, model=network, out=tmp_path / "run",
        callbacks=[StopAt(3)],
    )  # fmt: skip
    saved = yaml.safe_load((result.out / "config.yaml").read_text())
    assert saved["data"] == [str(part) for part in parts]
    start = read_history(result.out / "history.jsonl")[0]
    assert start.fields["data"]["images"] == 18
    main(["pretrain", "--out", str(result.out), "--resume", "--data", *map(str, parts)])
    last = read_history(result.out / "history.jsonl")[-1]
    assert (last.kind, last.step) == ("finish", 4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it, and says so
def test_saving_memory_and_compiling_change_nothing(photos: Path, network: str, tmp_path: Path) -> None:
    """And a run may go on with or without either."""
    pretrain(photos, network, tmp_path / "plain")
    pretrain(photos, network, tmp_path / "saving", checkpoint_gradients=True, callbacks=[StopAt(5)])
    sparkmim.pretrain(out=tmp_path / "saving", resume=True, checkpoint_gradients=False)
    assert same_weights(tmp_path / "plain", tmp_path / "saving")
    pretrain(photos, network, tmp_path / "compiled", compile=True, checkpoint_gradients=True, callbacks=[StopAt(5)])
    sparkmim.pretrain(out=tmp_path / "compiled", resume=True, compile=False)
    losses = [list(scalars(tmp_path / run).values()) for run in ("plain", "compiled")]
    assert len(losses[0]) == len(losses[1]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_machine_that_cannot_compile(
    photos: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="compile does not work on this machine: No working C.. compiler found"):
        pretrain(photos, network, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


def test_accumulation_adds_up_to_the_same_step(photos: Path, tmp_path: Path) -> None:
    """Without BatchNorm, a step in two parts is the step in one, but for rounding."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 8, 3, 2, 1))

    losses = []
    for parts in (1, 2):
        pretrain(photos, make(), tmp_path / f"{parts}", accumulate=parts, callbacks=[EvalBatchNorm()])
        losses.append(scalars(tmp_path / f"{parts}"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class EvalBatchNorm(pl.Callback):
    """Fixes statistics, which depend on how a batch is split."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()


def test_unreached_parameters_keep_out_of_the_optimiser(photos: Path, network: str, tmp_path: Path) -> None:
    model = sparkmim.SparK(network, 32, decoder_width=16).encoder
    before = {name: parameter.clone() for name, parameter in model.fc.named_parameters()}

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert not held & {id(p) for p in model.fc.parameters()}
            decayed = {
                id(p) for group in trainer.optimizers[0].param_groups if group["decays"] for p in group["params"]
            }
            for name, parameter in module.model.named_parameters():
                plain = parameter.ndim <= 1 or "mask_token" in name
                assert id(parameter) not in decayed or not plain

    pretrain(photos, model, tmp_path / "run", epochs=1, callbacks=[Look()])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.fc.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_dataset_from_python(tmp_path: Path, network: str) -> None:
    class Noise(Dataset[Tensor]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(1, 40, 50, generator=torch.Generator().manual_seed(index))

    result = pretrain(None, network, tmp_path / "run", data=Noise(), channels=1, epochs=1)
    assert result.finished
    with pytest.raises(ValueError, match="started from Python objects; pass data again"):
        sparkmim.pretrain(out=tmp_path / "run", resume=True)


def test_unreadable_images_are_skipped_and_named(photos: Path, network: str, tmp_path: Path) -> None:
    bad = photos / "part0" / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff no picture")
    large = photos / "part1" / "large.png"
    Image.new("RGB", (41, 41)).save(large)
    pretrain(photos, network, tmp_path / "run", max_megapixels=40 * 40 / 1e6, epochs=1, workers=1)
    assert str(bad) in (tmp_path / "run" / "log.txt").read_text()
    sparkmim.pretrain(out=tmp_path / "run", resume=True, epochs=2)
    events = read_history(tmp_path / "run" / "history.jsonl")
    named = [event.fields["image"] for event in events if event.kind == "unreadable"]
    assert named.count(str(large)) == 2  # the limit is kept
    for index in range(12):
        (photos / f"broken{index}.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"unreadable .*more than the 10.0% allowed"):
        pretrain(photos, network, tmp_path / "second")


def test_divergence_names_step_rate_and_checkpoint(photos: Path, network: str, tmp_path: Path) -> None:
    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    next(module.parameters()).fill_(float("nan"))

    out = tmp_path / "run"
    with pytest.raises(
        NonFiniteLoss, match=r"nan at step \d+ with learning rate .* last good checkpoint is .*last.ckpt"
    ):
        pretrain(photos, network, out, save_minutes=1e-9, callbacks=[Break()])
    assert all(tensor.isfinite().all() for tensor in load_file(out / "weights" / "spark.safetensors").values())


def test_an_infinite_gradient_of_the_last_step_is_told(photos: Path, network: str, tmp_path: Path) -> None:
    class Break(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                next(parameter.grad for parameter in module.parameters() if parameter.grad is not None).fill_(torch.inf)

    with pytest.raises(NonFiniteLoss, match="the gradient norm became inf at step 3 with learning rate"):
        pretrain(photos, network, tmp_path / "run", epochs=1, warmup_epochs=0, callbacks=[Break()])
    assert not (tmp_path / "run" / "weights").exists()


def test_initial_weights(photos: Path, network: str, tmp_path: Path) -> None:
    first = pretrain(photos, network, tmp_path / "first", epochs=1)
    seen: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append({name: tensor.clone() for name, tensor in module.model.state_dict().items()})

    pretrain(
        photos, network, tmp_path / "second", epochs=1, seed=5, init_weights=tmp_path / "first", callbacks=[Look()]
    )
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in first.model.state_dict().items())
    with pytest.raises(ValueError, match="do not fit this model"):
        pretrain(photos, "resnet10t", tmp_path / "third", image_size=64, patch_size=32, decoder_width=32,
                 init_weights=tmp_path / "first")  # fmt: skip


def test_weight_files_tell_how_to_build_the_model(photos: Path, network: str, tmp_path: Path) -> None:
    pretrain(photos, network, tmp_path / "run", epochs=1)
    metadata = weights.open_weights(tmp_path / "run" / "weights" / "encoder.safetensors").metadata
    assert metadata.model == network
    assert metadata.image_size == [32, 32]
    assert json.dumps(metadata.to_json())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"1234")
    for path, message in ((broken, "is no safetensors file, or is damaged"), (tmp_path / "no", "does not exist"),
                          (tmp_path, "is a folder without weights")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            weights.open_weights(path)


def test_nothing_is_overwritten(photos: Path, network: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(photos, network, out, epochs=1)
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume"):
        pretrain(photos, network, out, epochs=2)
    with pytest.raises(ValueError, match="decoder_width is 16 there and 32 here"):
        sparkmim.pretrain(out=out, resume=True, decoder_width=32)
    assert (out / "config.yaml").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        pretrain(photos, network, other)
    with pytest.raises(ValueError, match="holds no run to resume"):
        sparkmim.pretrain(out=tmp_path / "nowhere", resume=True)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint"):
        sparkmim.pretrain(out=out, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "papre"}, "no recipe 'papre'; did you mean paper"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose lamb or adamw"),
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"batch_size": 100}, "batch_size 100 is more than the 24 images there are; use 24 or less"),
        ({"accumulate": 3}, "batch_size 8 does not divide into 1 process.* use 6"),
        ({"image_size": 30}, "image_size 30×30 is not a multiple of the patch size 8; use 24×24 or 32×32"),
        ({"patch_size": 6}, "patch_size 6 is not a multiple of the encoder's stride 4; use 4 or 8"),
        ({"image_size": 8}, "holds a single patch"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"mean": [0.5]}, r"mean has 1 value for 3 channels"),
        ({"crop_scale": 0.0}, "crop_scale is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"flip": 2.0}, "flip is 2.0"),
        ({"decoder_width": 3}, "decoder_width 3, halved 2 times, leaves no channel; use 4"),
        ({"model": "resnet51x"}, "timm has no model named 'resnet51x'; did you mean"),
        ({"model": "torchvision/resnet5"}, "torchvision has no model named"),
        ({"model": "nowhere.py:net"}, "nowhere.py does not exist"),
        ({"channels": 2}, "holds image files only"),
        ({"data": "nowhere"}, "nowhere"),
        ({"init_weights": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    photos: Path, network: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(photos, network, out, **settings)
    assert not out.exists()
