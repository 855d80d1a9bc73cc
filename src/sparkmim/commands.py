"""Public functions, which are commands too.

Nothing heavy is imported before a function runs, so `sparkmim --help` is quick.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from sparkmim.arguments import MAX_MEGAPIXELS, check_arguments
from sparkmim.errors import UserError
from sparkmim.failures import told
from sparkmim.paths import check_paths
from sparkmim.results import (
    DetectResult,
    EmbedResult,
    EvaluationResult,
    ExportResult,
    FeaturesResult,
    FinetuneResult,
    NeighborsResult,
    PredictResult,
    PretrainResult,
    ReconstructResult,
    ReportResult,
    SegmentResult,
    VanishingResult,
)
from sparkmim.together import check_together

P = ParamSpec("P")
R = TypeVar("R")

_given: ContextVar[frozenset[str]] = ContextVar("_given")
"""Arguments passed explicitly; on resume, the others come from the run folder."""


def _command(function: Callable[P, R]) -> Callable[P, R]:
    """Checks the arguments of a command before it runs, and notes in `_given` which were passed.

    A `~` at the beginning of a path is replaced by the user's folder, and `max_megapixels` is set for all that reads
    images.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> R:
        args, kwargs = tuple(map(_at_home, args)), {name: _at_home(value) for name, value in kwargs.items()}
        bound = signature.bind(*args, **kwargs)
        check_arguments(function.__name__, bound.arguments)
        bound.apply_defaults()
        check_paths(function.__name__, bound.arguments)
        check_together(function.__name__, bound.arguments)
        token = _given.set(frozenset(kwargs))
        try:
            with told(), _limits(bound.arguments):
                return function(*args, **kwargs)
        finally:
            _given.reset(token)

    return checked


