"""Weight files: safetensors with the metadata needed to rebuild the model, and foreign ones in the same terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sparkmim._version import __version__
from sparkmim.data.inference import Preparation
from sparkmim.errors import UserError
from sparkmim.interop import official
from sparkmim.models import Hierarchy, SparK, create_classifier, create_encoder
from sparkmim.models.classifier import encoder_of
from sparkmim.models.detector import create_detector
from sparkmim.models.segmenter import Segmenter, create_segmenter

ENCODER_FILE = "encoder.safetensors"
MODEL_FILE = "spark.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
DETECTOR_FILE = "detector.safetensors"
SEGMENTER_FILE = "segmenter.safetensors"

Kind = Literal["pretrained", "encoder", "classifier", "detector", "segmenter"]


class WeightsMetadata(dict[str, Any]):
    """Stub."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)


# Writing


def save(model: SparK, folder: Path, metadata: dict[str, Any], suffix: str = "") -> None:
    """Writes the encoder alone, under its own names, and the whole model.

    `encoder.safetensors` loads strictly into the network it came from (`timm.create_model(name, num_classes=0)`);
    `spark.safetensors` into `SparK`. Both carry `metadata` as JSON under the key `sparkmim`.

    Args:
        model: the model.
        folder: made if it does not exist.
        metadata: what is needed to build the model again.
        suffix: put before the file ending, `_ema` for averaged weights.
    """
    write(model.encoder, folder / ENCODER_FILE.replace(".", f"{suffix}."), metadata)
    write(model, folder / MODEL_FILE.replace(".", f"{suffix}."), metadata)


def write(module: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a module's state dict as safetensors, with `metadata` as JSON under the key `sparkmim`.

    A kill in the middle leaves an old file of that name whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "sparkmim": json.dumps({"version": __version__, **metadata})}
    partial = path.with_suffix(".partial")
    partial.write_bytes(to_bytes(tensors_of(module), header))  # safetensors' own files are for their owner alone
    partial.replace(path)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A state dict that safetensors takes: on the CPU, contiguous, and no two entries sharing memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


# Reading


