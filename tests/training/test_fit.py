"""What the trainings share: how long a run is, and clipping."""

from __future__ import annotations

import argparse
import functools
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparkmim
from sparkmim import cli
from sparkmim.models import SparK, create_encoder
from sparkmim.training.detect import Detection
from sparkmim.training.modules import ClassifyModule, OptimizerSettings, PretrainModule, ScheduledModule, decayed_groups
from sparkmim.training.plan import Plan, plan_for
from sparkmim.training.settings import PretrainSettings, resumed

OPTIMIZER = OptimizerSettings("adamw", 0.1, (0.9, 0.999), 0.05, 0.05, clip_grad=0.0, steps=1, warmup=0)

# Mixing


def test_all_images_of_an_odd_batch_but_one_are_mixed() -> None:
    seen: list[Any] = []

    class Seeing(nn.Linear):
        def forward(self, images: Any) -> Any:
            seen.append(images.clone())
            return super().forward(images.flatten(1))

    module = ClassifyModule(Seeing(3, 2), OPTIMIZER, 0, 2, 1.0, 1.0, 0.0, 0.1, "ce", freeze=False)
    images, labels = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 1, 1), torch.tensor([0, 1, 1, 0, 1])
    np.random.seed(0)  # noqa: NPY002
    loss = module.training_step({"image": images.clone(), "label": labels}, 0)
    mixed = seen[0][:, 0, 0, 0]
    share = (mixed[0] / -3 + 1).item()  # of the image itself; the rest is its partner's
    assert 0.01 < share < 0.99
    torch.testing.assert_close(mixed, share * images[:, 0, 0, 0] + (1 - share) * torch.tensor([3.0, 2, 1, 0, 4]))
    first = 0.05 + 0.9 * torch.tensor([[1.0, 0]] * 4 + [[0, 1]])
    first[1:3] = 0.05 + 0.9 * torch.tensor([0.0, 1])
    expected = -(first * module.model(seen[0]).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


# Resuming

SAVED = {"model": "resnet18", "flip": 0.0, "accumulate": 4, "workers": 3, "precision": "bf16-mixed", "out": "there"}


def resume(given: set[str], **changes: Any) -> dict[str, Any]:
    """Resumes a run of these settings, of which the batch size was settled, with some arguments given."""
    asked = {**SAVED, "out": "run", "resume": True, "batch_size": None, **changes}
    settled = {**SAVED, "batch_size": 16}
    saved = {**SAVED, "batch_size": None}
    return resumed(PretrainSettings, asked, frozenset({"out", "resume", *given}), saved, settled, ())


def test_what_is_given_holds_even_where_it_is_the_default() -> None:
    """And what is left open does not."""
    found = resume({"precision", "workers", "callbacks"}, accumulate=1, workers=2, precision="auto")
    assert found == {**SAVED, "out": "run", "resume": True, "workers": 2, "batch_size": None}
    assert resume(set(), workers=2)["workers"] == 3
    with pytest.raises(ValueError, match="other settings: accumulate is 4 there and 1 here; leave them out"):
        resume({"accumulate"}, accumulate=1)


def test_what_was_left_open_is_compared_as_it_was_settled() -> None:
    assert resume({"batch_size"}, batch_size=16)["batch_size"] is None
    with pytest.raises(ValueError, match="batch_size is 16 there and 8 here"):
        resume({"batch_size"}, batch_size=8)


def test_the_command_line_tells_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def pretrain(
        *, data: str | None = None, workers: int | None = None, flip: float = 0.5, resume: bool = False
    ) -> Any:
        """Stands for the command of this name."""

    def recorded(**given: Any) -> Any:
        called.update(given)
        return argparse.Namespace(finished=True)

    functools.update_wrapper(recorded, pretrain)
    monkeypatch.setitem(cli.COMMANDS, "pretrain", recorded)
    cli.main(["pretrain", "--resume", "--flip", "0.5", "--data=null"])
    assert called == {"resume": True, "flip": 0.5, "data": None}


# How long


def length(recipe: str, images: int, **given: Any) -> Plan:
    """The plan of a detection with some arguments given."""
    parameters = inspect.signature(sparkmim.detect).parameters
    asked = {name: parameter.default for name, parameter in parameters.items()}
    asked |= {"out": "run", "model": "resnet18", "recipe": recipe, "accelerator": "cpu", **given}
    settings = Detection().settle(asked, {}, None)
    if "iterations" in given:
        assert settings.epochs is None
    return plan_for(settings, "batch_size" not in given, images, settings.iterations)


@pytest.mark.parametrize("more", [{}, {"batch_size": 8}, {"devices": 4}, {"accumulate": 3}])
def test_iterations_are_steps_whatever_the_batch(more: dict[str, Any]) -> None:
    plan = length("default", 120, iterations=1000, **more)
    assert plan.steps == 1000
    assert plan.batch_size == more.get("batch_size", plan.batch_size)


def test_epochs_go_before_the_iterations_of_a_recipe() -> None:
    assert length("resnet50_1x", 160, epochs=2.5, batch_size=16).steps == 25
    assert length("resnet50_1x", 160).steps == 90_000


def test_two_lengths_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="epochs 3 and iterations 100 both say how long to train; give one"):
        length("default", 10, epochs=3, iterations=100)