def _limits(arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Returns the context of a command that reads images."""
    if "max_megapixels" not in arguments:
        return nullcontext()
    from sparkmim.data.decoding import images_up_to

    return images_up_to(arguments["max_megapixels"])


def _at_home(value: Any) -> Any:
    """Expands `~`, in a list too; returns the same object if there is none."""
    if isinstance(value, str | Path) and str(value).startswith("~"):
        try:
            return type(value)(Path(value).expanduser())
        except RuntimeError as error:
            user, folder = str(value).partition("/")[0], f"./{value}"
            raise UserError(f"{user} is the home of no user here; for a folder of that name, write {folder}") from error
    if type(value) is list:
        found = [_at_home(item) for item in value]
        return found if any(one is not other for one, other in zip(found, value, strict=True)) else value
    return value


def _arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a training, without Python objects that are no settings."""
    names = [logger for logger in values["loggers"] if isinstance(logger, str)]
    return {**{name: value for name, value in values.items() if name != "callbacks"}, "loggers": names}


def _objects(loggers: Sequence[Any]) -> list[Any]:
    """Returns those loggers that are Python objects."""
    return [logger for logger in loggers if not isinstance(logger, str)]


def _taken(arguments: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Returns those arguments that a function takes."""
    return {name: arguments[name] for name in inspect.signature(function).parameters}


@_command
def pretrain(
    *,
    data: str | list[str] | Any | None = None,
    out: str | Path,
    model: str | Any = "resnet50",
    recipe: str = "default",
    val_data: str | list[str] | Any | None = None,
    val_split: float | None = None,
    probe: str | Any | None = None,
    probe_every: float | None = None,
    keep_best: Literal["val_loss", "probe"] | None = None,
    keep_every: int | None = None,
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
    jitter: float | None = None,
    contrast: float | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_unreadable: float = 0.1,
    max_megapixels: float = MAX_MEGAPIXELS,
    init_weights: str | Path | None = None,
    resume: bool = False,
    accept_changed_data: bool = False,
    seed: int = 0,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    precision: str = "auto",
    channels_last: bool = True,
    checkpoint_gradients: bool = False,
    compile: bool = False,
    workers: int | None = None,
    save_minutes: float = 10.0,
    max_minutes: float | None = None,
    log_every: int = 10,
    picture_every: int = 10,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[str | Any] = ("tensorboard",),
) -> PretrainResult:
    """Pretrain a convolutional network on unlabelled images.

    Hides most patches of every image, encodes the visible ones, and learns to rebuild the rest (SparK, ICLR 2023).
    The recipe or the network decides arguments left at None.

    Args:
        data: folder of images or arrays (.npy, .npz, .nii) at any depth, a text file of paths, or several of these,
            which make one data set; or (from Python) any Dataset
        out: run folder; must be new or empty unless resuming
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module
        recipe: default (thousands of images, one machine), contrast (the same, with a second loss of two views of each
            image), paper (ImageNet at 224) or paper_384 (with image_size 384)
        val_data: images to validate on, as data; None to set some of the data apart
        val_split: share of the data that is set apart by name, never trained on, to validate on; 0 for none; None for
            2 %, at least 32 images and at most 2,000, but never more than a tenth
        probe: labelled images to score frozen features on during the run: class folders, a CSV file of path and label,
            or (from Python) a dataset of (image, label)
        probe_every: epochs between probes; None for as often as 5 % of the time allows
        keep_best: also write the weights that are best by val_loss (the held-out loss) or probe (its linear classifier)
        keep_every: epochs between weights and checkpoints that are kept; None to keep the last alone
        image_size: side in pixels, or one size per axis: [height, width], [length] of signals, [depth, height, width]
        patch_size: side of a patch, a multiple of the network's total stride; None for that stride
        channels: image channels; other than 1 or 3 for arrays only
        stages: number of feature maps to use, from the shallowest on; fewer allow smaller patches
        feature_modules: names of the modules whose outputs are the feature maps; None to find them
        mask_ratio: share of hidden patches
        decoder: spark (hierarchical) or fcmae (the single block of ConvNeXt V2)
        decoder_width: channels of the decoder at the deepest map; None for the recipe's, 512 for fcmae
        drop_path: stochastic depth rate, for networks that have it
        epochs: passes over the data; a run that is resumed may be made longer
        batch_size: images per optimiser step, over all processes; a recipe's value shrinks to fit small data sets
        accumulate: batches per optimiser step, to save memory
        optimizer: lamb or adamw
        learning_rate: peak rate for 256 images per step; scales linearly with batch_size
        warmup_epochs: epochs of linear warm-up
        beta1: decay of the optimiser's first moment
        beta2: decay of the optimiser's second moment; None for 0.95 with BatchNorm networks, 0.999 with others
        weight_decay: weight decay at the start
        weight_decay_end: weight decay at the end, after a cosine
        clip_grad: maximum gradient norm; 0 disables clipping
        ema: decay of the moving average of the weights, saved beside them; 0 for none
        crop_scale: smallest share of an image's area in a random crop
        flip: probability of mirroring left to right; None for 0.5, or 0 for signals and volumes
        jitter: strength of random changes of colour; 0 for none
        contrast: weight of a second loss, by which two views of an image find each other in the batch; 0 for none
        mean: mean of each channel; None for ImageNet's for image files (in 0..1), measured for arrays (in their units)
        std: standard deviation of each channel, as mean
        max_unreadable: largest share of unreadable images
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        init_weights: run folder, weight file, or original SparK file to start from
        resume: continue the run in out from its last checkpoint
        accept_changed_data: on resuming, whether images may be missing or new
        seed: seed of everything random
        accelerator: auto, cpu or cuda
        devices: processes on each machine; auto for all GPUs, or one CPU process
        num_nodes: number of machines
        precision: auto, bf16-mixed or 32-true
        channels_last: use channels-last memory, which is faster
        checkpoint_gradients: compute activations again in the backward pass, to save memory
        compile: run decoder and loss under torch.compile; needs a C++ compiler
        workers: loader processes of each process; None to share out the cores
        save_minutes: minutes between checkpoints; the end and Ctrl-C save one too
        max_minutes: minutes after which the run is saved and stops, as after Ctrl-C; None for no limit
        log_every: optimiser steps between logged scalars
        picture_every: epochs between pictures of reconstructions; 0 for none
        callbacks: further Lightning callbacks (from Python)
        loggers: tensorboard, csv, wandb and mlflow, any of them; or (from Python) Lightning loggers

    Returns:
        A `PretrainResult` with step, loss, speed, and the trained model.

    Raises:
        ValueError: if an argument cannot be met; nothing is written then.
        NonFiniteLoss: if training diverges.
    """
    asked = _arguments(locals())
    from sparkmim.training.pretrain import run_pretraining

    return run_pretraining(asked, _given.get(), callbacks, _objects(loggers))


@_command
def finetune(
    *,
    data: str | Any | None = None,
    out: str | Path,
    weights: str | Path = "none",
    model: str | Any | None = None,
    recipe: str = "default",
    val_data: str | Any | None = None,
    val_split: float | None = None,
    freeze: bool = False,
    fit_head: bool = False,
    image_size: int | list[int] | None = None,
    channels: int | None = None,
    feature_modules: list[str] | None = None,
    drop_path: float | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    layer_decay: float | None = None,
    warmup_epochs: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float | None = None,
    clip_grad: float | None = None,
    loss: Literal["bce", "ce"] | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    smoothing: float | None = None,
    repeats: int | None = None,
    augment: Literal["trivial", "auto", "none"] | None = None,
    erase: float | None = None,
    crop_scale: float | None = None,
    flip: float = 0.5,
    eval_crop: float | None = None,
    ema: float | None = None,
    eval_every: float = 1.0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_unreadable: float = 0.1,
    max_megapixels: float = MAX_MEGAPIXELS,
    resume: bool = False,
    accept_changed_data: bool = False,
    seed: int = 0,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    precision: str = "auto",
    channels_last: bool = True,
    workers: int | None = None,
    save_minutes: float = 10.0,
    max_minutes: float | None = None,
    log_every: int = 10,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[str | Any] = ("tensorboard",),
) -> FinetuneResult:
    """Train a classifier from pretrained weights, or from scratch.

    The recipe or the weights decide arguments left at None.

    Args:
        data: folder with train/ and val/, each with a folder per class; or with a folder per class itself; a CSV file
            of path and label (and split); or (from Python) any Dataset of (image, label)
        out: run folder; must be new or empty unless resuming
        weights: run folder, weight file, or original SparK file to start from; none to train from scratch
        model: network, as for pretrain; None for that of the weights
        recipe: default (small data, one machine), or the paper's for ImageNet: convnext_small, convnext_base,
            convnext_large, convnext_large_384, resnet50, resnet101, resnet152, resnet200
        val_data: validation images elsewhere, in any form that data takes
        val_split: share of every class to set apart for validation, if there are no validation images
        freeze: train the head only, on fixed features
        fit_head: begin with the head that suits the pretrained features best (logistic regression; LP-FT,
            arXiv:2202.10054)
        image_size: side in pixels, or one size per axis
        channels: image channels
        feature_modules: names of the modules whose outputs are the feature maps; None to find them
        drop_path: stochastic depth rate, for networks that have it
        epochs: passes over the data
        batch_size: images per optimiser step, over all processes; a recipe's value shrinks to fit small data sets
        accumulate: batches per optimiser step, to save memory
        optimizer: lamb or adamw
        learning_rate: peak rate for 256 images per step; scales linearly with batch_size
        layer_decay: factor on the learning rate from one group of layers to the next shallower; 1 for none
        warmup_epochs: epochs of linear warm-up
        beta1: decay of the optimiser's first moment
        beta2: decay of the optimiser's second moment
        weight_decay: weight decay, constant; none on vectors
        clip_grad: maximum gradient norm; 0 disables clipping
        loss: bce (a binary decision for each class) or ce (softmax cross-entropy)
        mixup: alpha of mixup; 0 for none
        cutmix: alpha of CutMix; 0 for none
        smoothing: label smoothing
        repeats: repeated augmentation: copies of an image in successive places of an epoch; 1 for none
        augment: trivial (TrivialAugment), auto (AutoAugment) or none
        erase: probability of random erasing
        crop_scale: smallest share of an image's area in a random crop
        flip: probability of mirroring left to right
        eval_crop: share of the shorter side in the centre crop of validation; 0 to resize the whole image
        ema: decay of the moving average of the weights, validated and saved beside them; 0 for none
        eval_every: epochs between validations
        mean: mean of each channel; None for that of the weights
        std: standard deviation of each channel, as mean
        max_unreadable: largest share of unreadable images
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        resume: continue the run in out from its last checkpoint
        accept_changed_data: on resuming, whether images may be missing or new
        seed: seed of everything random
        accelerator: auto, cpu or cuda
        devices: processes on each machine; auto for all GPUs, or one CPU process
        num_nodes: number of machines
        precision: auto, bf16-mixed or 32-true
        channels_last: use channels-last memory, which is faster
        workers: loader processes of each process; None to share out the cores
        save_minutes: minutes between checkpoints; the end and Ctrl-C save one too
        max_minutes: minutes after which the run is saved and stops, as after Ctrl-C; None for no limit
        log_every: optimiser steps between logged scalars
        callbacks: further Lightning callbacks (from Python)
        loggers: tensorboard, csv, wandb and mlflow, any of them; or (from Python) Lightning loggers

    Returns:
        A `FinetuneResult`: accuracies, and the trained classifier.

    Raises:
        ValueError: if an argument cannot be met; nothing is written then.
        NonFiniteLoss: if training diverges.
    """
    asked = _arguments(locals())
    from sparkmim.training.finetune import run_finetuning

    return run_finetuning(asked, _given.get(), callbacks, _objects(loggers))


@_command
def detect(
    *,
    data: str | Path | None = None,
    out: str | Path,
    weights: str | Path = "none",
    model: str | Any | None = None,
    recipe: str = "default",
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    val_annotations: str | Path | None = None,
    val_images: str | Path | None = None,
    eval_only: bool = False,
    predict: list[str] | Any | None = None,
    masks: bool | None = None,
    feature_modules: list[str] | None = None,
    drop_path: float | None = None,
    frozen_stages: int = 0,
    epochs: float | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    learning_rate: float | None = None,
    layer_decay: float | None = None,
    weight_decay: float | None = None,
    warmup_iterations: int | None = None,
    warmup_start: float | None = None,
    drops: list[float] | None = None,
    drop_factor: float | None = None,
    clip_grad: float | None = None,
    short_sides: list[int] | None = None,
    long_side: int | None = None,
    eval_short_side: int | None = None,
    crop: Literal["none", "detr"] | None = None,
    flip: float = 0.5,
    box_head: Literal["4conv1fc", "2fc"] | None = None,
    norm: Literal["batch", "none"] | None = None,
    regions: int | None = None,
    ema: float = 0.0,
    eval_every: float = 1.0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_unreadable: float = 0.1,
    max_megapixels: float = MAX_MEGAPIXELS,
    resume: bool = False,
    accept_changed_data: bool = False,
    seed: int = 0,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    precision: str = "auto",
    workers: int | None = None,
    save_minutes: float = 10.0,
    max_minutes: float | None = None,
    log_every: int = 10,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[str | Any] = ("tensorboard",),
) -> DetectResult:
    """Train a detector, with instance masks if there are any, from pretrained weights or from scratch.

    torchvision's Faster or Mask R-CNN with a feature pyramid, on any encoder. The data are checked before training.
    The recipe or the weights decide arguments left at None.

    Args:
        data: folder in COCO's form, with annotations/instances_train2017.json and train2017/, and the same for val; or
            train/_annotations.coco.json and so on
        out: run folder; must be new or empty unless resuming
        weights: run folder, weight file, or original SparK file to start from; none to train from scratch;
            with eval_only or predict, that of a detector
        model: encoder, as for pretrain; None for that of the weights
        recipe: default (small data, one GPU), or the paper's for COCO: resnet50_1x, convnext_base_3x
        annotations: JSON file of the training images, if not the one in data
        images: folder of the training images
        val_annotations: JSON file of the validation images, if not the one in data
        val_images: folder of the validation images
        eval_only: score the detector in weights instead of training
        predict: images or folders to detect objects in instead of training; out receives drawings and a list
        masks: segment each object too; None if the annotations have masks
        feature_modules: names of the modules whose outputs are the feature maps; None to find them
        drop_path: stochastic depth rate, for networks that have it
        frozen_stages: number of encoder stages, from the first on, that are not trained
        epochs: passes over the data
        iterations: optimiser steps, instead of epochs
        batch_size: images per optimiser step, over all processes; a recipe's value shrinks to fit small data sets
        accumulate: batches per optimiser step, to save memory
        learning_rate: peak rate of AdamW for 16 images per step; scales linearly with batch_size
        layer_decay: factor on the learning rate from one group of encoder layers to the next shallower; 1 for none
        weight_decay: weight decay, constant; none on vectors
        warmup_iterations: optimiser steps of linear warm-up
        warmup_start: learning rate at the first step, as a share of the peak
        drops: points of the run, as shares of it, at which the learning rate drops
        drop_factor: factor on the learning rate at each drop
        clip_grad: maximum gradient norm; 0 disables clipping
        short_sides: lengths in pixels of the shorter side in training; one is drawn for each image
        long_side: maximum length of the longer side
        eval_short_side: length of the shorter side in evaluation
        crop: detr crops every other image at random first
        flip: probability of mirroring left to right
        box_head: four convolutions and a linear layer, or two linear layers
        norm: normalisation in pyramid and heads; batch is synchronised over processes
        regions: regions of each image that the heads learn from; fewer are quicker on small images
        ema: decay of the moving average of the weights, scored and saved beside them; 0 for none
        eval_every: epochs between scorings
        mean: mean of each channel; None for that of the weights
        std: standard deviation of each channel, as mean
        max_unreadable: largest share of unreadable images
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        resume: continue the run in out from its last checkpoint
        accept_changed_data: on resuming, whether images may be missing or new
        seed: seed of everything random
        accelerator: auto, cpu or cuda
        devices: processes on each machine; auto for all GPUs, or one CPU process
        num_nodes: number of machines
        precision: auto, bf16-mixed (of encoder and pyramid; boxes are computed in float32) or 32-true
        workers: loader processes of each process; None to share out the cores
        save_minutes: minutes between checkpoints; the end and Ctrl-C save one too
        max_minutes: minutes after which the run is saved and stops, as after Ctrl-C; None for no limit
        log_every: optimiser steps between logged scalars
        callbacks: further Lightning callbacks (from Python)
        loggers: tensorboard, csv, wandb and mlflow, any of them; or (from Python) Lightning loggers

    Returns:
        A `DetectResult`: COCO's figures, and the trained detector.

    Raises:
        ValueError: if an argument cannot be met, or the data are broken; nothing is written then.
        FileNotFoundError: if a path does not exist.
        NonFiniteLoss: if training diverges.
    """
    asked = _arguments(locals())
    if eval_only or predict is not None:
        from sparkmim.evaluation.detector import use_detector

        return use_detector(**_taken(asked, use_detector))
    from sparkmim.training.detect import run_detection

    return run_detection(asked, _given.get(), callbacks, _objects(loggers))


@_command
def segment(
    *,
    data: str | Path | None = None,
    out: str | Path,
    weights: str | Path = "none",
    model: str | Any | None = None,
    recipe: str = "default",
    images: str | Path | None = None,
    labels: str | Path | None = None,
    val_images: str | Path | None = None,
    val_labels: str | Path | None = None,
    val_split: float | None = None,
    classes: str | Path | None = None,
    ignore: int | None = None,
    reduce_labels: bool = False,
    eval_only: bool = False,
    predict: list[str] | Any | None = None,
    channels: int | None = None,
    feature_modules: list[str] | None = None,
    drop_path: float | None = None,
    frozen_stages: int = 0,
    epochs: float | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    learning_rate: float | None = None,
    layer_decay: float | None = None,
    weight_decay: float | None = None,
    warmup_iterations: int | None = None,
    schedule: Literal["cosine", "linear"] | None = None,
    clip_grad: float | None = None,
    short_side: int | None = None,
    crop: int | None = None,
    flip: float = 0.5,
    jitter: float | None = None,
    eval_short_side: int | None = None,
    norm: Literal["batch", "none"] | None = None,
    ema: float = 0.0,
    eval_every: float = 1.0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    max_unreadable: float = 0.1,
    max_megapixels: float = MAX_MEGAPIXELS,
    resume: bool = False,
    accept_changed_data: bool = False,
    seed: int = 0,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    precision: str = "auto",
    workers: int | None = None,
    save_minutes: float = 10.0,
    max_minutes: float | None = None,
    log_every: int = 10,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[str | Any] = ("tensorboard",),
) -> SegmentResult:
    """Train a network that predicts the class of each pixel, from pretrained weights or from scratch.

    A feature pyramid with Panoptic FPN's head, on any encoder. The data are checked before training.
    The recipe or the weights decide arguments left at None.

    Args:
        data: folder with images/train, labels/train, images/val, labels/val; also training, validation, and
            annotations or masks instead of labels; or with label maps such as 01_mask.png beside the images. Values
            of label maps are classes; two values, such as 0 and 255, are two classes
        out: run folder; must be new or empty unless resuming
        weights: run folder, weight file, or original SparK file to start from; none to train from scratch;
            with eval_only or predict, that of a segmenter
        model: encoder, as for pretrain; None for that of the weights
        recipe: default (small data, one GPU) or ade20k (ConvNeXt-B's)
        images: folder of the training images, if not the one in data
        labels: folder of the training label maps
        val_images: folder of the validation images, if not the one in data
        val_labels: folder of the validation label maps
        val_split: share of the images to set apart for validation, if there are no validation images
        classes: text file of class names, one per line, if not classes.txt in data; without one, up to 1,000 classes
            are counted
        ignore: value of ignored pixels in label maps; None for 255 or, with eval_only, the value used in training
        reduce_labels: ignore pixels of value 0 too, and count classes from 1, as in ADE20K
        eval_only: score the segmenter in weights instead of training
        predict: images or folders to segment instead of training; out receives label maps and pictures
        channels: image channels; None for those of the weights, or 3; other than 1 or 3 for arrays only
        feature_modules: names of the modules whose outputs are the feature maps; None to find them
        drop_path: stochastic depth rate, for networks that have it
        frozen_stages: number of encoder stages, from the first on, that are not trained
        epochs: passes over the data
        iterations: optimiser steps, instead of epochs
        batch_size: images per optimiser step, over all processes; a recipe's value shrinks to fit small data sets
        accumulate: batches per optimiser step, to save memory
        learning_rate: peak rate of AdamW for 16 images per step; scales linearly with batch_size
        layer_decay: factor on the learning rate from one group of encoder layers to the next shallower; 1 for none
        weight_decay: weight decay, constant; none on vectors
        warmup_iterations: optimiser steps of linear warm-up
        schedule: fall of the learning rate after the warm-up: cosine or linear
        clip_grad: maximum gradient norm; 0 disables clipping
        short_side: length in pixels of the shorter side in training, scaled by 0.5 to 2 for each image
        crop: side in pixels of the square crop
        flip: probability of mirroring left to right
        jitter: largest relative change of contrast and saturation; brightness and hue change less; 0 for none
        eval_short_side: length of the shorter side in evaluation
        norm: normalisation in the pyramid; batch is synchronised over processes
        ema: decay of the moving average of the weights, scored and saved beside them; 0 for none
        eval_every: epochs between scorings
        mean: mean of each channel; None for that of the weights
        std: standard deviation of each channel, as mean
        max_unreadable: largest share of unreadable images
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        resume: continue the run in out from its last checkpoint
        accept_changed_data: on resuming, whether images may be missing or new
        seed: seed of everything random
        accelerator: auto, cpu or cuda
        devices: processes on each machine; auto for all GPUs, or one CPU process
        num_nodes: number of machines
        precision: auto, bf16-mixed or 32-true
        workers: loader processes of each process; None to share out the cores
        save_minutes: minutes between checkpoints; the end and Ctrl-C save one too
        max_minutes: minutes after which the run is saved and stops, as after Ctrl-C; None for no limit
        log_every: optimiser steps between logged scalars
        callbacks: further Lightning callbacks (from Python)
        loggers: tensorboard, csv, wandb and mlflow, any of them; or (from Python) Lightning loggers

    Returns:
        A `SegmentResult`: mean intersection over union, pixel accuracy, and the trained segmenter.

    Raises:
        ValueError: if an argument cannot be met, or the data are broken; nothing is written then.
        FileNotFoundError: if a path does not exist.
        NonFiniteLoss: if training diverges.
    """
    asked = _arguments(locals())
    if eval_only or predict is not None:
        from sparkmim.evaluation.segmenter import use_segmenter

        return use_segmenter(**_taken(asked, use_segmenter))
    from sparkmim.training.segment import run_segmentation

    return run_segmentation(asked, _given.get(), callbacks, _objects(loggers))


@_command
def evaluate(
    *,
    data: str | Any,
    weights: str | Path,
    protocol: Literal["knn", "linear", "fewshot"] = "knn",
    model: str | Any | None = None,
    compare: str | Path | None = None,
    val_data: str | Any | None = None,
    val_split: float | None = None,
    stage: int | None = None,
    image_size: int | list[int] | None = None,
    crop: float | None = None,
    k: int = 20,
    temperature: float = 0.07,
    epochs: int = 100,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 10,
    batch_size: int = 64,
    workers: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> EvaluationResult:
    """Measure how well frozen features separate classes.

    Averages each feature map of the unmasked images over positions, fits a simple classifier to the training images,
    and measures its accuracy on the test images. The same network with random weights is always evaluated too.

    Args:
        data: labelled images: a folder with train/ and val/ of class folders, a folder of class folders, a CSV file of
            path and label, or (from Python) a Dataset
        weights: run folder, weight file of ours, or original SparK file
        protocol: knn (nearest neighbours), linear (a probe), or fewshot (a few images of each class)
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module, which also
            serves, as it is, as the random network; None for the one named in the weights
        compare: further weights to compare with
        val_data: test images that are not in data
        val_split: share of each class to test on if there are no test images
        stage: feature map to use, 1 being the shallowest; None for all, or the deepest for fewshot
        image_size: side in pixels, or one size per axis; None for the size used in training
        crop: share of the resized image covered by the centre crop, 0 to resize the whole image; None for the share in
            the weights, or 0.875
        k: number of neighbours (knn)
        temperature: of the votes; smaller values give the nearest more weight (knn)
        epochs: passes over the features (linear)
        shots: numbers of images per class (fewshot)
        draws: number of draws of images (fewshot)
        batch_size: images per batch
        workers: loader processes
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        seed: of the random network, of val_split, and of the draws of a protocol
        out: JSON file; None for evaluation/PROTOCOL.json in the run folder, if weights is one; it is replaced by each
            evaluation
        overwrite: replace out if it exists

    Returns:
        An `EvaluationResult`: accuracies by network, stage, and number of shots.

    Raises:
        ValueError: if an argument is invalid; the message names it and the remedy.
        FileNotFoundError: if a path does not exist.
    """
    settings = dict(locals())
    from sparkmim.evaluation.evaluate import EvaluateSettings, run_evaluation

    return run_evaluation(EvaluateSettings(**settings))


@_command
def predict(
    *,
    images: str | Any,
    weights: str | Path,
    out: str | Path = "predictions.csv",
    top: int | None = None,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    crop: float | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> PredictResult:
    """Classify images with a fine-tuned network and write the classes to a CSV file.

    One row per image, in order: path, class, its probability, and the error if the image cannot be read; then the
    probability of every class (columns p_NAME) or, with top, the next classes (class_2, probability_2, ...).

    Args:
        images: folder at any depth, an image, a text file of paths, or (from Python) any Dataset; in the shell, the
            flag may be omitted
        weights: run folder or weight file of a classifier, as written by sparkmim finetune
        out: CSV file
        top: number of most likely classes to name; None for the probabilities of all classes or, above 100 classes, 5
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one
            named in the weights
        image_size: side in pixels, or one size per axis; None for the size used in training
        crop: share of the resized image covered by the centre crop, 0 to resize the whole image; None for the share in
            the weights
        batch_size: images per batch
        workers: loader processes
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        overwrite: replace out if it exists

    Returns:
        A `PredictResult`: the number of images classified, and the unreadable ones.

    Raises:
        ValueError: if the weights hold no classifier, or an argument is invalid.
        FileNotFoundError: if a path does not exist.
    """
    asked = dict(locals())
    from sparkmim.evaluation.predict import run_prediction

    return run_prediction(**_taken(asked, run_prediction))


@_command
def embed(
    *,
    images: str | Any,
    weights: str | Path,
    out: str | Path = "features.npy",
    stage: int | None = None,
    pooled: bool = True,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    crop: float | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> EmbedResult:
    """Write the features of images to a file.

    One row per readable image, in order. A .npy file holds float32 [images, channels], and a .txt file of the same name
    the paths, one per line. A .parquet file has the columns path and feature (pip install 'sparkmim[parquet]').

    Args:
        images: folder at any depth, an image, a text file of paths, or (from Python) any Dataset; in the shell, the
            flag may be omitted
        weights: run folder, weight file of ours, or original SparK file
        out: .npy or .parquet file
        stage: feature map to use, 1 being the shallowest; None for the deepest
        pooled: average the map over positions; false writes whole maps, [images, channels, height, width], to .npy
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one
            named in the weights
        image_size: side in pixels, or one size per axis; None for the size used in training
        crop: share of the resized image covered by the centre crop, 0 to resize the whole image; None for the share in
            the weights, or 0.875
        batch_size: images per batch
        workers: loader processes
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        overwrite: replace out if it exists

    Returns:
        An `EmbedResult`: the shape of the features, and the unreadable images.

    Raises:
        ValueError: if an argument is invalid, or no image can be read; nothing is written then.
        FileNotFoundError: if a path does not exist.
    """
    asked = dict(locals())
    from sparkmim.evaluation.embed import run_embedding

    return run_embedding(**_taken(asked, run_embedding))


@_command
def reconstruct(
    *,
    weights: str | Path,
    images: list[str] | Any,
    out: str | Path | None = None,
    mask_ratio: float | None = None,
    masks: int = 1,
    mask: str | Path | Any | None = None,
    visible: str | Any | None = None,
    errors: bool = False,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    limit: int = 8,
    seed: int = 0,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> ReconstructResult:
    """Show how a pretrained model rebuilds hidden patches of images.

    Columns: the input, the masked input, the reconstruction, and the reconstruction with visible pixels pasted in.
    The model predicts patches normalised by their own mean and deviation; pictures use those of the hidden patches,
    as in the paper.

    Args:
        weights: run folder of pretraining, or weight file with a decoder, ours or original SparK's
        images: one or several images or folders, a text file of paths, or (from Python) any Dataset
        out: picture file, .png, .jpg, .pdf or .svg; None writes none (on the command line, reconstruct.png)
        mask_ratio: share of hidden patches; None for that of training
        masks: random masks per image
        mask: one mask for all images instead: text, or a text file, with a row per line, x for visible and . for hidden
            patches; a picture, bright where visible; or (from Python) a boolean array
        visible: visible patches for all images instead, as "row,col row,col ...", counted from 0 at the top left
        errors: add the error of each patch as a heat map
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one named
            in the weights
        image_size: side in pixels, or one size per axis; None for that of training
        limit: maximum number of images
        seed: seed of the random masks
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        overwrite: replace out if it exists

    Returns:
        A `ReconstructResult`: arrays, errors, and a figure.

    Raises:
        ValueError: if the weights have no decoder, no image can be read, or an argument is invalid.
        FileNotFoundError: if a path does not exist.
    """
    from sparkmim.visualize.reconstruct import run_reconstruction

    return run_reconstruction(
        weights=weights, images=images, out=out, mask_ratio=mask_ratio, masks=masks, mask=mask, visible=visible,
        errors=errors, model=model, image_size=image_size, limit=limit, seed=seed, accelerator=accelerator,
    )  # fmt: skip


@_command
def explain(
    topic: Literal["vanishing"] = "vanishing",
    *,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    model: str | Any | None = None,
    images: list[str] | Any | None = None,
    image_size: int | list[int] | None = None,
    mask_ratio: float = 0.6,
    seed: int = 0,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> VanishingResult:
    """Show how masks vanish under dense convolution, and stay under sparse convolution.

    Measures the share of non-zero positions of a masked shape after 0, 1, 2, 4, … convolutions, and how far a network's
    features of a masked image drift from those of the whole image.

    Args:
        topic: what to explain: vanishing
        out: picture file, .png, .jpg, .pdf or .svg; None writes none (on the command line, explain.png)
        weights: run folder or weight file of the network to measure; None for random weights
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one named
            in the weights, or resnet18
        images: one or several images or folders; None for a photograph that comes with matplotlib
        image_size: side in pixels, or one size per axis; None for that of the weights, or 224
        mask_ratio: share of hidden patches
        seed: seed of masks and random weights
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        overwrite: replace out if it exists

    Returns:
        A `VanishingResult`: the numbers, and the figure.

    Raises:
        ValueError: if no image can be read, or an argument is invalid.
        FileNotFoundError: if a path does not exist.
    """
    from sparkmim.visualize.vanishing import run_explanation

    return run_explanation(
        topic=topic, out=out, weights=weights, model=model, images=images, image_size=image_size,
        mask_ratio=mask_ratio, seed=seed, accelerator=accelerator,
    )  # fmt: skip


@_command
def features(
    *,
    weights: str | Path,
    images: list[str] | Any,
    out: str | Path | None = None,
    stages: list[int] | None = None,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    limit: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> FeaturesResult:
    """Show the feature maps of images as colours, by stage.

    Red, green and blue are the three directions of most variance over all positions of all images: positions of similar
    colour have similar features.

    Args:
        weights: run folder, weight file of ours, or original SparK file
        images: one or several images or folders, a text file of paths, or (from Python) any Dataset
        out: picture file, .png, .jpg, .pdf or .svg; None writes none (on the command line, features.png)
        stages: feature maps to show, from 1 for the shallowest; None for all
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one named
            in the weights
        image_size: side in pixels, or one size per axis; None for that of training
        limit: maximum number of images
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        overwrite: replace out if it exists

    Returns:
        A `FeaturesResult`: arrays and a figure.

    Raises:
        ValueError: if no image can be read, or an argument is invalid.
        FileNotFoundError: if a path does not exist.
    """
    from sparkmim.visualize.features import run_features

    return run_features(
        weights=weights, images=images, out=out, stages=stages, model=model, image_size=image_size, limit=limit,
        accelerator=accelerator,
    )  # fmt: skip


@_command
def neighbors(
    *,
    weights: str | Path,
    query: list[str] | Any,
    data: list[str] | Any,
    out: str | Path | None = None,
    k: int = 8,
    stage: int | None = None,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    crop: float | None = None,
    limit: int = 8,
    batch_size: int = 64,
    workers: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> NeighborsResult:
    """Show the images of a folder that are most similar to yours.

    Compares a network's features, averaged over positions, by cosine similarity.

    Args:
        weights: run folder, weight file of ours, or original SparK file
        query: one or several images or folders to find neighbours of
        data: one or several images or folders to search
        out: picture file, .png, .jpg, .pdf or .svg; None writes none (on the command line, neighbors.png)
        k: neighbours per query; a query is not its own neighbour
        stage: feature map to compare, from 1 for the shallowest; None for the deepest
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one named
            in the weights
        image_size: side in pixels, or one size per axis; None for that of training
        crop: share of the resized image that the centre crop shows, 0 to resize it whole; None for that of the weights,
            or 0.875
        limit: maximum number of queries
        batch_size: images per batch
        workers: loader workers
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them
        accelerator: auto, cpu or cuda
        overwrite: replace out if it exists

    Returns:
        A `NeighborsResult`: paths, similarities and a figure.

    Raises:
        ValueError: if no image can be read, or an argument is invalid.
        FileNotFoundError: if a path does not exist.
    """
    from sparkmim.visualize.neighbors import run_neighbors

    return run_neighbors(
        weights=weights, query=query, data=data, out=out, k=k, stage=stage, model=model, image_size=image_size,
        crop=crop, limit=limit, batch_size=batch_size, workers=workers, accelerator=accelerator,
    )  # fmt: skip


@_command
def report(run: str | Path, *, out: str | Path | None = None) -> ReportResult:
    """Write the report of a run as one self-contained HTML file.

    Shows settings, environment, curves, speed, reconstructions over time, evaluations, and skipped images. Every run
    writes its report when it ends; this command writes it again, with later evaluations, or while the run is training.

    Args:
        run: run folder of pretrain, finetune, detect or segment
        out: HTML file; None for report.html in the run folder

    Returns:
        A `ReportResult`: path of the report.

    Raises:
        ValueError: if run is no run folder, or out is no HTML file.
    """
    from sparkmim.runs.report import write_report

    return ReportResult(write_report(run, out))


@_command
def playground(
    *,
    weights: str | Path,
    compare: str | Path | None = None,
    images: list[str] | Any | None = None,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_megapixels: float = 50.0,
    accelerator: str = "auto",
) -> None:
    """Serve a page to hide patches of images and see them rebuilt.

    Needs `pip install 'sparkmim[playground]'`. Images stay on this machine, and only this machine can open the
    page, unless host says otherwise. Ctrl-C ends it.

    Args:
        weights: run folder of pretraining, or weight file with a decoder, ours or original SparK's
        compare: weights of a second model, shown beside the first
        images: one or several images or folders to pick from; None for a photograph that comes with matplotlib
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for the one named
            in the weights
        image_size: side in pixels, or one size per axis; None for that of training
        host: address to listen on; 0.0.0.0 admits other machines
        port: port to listen on; None for the first free one from 7860
        max_megapixels: largest size of an image; larger uploads are refused, before memory is taken for them
        accelerator: auto, cpu or cuda

    Raises:
        ValueError: if the weights have no decoder, or an argument is invalid.
        FileNotFoundError: if a path does not exist.
    """
    from sparkmim.visualize.playground import run_playground

    run_playground(
        weights=weights, compare=compare, images=images, model=model, image_size=image_size, host=host, port=port,
        accelerator=accelerator,
    )  # fmt: skip


@_command
def statistics(
    *,
    data: str | list[str] | Any,
    channels: int = 3,
    axes: int = 2,
    samples: int = 1000,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Any:
    """Measure the mean and standard deviation of each channel of a data set.

    Pass them to `sparkmim pretrain` as mean and std; for arrays, that command measures them itself, on fewer samples.

    Args:
        data: folder of images or arrays at any depth, a text file of paths, several of these, or (from Python) any
            Dataset
        channels: image channels
        axes: spatial axes: 1 for signals, 2 for images, 3 for volumes
        samples: maximum number of samples to read, spread evenly over the data
        max_megapixels: largest size of an image; larger ones count as unreadable, before memory is taken for them

    Returns:
        `ChannelStatistics`: mean, std, and the number of samples read.

    Raises:
        ValueError: if nothing can be read, or a channel is constant.
    """
    from sparkmim.data.source import open_source

    return open_source(data, channels, axes).statistics(samples)


@_command
def verify(
    model: str | Any,
    image_size: int | list[int] | None = None,
    patch_size: int | None = None,
    channels: int = 3,
    stages: int | None = None,
    feature_modules: list[str] | None = None,
) -> Any:
    """Check that a network is computed exactly when most of its input is hidden.

    Runs the network on visible patches only and compares it with the dense network and with the masked definition,
    forward and backward, in float64. Names the first module that differs. The network is not changed.

    Args:
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module
        image_size: side in pixels, or one size per axis; None for three patches per side
        patch_size: side of a patch; None for the network's total stride
        channels: image channels
        stages: number of feature maps to use, from the shallowest on
        feature_modules: names of the modules whose outputs are the feature maps; None to find them

    Returns:
        A `VerifyReport`: whether the network is exact, the worst relative error, and the module at fault.

    Raises:
        ValueError: if sizes do not divide, or the network has no feature hierarchy.
    """
    from sparkmim.models.verify import verify_encoder

    return verify_encoder(model, image_size, patch_size, channels, stages, feature_modules)


@_command
def export(
    *,
    weights: str | Path,
    format: Literal[
        "timm",
        "torchvision",
        "detectron2",
        "mmdet",
        "mmpretrain",
        "huggingface",
        "onnx",
        "torch-export",
        "spark",
    ],
    out: str | Path,
    model: str | Any | None = None,
    image_size: int | list[int] | None = None,
    overwrite: bool = False,
    push: str | None = None,
    private: bool = False,
) -> ExportResult:
    """Write weights for other software.

    Pretrained weights give the encoder; a classifier is exported whole where the format can hold one. Networks of
    timm and torchvision get the target's tensor names; a custom network, path/to/file.py:factory, keeps its names in
    every format. Programs (onnx, torch-export) compute a classifier's logits, or an encoder's feature maps. The other
    packages need not be installed, except for onnx (pip install 'sparkmim[onnx]').

    Args:
        weights: run folder, weight file of ours, or original SparK file
        format: timm, torchvision, detectron2 (ResNets), mmdet, mmpretrain (ResNets and ConvNeXts), huggingface (a
            folder), onnx, torch-export, or spark (as in the original release, with the decoder if there is one)
        out: file to write (.safetensors or .pth; .pkl for detectron2, .onnx, .pt2 for torch-export), or folder
            (huggingface)
        model: timm name, torchvision/NAME, path/to/file.py:factory, or (from Python) a module; None for what the
            weights say
        image_size: for onnx and torch-export, side in pixels, or one size per axis; None for that of training
        overwrite: replace existing files
        push: repository on the Hugging Face Hub, OWNER/NAME, to upload the folder to
        private: make that repository private, if it is new

    Returns:
        An `ExportResult`: the path, the number of tensors, and a program's largest difference to PyTorch.

    Raises:
        ValueError: if the format cannot hold this network, or out exists.
    """
    from sparkmim.interop.export import export_weights

    return export_weights(
        weights=weights, format=format, out=out, model=model, image_size=image_size, push=push, private=private,
    )  # fmt: skip


@_command
def weights() -> list[Any]:
    """List the weights that the authors of SparK have published.

    Returns:
        A list of `sparkmim.interop.published.PublishedWeights`: network, image size, accuracy, file and link.
    """
    from sparkmim.interop.published import PUBLISHED

    return list(PUBLISHED)