@dataclass(frozen=True)
class Weights:
    """What a run folder or a weight file holds.

    Attributes:
        path: the file.
        kind: `pretrained`, encoder and decoder; `encoder`, that alone; `classifier`; `detector`; or `segmenter`.
        tensors: by name: of `SparK`, of the encoder, of the classifier, and so on.
        metadata: what the file says of the model: `model`, `image_size`, `channels`, `mean`, `std`; of what knows
            classes also `classes`, of a pretrained one what `SparK` needs. Foreign files say less.
    """

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @property
    def encoder_tensors(self) -> dict[str, Tensor]:
        """The encoder's tensors under its own names; with a classifier's head, where the encoder has that itself."""
        prefix = ""
        if self.kind in ("detector", "segmenter"):
            prefix = "backbone.encoder."
        elif self.kind == "pretrained" or (self.kind == "classifier" and self.metadata.get("pooled")):
            prefix = "encoder."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def model(self) -> str:
        """The network's name.

        Raises:
            ValueError: if the file does not say; it was made from a Python object, or is foreign and not recognised.
        """
        name = self.metadata.get("model")
        if not name:
            raise UserError(f"{self.path} does not name its network; give it as --model (from Python, a module)")
        return str(name)

    @property
    def classes(self) -> list[str]:
        """Names of the classes.

        Raises:
            ValueError: if these are no weights of a classifier.
        """
        if self.kind != "classifier":
            raise UserError(f"{self.path} holds no classifier; `sparkmim finetune` makes one from it")
        return list(self.metadata["classes"])

    def encoder(self, model: str | nn.Module | None = None) -> nn.Module:
        """The encoder with these weights, in evaluation mode.

        Args:
            model: its name, or a module to load into; None for the name in the file.

        Raises:
            ValueError: if they do not fit, or no name is known.
        """
        encoder = model if isinstance(model, nn.Module) else create_encoder(model or self.model, self.channels)
        self.load_into_encoder(encoder)
        return encoder.eval()

    def classifier(self, model: str | nn.Module | None = None) -> nn.Module:
        """The classifier with these weights, in evaluation mode; arguments and errors as for `encoder`."""
        classifier = create_classifier(
            model or self.model,
            len(self.classes),
            self.channels,
            image_size=self.metadata.get("image_size"),
            feature_modules=self.metadata.get("feature_modules"),
        )
        _load(classifier, self.tensors, self.path)
        return classifier.eval()

    def detector(self, model: str | nn.Module | None = None) -> nn.Module:
        """The detector with these weights, in evaluation mode; arguments as for `encoder`.

        Raises:
            ValueError: if these are no weights of a detector, they do not fit, or no name is known.
        """
        encoder, known = self._encoder_within("detector", model), self.metadata
        detector = create_detector(
            encoder, len(known["classes"]), known["masks"], mean=known["mean"], std=known["std"],
            box_head=known["box_head"], norm=known["norm"], short_side=known["eval_short_side"],
            long_side=known["long_side"], feature_modules=known["feature_modules"],
        )  # fmt: skip
        _load(detector, self.tensors, self.path)
        return detector.eval()

    def segmenter(self, model: str | nn.Module | None = None) -> Segmenter:
        """The segmenter with these weights, in evaluation mode; arguments as for `encoder`.

        Raises:
            ValueError: if these are no weights of a segmenter, they do not fit, or no name is known.
        """
        encoder, known = self._encoder_within("segmenter", model), self.metadata
        segmenter = create_segmenter(
            encoder, len(known["classes"]), self.channels, known["norm"], known["image_size"], known["feature_modules"]
        )
        _load(segmenter, self.tensors, self.path)
        return segmenter.eval()

    def _encoder_within(self, kind: Literal["detector", "segmenter"], model: str | nn.Module | None) -> nn.Module:
        """The network, not loaded yet, on which to build what these weights are of."""
        if self.kind != kind:
            command = {"detector": "detect", "segmenter": "segment"}[kind]
            raise UserError(f"{self.path} holds no {kind}; `sparkmim {command}` makes one from it")
        return model if isinstance(model, nn.Module) else create_encoder(model or self.model, self.channels)

    def spark(self, model: str | nn.Module | None = None, image_size: Sequence[int] | None = None) -> SparK:
        """The whole model, in evaluation mode; as new where the file holds an encoder alone.

        Args:
            model: the encoder's name, or a module; None for the name in the file.
            image_size: other than that of training.

        Raises:
            ValueError: if the file does not say how to build it, or the size does not do.
        """
        known = self.metadata
        whole = SparK(
            model or self.model,
            image_size=image_size or known["image_size"],
            mask_ratio=known.get("mask_ratio", 0.6),
            patch_size=known.get("patch_size"),
            decoder_width=known.get("decoder_width"),
            channels=known["channels"],
            decoder=known.get("decoder", "spark"),
            stages=known.get("stages"),
            feature_modules=known.get("feature_modules"),
        )
        self.load_into(whole)
        return whole.eval()

    @property
    def channels(self) -> int:
        """Image channels."""
        return int(self.metadata.get("channels", 3))

    def preparation(self, image_size: int | Sequence[int] | None = None, crop: float | None = None) -> Preparation:
        """How images become the network's input: as in training, but for what is given instead.

        Raises:
            ValueError: if a size or the crop is out of range.
        """
        return Preparation.of(self.metadata, self.channels, image_size, crop)

    def load_into(self, model: SparK) -> None:
        """Loads a model: all of it, or its encoder if there is no more.

        Raises:
            ValueError: if the weights do not fit.
        """
        if self.kind == "pretrained":
            own, unreached = model.state_dict(), set(model.unreached_parameters)
            tensors = {name: _shaped_like(tensor, own.get(name)) for name, tensor in self.tensors.items()}
            kept = {name: own[name] for name in own if _belongs(name, unreached) and name not in tensors}
            _load(model, {**kept, **tensors}, self.path)
        else:
            self.load_into_encoder(model.encoder, model.hierarchy.unreached)

    def load_into_encoder(self, encoder: nn.Module, unreached: Any = None) -> None:
        """Loads an encoder, or the part of a classifier that is one.

        What no feature map depends on (a classifier, a norm before it) is loaded where it fits, and stays as it is
        otherwise; all else must be there and fit.

        Args:
            encoder: any network; of a `PooledClassifier`, its encoder.
            unreached: names of its parameters that no map depends on, if known.

        Raises:
            ValueError: if the weights do not fit.
        """
        encoder = encoder_of(encoder)
        if isinstance(unreached, Hierarchy):
            unreached = unreached.unreached
        if unreached is None:
            unreached = self._hierarchy(encoder).unreached
        own, optional = encoder.state_dict(), set(unreached)
        tensors = {name: _shaped_like(tensor, own.get(name)) for name, tensor in self.encoder_tensors.items()}
        heads = {name.partition(".")[0] for name in optional} | _HEADS
        wanted = {
            name: tensor
            for name, tensor in tensors.items()
            if (name in own and own[name].shape == tensor.shape) or not (
                _belongs(name, optional) or (name not in own and name.partition(".")[0] in heads)
            )
        }  # fmt: skip
        kept = {name: tensor for name, tensor in own.items() if name not in wanted and _belongs(name, optional)}
        _load(encoder, {**kept, **wanted}, self.path)

    def without_unreached(self, encoder: nn.Module) -> dict[str, Tensor]:
        """An encoder's tensors, but for those that no feature map depends on, such as a classifier's."""
        unreached = set(self._hierarchy(encoder).unreached)
        return {name: tensor for name, tensor in tensors_of(encoder).items() if not _belongs(name, unreached)}

    def _hierarchy(self, encoder: nn.Module) -> Hierarchy:
        size = self.metadata.get("image_size")
        return Hierarchy(
            encoder, self.channels, len(size) if size else 2, size,
            feature_modules=self.metadata.get("feature_modules"),
        )  # fmt: skip


