"""The public functions that are commands too: their arguments and what they mean.

Nothing heavy is imported before a function runs; `sparkmim --help` is built from this file alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class PretrainResult:
    """What a pretraining run came to.

    Attributes:
        out: the run folder.
        step: optimiser steps done.
        steps: optimiser steps that the run has.
        loss: mean over the last epoch that was finished in this call.
        images_per_second: lately.
        model: the trained `SparK` model, in evaluation mode.
    """

    out: Path
    step: int
    steps: int
    loss: float
    images_per_second: float
    model: Any

    @property
    def finished(self) -> bool:
        """False if the run was interrupted; `resume=True` continues it."""
        return self.step >= self.steps


def pretrain(
    *,
    data: str | Any | None = None,
    out: str | Path,
    model: str | Any = "resnet50",
    recipe: str = "default",
    image_size: int | list[int] = 224,
    patch_size: int | None = None,
    channels: int = 3,
    stages: int | None = None,
    feature_modules: list[str] | None = None,
    mask_ratio: float | None = None,
    decoder: Literal["spark", "fcmae"] = "spark",
    decoder_width: int | None = None,
    drop_path: float | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    warmup_epochs: float | None = None,
    beta1: float = 0.9,
    beta2: float | None = None,
    weight_decay: float | None = None,
    weight_decay_end: float | None = None,
    clip_grad: float | None = None,
    ema: float = 0.0,
    crop_scale: float | None = None,
    flip: float | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_unreadable: float = 0.1,
    init_weights: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    precision: str = "auto",
    channels_last: bool = True,
    workers: int | None = None,
    save_minutes: float = 10.0,
    log_every: int = 10,
    picture_every: int = 10,
    callbacks: Sequence[Any] = (),
) -> PretrainResult:
    """Pretrain a convolutional network on unlabelled images.

    Hides most patches of every image, encodes the visible ones, and learns to rebuild the rest (SparK,
    ICLR 2023). Arguments left at None are decided by the recipe, or by the network.

    Args:
        data: folder of images or arrays (.npy, .npz, .nii) at any depth, a text file of paths, or (from Python) any
            Dataset
        out: run folder; must be new or empty unless resuming
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module
        recipe: default (thousands of images, one machine) or paper (ImageNet at 224)
        image_size: side in pixels, or one size per axis: [height, width], [length] of signals, [depth, height, width]
        patch_size: side of a patch, a multiple of the network's total stride; None for that stride
        channels: image channels; other than 1 or 3 for arrays only
        stages: how many of the network's feature maps to use, from the shallowest on; fewer allow smaller patches
        feature_modules: the network's modules whose outputs are its feature maps; None to find them
        mask_ratio: share of patches that is hidden
        decoder: spark, hierarchical; or fcmae, the single block of ConvNeXt V2
        decoder_width: channels of the decoder at the deepest map; None for the recipe's, 512 for fcmae
        drop_path: stochastic depth rate, for networks that have one
        epochs: passes over the data
        batch_size: images per optimiser step, over all processes; a recipe's shrinks to the images there are
        accumulate: batches that make up one optimiser step, to save memory
        optimizer: lamb or adamw
        learning_rate: peak rate for 256 images per step; scales in proportion to batch_size
        warmup_epochs: epochs of linear warm-up
        beta1: decay of the optimiser's first moment
        beta2: decay of its second moment; None for 0.95 with BatchNorm networks, 0.999 with others
        weight_decay: at the start
        weight_decay_end: at the end, after a cosine
        clip_grad: largest global gradient norm
        ema: decay of an average of the weights, saved beside them; 0 for none
        crop_scale: smallest share of an image that a random crop covers
        flip: how often an image is mirrored left to right; None for 0.5, or 0 for signals and volumes
        mean: of each channel; None for ImageNet's with image files (in 0..1), measured with arrays (in their units)
        std: of each channel, as mean
        max_unreadable: share of unreadable images above which the run fails
        init_weights: run folder or weight file to start from; ours or an original SparK file
        resume: go on with the run in out, exactly where its last checkpoint stands
        seed: of everything random
        accelerator: auto, cpu or cuda
        devices: processes on this machine; auto for all GPUs, or one CPU process
        num_nodes: machines
        precision: auto, bf16-mixed or 32-true
        channels_last: keep weights and maps in channels-last memory, which is faster
        workers: loader processes
        save_minutes: minutes between checkpoints; one is saved at the end and on Ctrl-C too
        log_every: optimiser steps between scalars
        picture_every: epochs between pictures of reconstructions in TensorBoard; 0 for none
        callbacks: further Lightning callbacks (from Python)

    Returns:
        A `PretrainResult`: step, loss, speed, and the trained model.

    Raises:
        ValueError: if an argument cannot be met; says which and what would do. Nothing is written then.
        NonFiniteLoss: if training diverges.
    """
    settings = dict(locals())
    settings.pop("callbacks")
    from sparkmim.training.pretrain import run_pretraining

    assert pretrain.__kwdefaults__ is not None
    return run_pretraining(settings, pretrain.__kwdefaults__, callbacks)


def statistics(*, data: str | Any, channels: int = 3, axes: int = 2, samples: int = 1000) -> Any:
    """Measure the mean and standard deviation of every channel of your data.

    What to give `sparkmim pretrain` as mean and std; that command measures them itself for arrays, on fewer samples.

    Args:
        data: folder of images or arrays at any depth, a text file of paths, or (from Python) any Dataset
        channels: image channels
        axes: spatial axes: 1 for signals, 2 for images, 3 for volumes
        samples: how many to read at most, spread evenly over the data

    Returns:
        `ChannelStatistics`: mean, std, and how many samples they are of.

    Raises:
        ValueError: if nothing can be read, or a channel is constant.
    """
    from sparkmim.training.source import measure

    return measure(data, channels, axes, samples)


def verify(
    model: str | Any,
    image_size: int | list[int] | None = None,
    patch_size: int | None = None,
    channels: int = 3,
    stages: int | None = None,
    feature_modules: list[str] | None = None,
) -> Any:
    """Check that a network is computed exactly when most of its input is hidden.

    Runs it on visible patches alone, against its dense self and against the masked definition, forward and
    backward, in float64. Names the first module that differs. The network is not changed.

    Args:
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module
        image_size: side in pixels, or one size per axis; None for three patches per side
        patch_size: side of a patch; None for the network's total stride
        channels: image channels
        stages: how many of the network's feature maps to use, from the shallowest on
        feature_modules: the network's modules whose outputs are its feature maps; None to find them

    Returns:
        A `VerifyReport`: whether the network is exact, the worst relative error, and the module at fault.

    Raises:
        ValueError: if sizes do not divide, or the network has no feature hierarchy.
    """
    from sparkmim.models.verify import verify_encoder

    return verify_encoder(model, image_size, patch_size, channels, stages, feature_modules)
