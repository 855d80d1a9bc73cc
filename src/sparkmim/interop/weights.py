"""Weight files: safetensors with the metadata needed to rebuild the model, and others' files read the same way."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sparkmim._version import __version__
from sparkmim.data.inference import CROP, Preparation
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.interop import official
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.names import for_channels, misfit, shaped_like, without_prefix
from sparkmim.interop.unreadable import why_unreadable
from sparkmim.models import Hierarchy, SparK, create_classifier, create_encoder
from sparkmim.models.classifier import encoder_of
from sparkmim.models.detector import create_detector
from sparkmim.models.segmenter import Segmenter, create_segmenter
from sparkmim.trust import check_trusted

log = logging.getLogger("sparkmim")

ENCODER_FILE = "encoder.safetensors"
MODEL_FILE = "spark.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
DETECTOR_FILE = "detector.safetensors"
SEGMENTER_FILE = "segmenter.safetensors"

Module = TypeVar("Module", bound=nn.Module)
Kind = Literal["pretrained", "encoder", "classifier", "detector", "segmenter"]
"""Model of a file; `pretrained` is encoder and decoder."""


def save(model: SparK, folder: Path, metadata: WeightsMetadata, suffix: str = "") -> None:
    """Writes the encoder alone, under its own names, and the whole model.

    `encoder.safetensors` loads strictly into the network it came from (`timm.create_model(name, num_classes=0)`);
    `spark.safetensors` into `SparK`. `suffix`, such as `_ema` for averaged weights, goes before the file ending.
    """
    write(model.encoder, folder / ENCODER_FILE.replace(".", f"{suffix}."), metadata)
    write(model, folder / MODEL_FILE.replace(".", f"{suffix}."), metadata)


def write(module: nn.Module, path: Path, metadata: WeightsMetadata) -> None:
    """Writes a module's state dict as safetensors, with `metadata` as JSON under the key `sparkmim` of the header."""
    header = {"format": "pt", "sparkmim": json.dumps({"version": __version__, **metadata.to_json()})}
    content = to_bytes(tensors_of(module), header)
    with replacing(path, len(content)) as partial:
        partial.write_bytes(content)  # files that safetensors writes are private (0600)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict as safetensors takes it: on the CPU, contiguous, without shared memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