_HEADS = {"fc", "head", "classifier", "norm", "last_linear", "heads"}
"""First words of the names of what stands behind the last feature map, in timm, torchvision and the original."""


def open_weights(path: str | Path) -> Weights:
    """Opens a run folder, one of our weight files, or an original SparK file; code in a file is never run.

    Of a run folder, the classifier with the best validation accuracy, averaged or not; the best detector or segmenter;
    or what pretraining gave.

    Raises:
        ValueError: if there is nothing to read there.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of_run(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder or a weight file")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors, metadata = official.read(path)
    kind: Kind = "encoder"
    if any(name.startswith(("decoder.", "densify.")) and name.endswith("mask_token") for name in tensors):
        kind = "pretrained"  # a network of the user's own may have parts called encoder and decoder too
    elif "task" in metadata:
        kind = "detector" if metadata["task"] == "detection" else "segmenter"
    elif "classes" in metadata:
        kind = "classifier"
    return Weights(path, kind, tensors, metadata)


def _file_of_run(folder: Path) -> Path:
    files = [
        folder / "weights" / name.replace(".", f"{end}.")
        for name in (CLASSIFIER_FILE, DETECTOR_FILE, SEGMENTER_FILE)
        for end in ("_best", "_ema_best", "", "_ema")
    ]
    found = [file for file in files if file.is_file()]
    best = [file for file in found if file.stem.endswith("_best")]
    if best:
        return max(best, key=lambda file: float(_read_metadata(file).get("top1", 0.0)))
    found.append(folder / "weights" / MODEL_FILE)
    if not found[0].is_file():
        raise UserError(f"{folder} is a folder without weights/{MODEL_FILE}; name a run folder or a weight file")
    return found[0]


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get("sparkmim", "{}"))
            return metadata
    except Exception as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = _read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def load(path: str | Path) -> SparK:
    """Builds the `SparK` model that a run folder or weight file holds, in evaluation mode.

    Raises:
        ValueError: if the file does not say how to build it; use `load_into` with a model of yours then.
    """
    return open_weights(path).spark()


def _shaped_like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """A linear layer's weight as that of the 1×1 convolution which takes its place, and the reverse."""
    if own is not None and own.shape != tensor.shape and own.shape[:2] == tensor.shape[:2]:
        return tensor.view(own.shape) if own.numel() == tensor.numel() else tensor
    return tensor


def _belongs(name: str, parameters: set[str]) -> bool:
    """Whether a tensor is one of the parameters, or a buffer of a module that has one of them."""
    parent = name.rpartition(".")[0]
    return name in parameters or (bool(parent) and any(other.rpartition(".")[0] == parent for other in parameters))


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        detail = " ".join(line.strip() for line in lines[1:3])[:300]
        raise UserError(f"the weights in {path} do not fit this model: {detail}") from error