# What decays


@pytest.mark.parametrize("name", ["convnext_atto", "torchvision/convnext_tiny"])
def test_layer_scale_does_not_decay(name: str) -> None:
    """Whatever its shape; and neither do biases, norms and mask tokens."""
    model = SparK(create_encoder(name), image_size=64, decoder_width=32)
    module = PretrainModule(model, OPTIMIZER, seed=0)
    names = {parameter: key for key, parameter in model.named_parameters()}
    groups = module.parameter_groups()
    decaying = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    scales = {key for key in names.values() if key.endswith((".gamma", ".layer_scale"))}
    assert len(scales) >= 12
    assert decaying == {
        key for parameter, key in names.items() if parameter.ndim > 1 and key not in scales and "mask_token" not in key
    }
    exponents = dict.fromkeys((key for key, _ in model.encoder.named_parameters()), 0)
    of_classes = [group for group in decayed_groups(model.encoder, exponents, 0.7) if group["weight_decay"]]
    found = {names[parameter] for group in of_classes for parameter in group["params"]}
    assert found == {key for key in decaying if key.startswith("encoder.")}


# Clipping


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (1.0, 1.0), (9.0, 5.0)])
def test_gradients_are_clipped_unless_the_limit_is_0(limit: float, expected: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    module = ScheduledModule(model, replace(OPTIMIZER, clip_grad=limit), seed=0)
    module.configure_gradient_clipping(torch.optim.SGD(model.parameters(), 0.1))
    assert module.grad_norm == 5
    assert model.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_a_warm_up_that_nobody_asked_for_fits_the_run() -> None:
    """Of a run that is no longer than a recipe's, it takes a tenth; what was asked for stays."""
    settings = argparse.Namespace(warmup_iterations=100)
    plan = Plan(1, 1, 4, 10, 40)
    assert plan.warmup(settings, 100) == 4  # type: ignore[arg-type]
    assert plan.warmup(argparse.Namespace(warmup_iterations=60), 100) == 60  # type: ignore[arg-type]
    assert Plan(1, 1, 4, 10, 101).warmup(settings, 100) == 100  # type: ignore[arg-type]


def test_what_python_passes_is_checked_before_anything_is_written(photos: Any, network: str, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"model": network, "image_size": 32, "out": tmp_path / "run"}
    with pytest.raises(sparkmim.UserError, match="data is a dataset without items"):
        sparkmim.pretrain(data=[], **settings)
    with pytest.raises(sparkmim.UserError, match="callbacks holds 3; they are Lightning's"):
        sparkmim.pretrain(data=photos, callbacks=[3], **settings)  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()
    model = SparK(create_encoder("test_resnet"), 64)
    for images in (torch.zeros(2, 1, 64, 64), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(sparkmim.UserError, match="but this model takes 3 channels, normalised, as floats"):
            model(images)