@dataclass(frozen=True)
class Weights:
    """The content of a run folder or weight file.

    Methods that build a network take its name, or a module to load into; None for the name in the file. They return it
    in evaluation mode, and raise UserError if the weights do not fit or no name is known.
    """

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    metadata: WeightsMetadata

    @property
    def encoder_tensors(self) -> dict[str, Tensor]:
        """The encoder's tensors under its own names; with the classifier's head, where that is part of the encoder."""
        prefix = ""
        if self.kind in ("detector", "segmenter"):
            prefix = "backbone.encoder."
        elif self.kind == "pretrained" or (self.kind == "classifier" and self.metadata.pooled):
            prefix = "encoder."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def model(self) -> str:
        """The network's name; a UserError if it was made from a Python object, is not recognised, or not trusted."""
        if not self.metadata.model:
            raise UserError(f"{self.path} does not name its network; give it as --model (from Python, a module)")
        check_trusted(self.metadata.model, str(self.path))
        return self.metadata.model

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a UserError if the file holds no classifier."""
        if self.kind != "classifier":
            raise UserError(f"{self.path} holds no classifier; `sparkmim finetune` makes one from it")
        return list(self.metadata.classes or ())

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.metadata.channels

    def preparation(self, image_size: int | Sequence[int] | None = None, crop: float | None = None) -> Preparation:
        """Returns how images become the network's input: as in training, except for what is given.

        `crop` is the share of the resized image that the centre crop shows; 0 for the whole image.
        """
        known = self.metadata
        size = tuple(known.image_size or (224, 224))
        if image_size is not None:
            size = (image_size,) * len(size) if isinstance(image_size, int) else tuple(image_size)
        if crop is None:
            crop = CROP if known.crop is None else known.crop
        return Preparation(size, known.channels, known.mean, known.std, crop or None)

    def encoder(self, model: str | nn.Module | None = None) -> nn.Module:
        """Returns the encoder with these weights."""
        encoder = self._new_encoder(model)
        self.load_into_encoder(encoder)
        return encoder.eval()

    def encoder_hierarchy(self, model: str | nn.Module | None = None) -> Hierarchy:
        """Returns the encoder with these weights and its pretrained feature maps."""
        hierarchy = self.hierarchy_of(self._new_encoder(model))
        self.load_into_encoder(hierarchy.encoder, hierarchy)
        return hierarchy.eval()

    def classifier(self, model: str | nn.Module | None = None) -> nn.Module:
        """Returns the classifier with these weights."""
        known = self.metadata
        options = known.given("image_size", "feature_modules")
        classifier = create_classifier(model or self.model, len(self.classes), known.channels, **options)
        return _load(classifier, self.tensors, self.path).eval()

    def detector(self, model: str | nn.Module | None = None) -> nn.Module:
        """Returns the detector with these weights."""
        if self.kind != "detector":
            raise UserError(f"{self.path} holds no detector; `sparkmim detect` makes one from it")
        known = self.metadata
        options = known.given("masks", "mean", "std", "box_head", "norm", "long_side", "feature_modules")
        options["short_side"] = known.eval_short_side
        detector = create_detector(self._new_encoder(model), len(known.classes or ()), **options)
        return _load(detector, self.tensors, self.path).eval()

    def segmenter(self, model: str | nn.Module | None = None) -> Segmenter:
        """Returns the segmenter with these weights."""
        if self.kind != "segmenter":
            raise UserError(f"{self.path} holds no segmenter; `sparkmim segment` makes one from it")
        known = self.metadata
        options = known.given("norm", "image_size", "feature_modules")
        segmenter = create_segmenter(self._new_encoder(model), len(known.classes or ()), known.channels, **options)
        return _load(segmenter, self.tensors, self.path).eval()

    def spark(self, model: str | nn.Module | None = None, image_size: Sequence[int] | None = None) -> SparK:
        """Returns the whole model; its decoder is new if the file holds an encoder alone."""
        known = self.metadata
        size = image_size or known.image_size
        if size is None:
            raise UserError(f"{self.path} does not say its image size; give image_size")
        whole = SparK(
            model or self.model, size, channels=known.channels,
            **known.given("mask_ratio", "patch_size", "decoder_width", "decoder", "stages", "feature_modules"),
        )  # fmt: skip
        self.load_into(whole)
        return whole.eval()

    def load_into(self, model: SparK) -> None:
        """Loads encoder and decoder, or the encoder alone if the file holds no decoder."""
        if self.kind != "pretrained":
            self.load_into_encoder(model.encoder, model.hierarchy)
            return
        own, unreached = model.state_dict(), set(model.unreached_parameters)
        tensors = self._fitted(self.tensors, own)
        if model.channels != self.channels:
            log.warning("the last layer of the decoder begins anew, as it rebuilds other channels")
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.head.")}
            unreached |= {name for name in own if name.startswith("decoder.head.")}
        kept = {name: own[name] for name in own if _belongs(name, unreached) and name not in tensors}
        _load(model, {**kept, **tensors}, self.path)

    def _fitted(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors in the shapes of a network's own, where they can be: linear layers, and other channels."""
        fitted = {name: shaped_like(tensor, own.get(name)) for name, tensor in tensors.items()}
        for name, tensor in fitted.items():
            wanted = own[name].shape if name in own else tensor.shape
            others = [*tensor.shape[:1], *tensor.shape[2:]] == [*wanted[:1], *wanted[2:]]
            if tensor.ndim > 2 and others and tensor.shape[1] == self.channels != wanted[1]:
                fitted[name] = for_channels(tensor, wanted[1])
                log.warning("%s, of %d channels, is adapted to %d", name, self.channels, wanted[1])
        return fitted

    def load_into_encoder(
        self, encoder: nn.Module, hierarchy: Hierarchy | None = None, channels: int | None = None
    ) -> None:
        """Loads an encoder, or the encoder in a classifier; `channels` are its image channels, None for the file's.

        A prefix of all names, as wrappers add it, is removed. The first convolution is adapted to other channels.
        Tensors that no feature map depends on (a classifier, a norm before it) are loaded where they fit, and otherwise
        left as they are; all others must be there and fit. `hierarchy` holds the encoder's feature maps, if they have
        been found before.
        """
        encoder = encoder_of(encoder)
        hierarchy = hierarchy or self.hierarchy_of(encoder, whole=True, channels=channels)
        own, optional = encoder.state_dict(), set(hierarchy.unreached)
        named, prefix = without_prefix(self.encoder_tensors, own)
        if prefix:
            log.warning("%s names its tensors with %s in front, which is left out", self.path, prefix)
        tensors = self._fitted(named, own)
        heads = {name.partition(".")[0] for name in optional} | _HEADS

        def wanted(name: str) -> bool:
            if name in own and own[name].shape == tensors[name].shape:
                return True
            return not _belongs(name, optional) and (name in own or name.partition(".")[0] not in heads)

        given = {name: tensor for name, tensor in tensors.items() if wanted(name)}
        kept = {name: tensor for name, tensor in own.items() if name not in given and _belongs(name, optional)}
        _load(encoder, {**kept, **given}, self.path)

    def backbone_tensors(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Returns an encoder's tensors, except for those that no feature map depends on, such as a classifier's."""
        unreached = set(self.hierarchy_of(encoder, whole=True).unreached)
        return {name: tensor for name, tensor in tensors_of(encoder).items() if not _belongs(name, unreached)}

    def hierarchy_of(self, encoder: nn.Module, whole: bool = False, channels: int | None = None) -> Hierarchy:
        """Finds the feature maps of an encoder of this kind: those that were pretrained, or with `whole` all."""
        known = self.metadata
        rank = len(known.image_size) if known.image_size else 2
        stages = None if whole else known.stages
        return Hierarchy(encoder, channels or known.channels, rank, known.image_size, stages, known.feature_modules)

    def _new_encoder(self, model: str | nn.Module | None) -> nn.Module:
        """Returns the given module, or the network of the given name or the one in the file, not loaded."""
        return create_encoder(self.model if model is None else model, self.channels)


_HEADS = {"fc", "head", "classifier", "norm", "last_linear", "heads"}
"""First parts of the names of layers after the last feature map, in timm, torchvision and the original."""


def open_weights(path: str | Path) -> Weights:
    """Opens a run folder, one of our weight files, or an original SparK file; code in a file is never run.

    Of a run folder, this is the classifier with the best validation accuracy, averaged or not; the best detector or
    segmenter; or the pretrained model.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of_run(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder or a weight file")
    if path.suffix == ".safetensors":
        metadata, tensors = _read_metadata(path), _read_tensors(path)
    else:
        tensors, metadata = official.read(path)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path} holds NaN or infinite values in {name}; take weights from before they diverged")
    return Weights(path, _kind_of(tensors, metadata), tensors, metadata)


def _kind_of(tensors: Mapping[str, Tensor], metadata: WeightsMetadata) -> Kind:
    # The mask token decides: a user's own network may have parts called encoder and decoder too.
    if any(name.startswith(("decoder.", "densify.")) and name.endswith("mask_token") for name in tensors):
        return "pretrained"
    if metadata.task:
        return "detector" if metadata.task == "detection" else "segmenter"
    return "classifier" if metadata.classes else "encoder"


def _file_of_run(folder: Path) -> Path:
    files = [
        folder / "weights" / name.replace(".", f"{end}.")
        for name in (CLASSIFIER_FILE, DETECTOR_FILE, SEGMENTER_FILE)
        for end in ("_best", "_ema_best", "", "_ema")
    ]
    found = [file for file in files if file.is_file()]
    if best := [file for file in found if file.stem.endswith("_best")]:
        return max(best, key=lambda file: _read_metadata(file).figures.get("top1", 0.0))
    found.append(folder / "weights" / MODEL_FILE)
    if not found[0].is_file():
        raise UserError(f"{folder} is a folder without weights/{MODEL_FILE}; name a run folder or a weight file")
    return found[0]


def _read_metadata(path: Path) -> WeightsMetadata:
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get("sparkmim", "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has metadata that are not JSON ({error}); use another file") from error
    except Exception as error:
        raise UserError(f"{path} {why_unreadable(path, error)}") from error
    return WeightsMetadata.from_json(content, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # of a kind of numbers that PyTorch does not know
        raise UserError(f"{path} {why_unreadable(path, error)}") from error


def load(path: str | Path) -> SparK:
    """Builds the `SparK` model of a run folder or weight file, in evaluation mode.

    Raises:
        ValueError: if the file does not say how to build it; use `load_into` with your own model then.
    """
    return open_weights(path).spark()


def _belongs(name: str, parameters: set[str]) -> bool:
    """Tells whether a tensor is one of the parameters, or in a module that has one of them."""
    parent = name.rpartition(".")[0]
    return name in parameters or (bool(parent) and any(other.rpartition(".")[0] == parent for other in parameters))


def _load(module: Module, tensors: Mapping[str, Tensor], path: Path) -> Module:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        own = module.state_dict()
        counts = {name for name in own if name.endswith("num_batches_tracked")}  # which may be left out
        detail = misfit(tensors, own, counts) or str(error).partition("\n")[0]
        raise UserError(f"the weights in {path} do not fit this model: {detail}") from error
    return module
