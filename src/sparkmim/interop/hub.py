"""Export to the Hugging Face Hub: a folder with `config.json`, `model.safetensors` and a model card, as timm reads it.

The card of a custom network says how to load it without timm.
"""
# timm.models.push_to_hf_hub and save_for_hf do not serve here: they need a timm model with a pretrained_cfg, which
# custom networks and torchvision's are not, record the preprocessing of timm's weights instead of the run's, write a
# pickle beside the safetensors file, and put the licence apache-2.0 on weights that may have another.

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save as to_bytes

from sparkmim._version import __version__
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.interop.exportable import ExportableNetwork
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models.encoders import factory_settings
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.run import Run

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"

_NOT_SHOWN = {"data", "out", "resume", "weights", "init_weights", "workers", "devices", "num_nodes", "accelerator",
              "val_data", "save_minutes", "max_minutes", "log_every", "picture_every", "max_unreadable", "mean", "std",
              "model"}  # fmt: skip
"""Settings that do not describe the weights, appear elsewhere in the card, or name local paths."""


def write_folder(network: ExportableNetwork, folder: Path) -> int:
    """Writes a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads; returns how many tensors."""
    name, tensors = network.timm_tensors()
    contents = {
        WEIGHTS_FILE: to_bytes(tensors, {"format": "pt"}),
        CONFIG_FILE: json.dumps(_config(network, name), indent=2).encode() + b"\n",
        CARD_FILE: model_card(network, name).encode(),
    }
    for file, content in contents.items():
        with replacing(folder / file, len(content)) as partial:
            partial.write_bytes(content)
    return len(tensors)


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Uploads the folder's three files to a repository on the hub, which is created if it does not exist.

    `HF_ENDPOINT` overrides the hub's address; the token is that of `hf auth login` or `HF_TOKEN`. Returns the
    repository's address.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="sparkmim", library_version=__version__)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
            commit_message="Add a network pretrained with sparkmim",
        )  # fmt: skip
    except Exception as error:  # hub, token, name and connection each have their own classes
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"{folder} is written, but could not be pushed to {repository} ({reason}); check that name and "
            "`hf auth login`, and push again with overwrite"
        ) from error
    return str(address)


def _config(network: ExportableNetwork, name: str) -> dict[str, Any]:
    import timm

    known = network.weights.metadata
    crop = 0.95 if known.crop is None else known.crop
    source = None if network.is_custom else timm.models.get_pretrained_cfg(name)
    pretrained: dict[str, Any] = {
        "tag": "sparkmim",
        "custom_load": False,
        "input_size": [known.channels, *(known.image_size or (224, 224))],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": crop or 1.0,
        "crop_mode": "center" if crop else "squash",  # the whole image, resized
        "num_classes": len(network.classes or ()),
    }
    pretrained |= {key: list(value) for key, value in known.given("mean", "std").items()}
    # With first_conv, timm would adapt the weights from three channels.
    layers = ("first_conv", "classifier") if known.channels == 3 else ("classifier",)
    pretrained |= {key: value for key in layers if (value := getattr(source, key, None)) is not None}
    config = {
        "architecture": name,
        "num_classes": len(network.classes or ()),
        "num_features": getattr(network.module, "num_features", None),
        "pretrained_cfg": pretrained,
        "label_names": network.classes or None,
    }
    return {key: value for key, value in config.items() if value is not None}


def model_card(network: ExportableNetwork, name: str) -> str:
    """Returns the model card: the hub's header, facts, how to load the network, scores and settings of the run."""
    known, classes = network.weights.metadata, network.classes
    size = known.image_size or (224, 224)
    task = "image-classification" if classes else "image-feature-extraction"
    run = network.weights.path.parent.parent if network.weights.path.parent.name == "weights" else None
    settings = _settings(run)
    header: dict[str, Any] = {"pipeline_tag": task, "tags": [task, "sparkmim"]}
    if not network.is_custom:
        header = {"library_name": "timm", "pipeline_tag": task, "tags": ["timm", task, "sparkmim"]}
    parameters = sum(parameter.numel() for parameter in network.module.parameters()) / 1e6
    what = f"a classifier of {len(classes)} classes" if classes else "an image encoder without a classifier"
    facts = {
        "network": f"{name}, {parameters:.1f} M parameters, {what}",
        "images": f"{'×'.join(map(str, size))} pixels, {known.channels} channels",
        "mean": _shown(known.mean),
        "std": _shown(known.std),
        "training": _training(network, settings),
        "classes": ", ".join(classes) if classes and len(classes) <= 20 else None,
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}\n",
        _table(("", ""), [(key, value) for key, value in facts.items() if value]),
        f"## Load it\n\n```python\n{_loading(network)}"
        f"images = ...  # [B, {known.channels}, {', '.join(map(str, size))}], normalised by mean and std\n"
        f"{'logits' if classes else 'features'} = model(images)"
        f"{'  # pretrained up to its last feature map' if network.is_custom and not classes else ''}\n```\n",
    ]
    scores = [(key, f"{value:.6g}") for key, value in islice(_scores(known, run), 40)]
    if scores:
        parts.append("## Scores\n\n" + _table(("", ""), scores))
    shown = [
        (key, _shown(value))
        for key, value in settings.items()
        if key not in _NOT_SHOWN and value is not None and not (isinstance(value, str) and os.sep in value)
    ]
    if shown:
        parts.append("## Settings of the run\n\n" + _table(("setting", "value"), shown))
    return "\n".join(parts)


def _loading(network: ExportableNetwork) -> str:
    """Returns the lines of Python that make `model`."""
    if not network.is_custom:
        return (
            "import timm\n\n"
            'model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
        )
    file, _, factory = network.name.rpartition(":")
    given = factory_settings(network.name, network.weights.channels, len(network.classes or ()))
    return (
        "from huggingface_hub import hf_hub_download\n"
        "from safetensors.torch import load_file\n\n"
        f"from {Path(file).stem} import {factory}  # the network's own code, which is not in this folder\n\n"
        f"model = {factory}({', '.join(f'{key}={value}' for key, value in given.items())}).eval()\n"
        f'model.load_state_dict(load_file(hf_hub_download("OWNER/NAME", "{WEIGHTS_FILE}")))\n'
    )


def _scores(known: WeightsMetadata, run: Path | None) -> Iterator[tuple[str, float]]:
    """Returns numbers by name: those in the weights' metadata, then those in the run folder's JSON files."""
    numbers = {**known.figures, **known.given("step")}
    yield from ((key, float(numbers[key])) for key in ("top1", "top5", "loss", "epoch", "step") if key in numbers)
    for file in sorted(run.glob("*.json")) if run else []:
        with suppress(ValueError):  # a file that is not ours
            yield from _leaves(json.loads(file.read_text(encoding="utf-8")), file.stem)


def _leaves(content: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{path} / {key}")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path, float(content)


def _training(network: ExportableNetwork, settings: dict[str, Any]) -> str:
    """Describes how the weights were trained, as far as known."""
    version = network.weights.metadata.version
    how = "masked image modelling, SparK (arXiv:2301.03580)"
    if network.classes is not None:
        start = settings.get("weights")
        how = "with labels alone" if start == "none" else f"{how}, then fine-tuning" if start else "fine-tuning"
    return f"{how}, with sparkmim {version}" if version else how


def _settings(run: Path | None) -> dict[str, Any]:
    """Returns the settings of the run that wrote the weights, as they were settled."""
    return dict(Run.read(run).settings) if run is not None and RunFolder(run).config.is_file() else {}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_shown(one) for one in value)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "".join(f"| {key} | {value} |\n" for key, value in (header, ("---", "---"), *rows))
