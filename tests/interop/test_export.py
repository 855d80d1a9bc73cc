"""Exports: each loads where it is meant to, or has the names and shapes that it must have there."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from hub_server import running_hub
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

import sparkmim
from originals import PUBLISHED, original_file
from processes import run
from sparkmim.cli import main
from sparkmim.data.augmentation import eval_transform
from sparkmim.interop import official
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import open_weights, save, write
from sparkmim.models import SparK, create_classifier, create_encoder
from sparkmim.paths import EXPORTS

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def shaken(module: nn.Module) -> nn.Module:
    """With other values than those a new network has, running statistics and layer scale among them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim <= 1 or "layer_scale" in name:
                tensor.add_(torch.empty_like(tensor).uniform_(-0.2, 0.2, generator=generator))
    return module.eval()


def metadata(model: str | None, **others: Any) -> WeightsMetadata:
    """Metadata of a network for images of 64²."""
    return WeightsMetadata(**{"model": model, "image_size": [64, 64], "mean": MEAN, "std": STD, **others})


def encoder_file(folder: Path, model: str, **others: Any) -> Path:
    """Writes an encoder, as pretraining does."""
    torch.manual_seed(0)
    path, known = folder / "encoder.safetensors", metadata(model, **others)
    write(shaken(create_encoder(model, known.channels)), path, known)
    return path


def classifier_file(folder: Path, model: str) -> Path:
    """Writes a classifier of three classes, as fine-tuning does."""
    torch.manual_seed(0)
    path = folder / "classifier.safetensors"
    known = metadata(model, classes=["cat", "dog", "owl"], pooled=".py:" in model, figures={"top1": 87.5})
    write(shaken(create_classifier(model, 3, image_size=[64, 64])), path, known)
    return path


def spark_run(folder: Path, model: str, size: int = 64, **others: Any) -> SparK:
    """Writes a run folder `run` of pretraining; returns the model."""
    torch.manual_seed(0)
    settings = {"decoder_width": 32, "decoder": "spark", **others}
    channels = settings.get("channels", 3)
    colours = {name: settings.pop(name) for name in ("mean", "std") if name in settings}
    spark = SparK(create_encoder(model, channels), image_size=size, **settings)
    settings |= {"image_size": [size, size], "patch_size": spark.patch_size, "mask_ratio": spark.mask_ratio}
    save(spark, folder / "run" / "weights", metadata(model, **settings, **colours))
    return spark


def path_of(folder: Path, format: str) -> Path:
    """Path of an exported file or folder."""
    return folder / f"{format}{(*EXPORTS[format], '')[0]}"


def export(folder: Path, weights: Path, format: str, **settings: Any) -> Path:
    """Exports weights to a new file or folder, and returns its path."""
    return sparkmim.export(weights=weights, format=format, out=path_of(folder, format), **settings).out


def images(size: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def torchvision_encoder(name: str) -> nn.Module:
    """torchvision's network without its linear layer."""
    network = torchvision.models.get_model(name, weights=None)
    if hasattr(network, "fc"):
        network.fc = nn.Identity()
    else:
        network.classifier[2] = nn.Identity()
    return network.eval()


class Images(Dataset[tuple[Tensor, int]]):
    """Images with labels."""

    def __init__(self, items: list[tuple[Tensor, int]], classes: list[str]) -> None:
        self.items, self.classes = items, classes
        self.targets = [label for _, label in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.items[place]


def onnx_session(path: Path) -> Any:
    """Runs an ONNX file; skips the test where onnxruntime is missing."""
    return pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])


def losses(*models: SparK, pixels: Tensor) -> list[Tensor]:
    """Loss of each model, with the same patches hidden."""
    visible = models[0].draw_visible(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [model.eval()(pixels, visible).loss for model in models]


# timm and torchvision


@pytest.mark.parametrize(
    ("model", "ending"), [("resnet18", ".pth"), ("resnet50", ".safetensors"), ("convnext_tiny", ".safetensors")]
)
def test_identical_features(tmp_path: Path, model: str, ending: str) -> None:
    """In timm and in torchvision, to the last bit."""
    weights = encoder_file(tmp_path, model)
    expected_maps = open_weights(weights).encoder().forward_intermediates(images(), intermediates_only=True)
    expected = open_weights(weights).encoder()(images())
    networks = {"timm": timm.create_model(model, num_classes=0).eval(), "torchvision": torchvision_encoder(model)}
    for format, network in networks.items():
        out = tmp_path / f"{format}{ending}"
        result = sparkmim.export(weights=weights, format=format, out=out)
        tensors = load_file(out) if ending == ".safetensors" else torch.load(out, weights_only=True)
        network.load_state_dict(tensors)
        assert result.tensors == len(tensors) == len(network.state_dict())
        assert (network(images()).flatten(1) - expected).abs().max() == 0
    for one, other in zip(
        networks["timm"].forward_intermediates(images(), intermediates_only=True), expected_maps, strict=True
    ):
        assert torch.equal(one, other)
    if model == "convnext_tiny":  # the last map, which lies before the last norm
        assert torch.equal(networks["torchvision"].features(images()), expected_maps[-1])


@pytest.mark.parametrize("model", ["resnet18", "convnext_tiny"])
def test_classifiers_keep_their_head(tmp_path: Path, model: str) -> None:
    weights = classifier_file(tmp_path, model)
    expected = open_weights(weights).classifier()(images())
    for format, network in (
        ("timm", timm.create_model(model, num_classes=3)),
        ("torchvision", torchvision.models.get_model(model, weights=None, num_classes=3)),
    ):
        network.load_state_dict(load_file(export(tmp_path, weights, format)))
        assert (network.eval()(images()) - expected).abs().max() == 0


@pytest.mark.parametrize("model", ["resnet18", "convnext_tiny"])
def test_from_torchvision_to_timm(tmp_path: Path, model: str) -> None:
    weights = encoder_file(tmp_path, f"torchvision/{model}")
    here = timm.create_model(model, num_classes=0).eval()
    here.load_state_dict(load_file(export(tmp_path, weights, "timm")))
    there = torchvision.models.get_model(model, weights=None)
    there.load_state_dict(load_file(export(tmp_path, weights, "torchvision")))
    expected = torchvision_encoder(model)
    expected.load_state_dict({name: tensor for name, tensor in there.state_dict().items()
                              if not name.startswith(("fc.", "classifier.2."))})  # fmt: skip
    assert (here(images()) - expected(images()).flatten(1)).abs().max() == 0


def test_a_module_from_python(tmp_path: Path) -> None:
    """Weights of a run that was started with a module name no network; the module, or its name, is given again."""
    weights = encoder_file(tmp_path, "resnet18")
    tensors = load_file(weights)
    write(open_weights(weights).encoder(), weights, metadata(None))
    with pytest.raises(ValueError, match="does not name its network; give it as --model"):
        sparkmim.export(weights=weights, format="timm", out=tmp_path / "none.pth")
    for number, model in enumerate((timm.create_model("resnet18", num_classes=0), "resnet18", "resnet18.a1_in1k")):
        out = tmp_path / f"{number}.pth"
        sparkmim.export(weights=weights, format="detectron2", out=out.with_suffix(".pkl"), model=model)
        sparkmim.export(weights=weights, format="timm", out=out, model=model)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in torch.load(out).items())


# Detectron2 and OpenMMLab


def resnet_listing(stem: str, stage: Any, shortcut: tuple[str, str], norm: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ResNet-50, by rule: `stage(1)` names the first stage, `norm(conv)` a convolution's norm."""
    convs: dict[str, tuple[int, ...]] = {stem: (64, 3, 7, 7)}
    norms = {norm(stem): 64}
    inside = 64
    for number, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            prefix = f"{stage(number)}.{block}."
            for conv, shape in (("conv1", (width, inside, 1, 1)), ("conv2", (width, width, 3, 3)),
                                ("conv3", (4 * width, width, 1, 1))):  # fmt: skip
                convs[prefix + conv] = shape
                norms[norm(prefix + conv)] = shape[0]
            if block == 0:
                convs[prefix + shortcut[0]] = (4 * width, inside, 1, 1)
                norms[prefix + shortcut[1]] = 4 * width
            inside = 4 * width
    listing: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in convs.items()}
    for name, channels in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            listing[f"{name}.{part}"] = (channels,)
        listing[f"{name}.num_batches_tracked"] = ()
    return listing


def test_detectron2(tmp_path: Path) -> None:
    weights = encoder_file(tmp_path, "resnet50")
    result = sparkmim.export(weights=weights, format="detectron2", out=tmp_path / "r50.pkl")
    content = pickle.loads((tmp_path / "r50.pkl").read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    arrays = content["model"]
    assert all(type(array) is np.ndarray for array in arrays.values())
    listing = resnet_listing(
        "stem.conv1", lambda number: f"res{number + 1}", ("shortcut", "shortcut.norm"), lambda conv: f"{conv}.norm"
    )
    assert {name: array.shape for name, array in arrays.items()} == listing
    assert len(arrays) == result.tensors == 318
    tensors = load_file(weights)
    for name, original in (("stem.conv1.norm.running_var", "bn1.running_var"),
                           ("res4.5.conv3.norm.bias", "layer3.5.bn3.bias"),
                           ("res5.0.shortcut.norm.running_mean", "layer4.0.downsample.1.running_mean")):  # fmt: skip
        assert np.array_equal(arrays[name], tensors[original].numpy())


@pytest.mark.parametrize("format", ["mmdet", "mmpretrain"])
def test_openmmlab_resnet(tmp_path: Path, format: str) -> None:
    content = torch.load(export(tmp_path, encoder_file(tmp_path, "resnet50"), format), weights_only=True)
    listing = resnet_listing(
        "conv1", lambda number: f"layer{number}", ("downsample.0", "downsample.1"),
        lambda conv: conv.replace("conv", "bn"),
    )  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()} == {
        f"backbone.{name}": shape for name, shape in listing.items()
    }
    assert content["meta"]["model"] == "resnet50"


def convnext_listing(depths: tuple[int, ...], widths: tuple[int, ...], v2: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of MMPretrain's ConvNeXt, but for its norms behind the stages."""
    listing: dict[str, tuple[int, ...]] = {
        "downsample_layers.0.0.weight": (widths[0], 3, 4, 4),
        "downsample_layers.0.0.bias": (widths[0],),
    }
    for part in ("weight", "bias"):
        listing[f"downsample_layers.0.1.{part}"] = (widths[0],)
        for stage in range(1, 4):
            listing[f"downsample_layers.{stage}.0.{part}"] = (widths[stage - 1],)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            listing[f"downsample_layers.{stage}.1.weight"] = (width, widths[stage - 1], 2, 2)
            listing[f"downsample_layers.{stage}.1.bias"] = (width,)
        for block in range(depth):
            prefix = f"stages.{stage}.{block}."
            listing |= {prefix + name: shape for name, shape in {
                "depthwise_conv.weight": (width, 1, 7, 7), "depthwise_conv.bias": (width,),
                "norm.weight": (width,), "norm.bias": (width,),
                "pointwise_conv1.weight": (4 * width, width), "pointwise_conv1.bias": (4 * width,),
                "pointwise_conv2.weight": (width, 4 * width), "pointwise_conv2.bias": (width,),
                **({"grn.gamma": (4 * width,), "grn.beta": (4 * width,)} if v2 else {"gamma": (width,)}),
            }.items()}  # fmt: skip
    return listing


@pytest.mark.parametrize(
    ("model", "depths", "widths"),
    [
        ("convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768)),
        ("convnextv2_atto", (2, 2, 6, 2), (40, 80, 160, 320)),  # timm builds its pointwise layers as 1×1 convolutions
    ],
)
def test_openmmlab_convnext(tmp_path: Path, model: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> None:
    listing = {f"backbone.{name}": shape for name, shape in convnext_listing(depths, widths, "v2" in model).items()}
    weights = classifier_file(tmp_path, model)
    for format, head in (
        ("mmdet", {}),
        ("mmpretrain", {"backbone.norm3.weight": widths[-1:], "backbone.norm3.bias": widths[-1:],
                        "head.fc.weight": (3, widths[-1]), "head.fc.bias": (3,)}),
    ):  # fmt: skip
        content = torch.load(export(tmp_path, weights, format), weights_only=True)
        found = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
        assert found == {**listing, **head}
    assert content["meta"]["dataset_meta"] == {"classes": ["cat", "dog", "owl"]}
    tensors = load_file(weights)
    fc2 = content["state_dict"]["backbone.stages.2.1.pointwise_conv2.weight"]
    assert torch.equal(fc2, tensors["stages.2.blocks.1.mlp.fc2.weight"].flatten(1))
    assert torch.equal(content["state_dict"]["backbone.norm3.bias"], tensors["head.norm.bias"])


# Hugging Face


def test_hugging_face_folder(tmp_path: Path) -> None:
    run_folder, out = tmp_path / "run", tmp_path / "hub"
    weights = classifier_file(run_folder / "weights", "resnet18").rename(
        run_folder / "weights" / "classifier_best.safetensors"
    )
    settings = {"data": "/home/somebody/photos", "model": "resnet18", "epochs": 300, "learning_rate": 2e-4,
                "drop_path": None, "file": "/home/somebody/list.txt"}  # fmt: skip
    (run_folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (run_folder / "metrics.json").write_text(json.dumps({"best": {"top1": 87.5, "history": [1, 2]}}))
    (run_folder / "other.json").write_text("no json")
    result = sparkmim.export(weights=run_folder, format="huggingface", out=out)
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    network = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert result.tensors == len(network.state_dict())
    assert torch.equal(network(images()), open_weights(weights).classifier()(images()))
    config = timm.data.resolve_model_data_config(network)
    assert (list(config["input_size"]), list(config["mean"]), list(config["std"])) == ([3, 64, 64], MEAN, STD)
    assert list(network.pretrained_cfg["label_names"]) == ["cat", "dog", "owl"]

    _, header, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "image-classification"
    assert yaml.safe_load(header)["library_name"] == "timm"
    for row in ("| epochs | 300 |", "| learning_rate | 0.0002 |", "| top1 | 87.5 |", "| metrics / best / top1 | 87.5 |",
                "| classes | cat, dog, owl |", "| training | fine-tuning, with sparkmim "):  # fmt: skip
        assert row in card
    for start, said in (("runs/r18", "then fine-tuning"), ("none", "with labels alone")):
        (run_folder / "config.yaml").write_text(yaml.safe_dump({**settings, "weights": start}))
        sparkmim.export(weights=run_folder, format="huggingface", out=tmp_path / start)
        assert said in (tmp_path / start / "README.md").read_text()
    assert "/home/" not in card  # whose disk it was is nobody's business
    assert "drop_path" not in card

    with pytest.raises(ValueError, match="is not empty; .* --overwrite"):
        sparkmim.export(weights=run_folder, format="huggingface", out=out)
    sparkmim.export(weights=run_folder, format="huggingface", out=out, overwrite=True)


@pytest.mark.parametrize(("model", "channels"), [("convnext_atto", 3), ("resnet18", 5)])
def test_hugging_face_encoders(tmp_path: Path, model: str, channels: int) -> None:
    mean = [0.5] * channels
    weights = encoder_file(tmp_path, model, channels=channels, mean=mean, std=mean)
    network = timm.create_model(f"local-dir:{export(tmp_path, weights, 'huggingface')}", pretrained=True).eval()
    assert network.num_classes == 0
    pixels = images(channels=channels)
    assert torch.equal(network(pixels), open_weights(weights).encoder()(pixels))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub of its HTTP client
def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Through `huggingface_hub`, to a hub that stands in for the real one."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in knows plain LFS only
    weights = encoder_file(tmp_path, "resnet18")
    command = ["export", "--weights", str(weights), "--format", "huggingface", "--out", str(tmp_path / "hub"),
               "--overwrite"]  # fmt: skip
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        main([*command, "--push", "somebody/digits", "--private"])
        assert f"pushed to {hub.address}/somebody/digits" in capsys.readouterr().out
        (asked,) = hub.repositories
        assert (asked["organization"], asked["name"]) == ("somebody", "digits")
        assert asked.get("visibility") == "private" or asked.get("private") is True  # as older versions say it
        assert hub.tokens == {"Bearer hf_secret"}
        assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "hub").iterdir()}
        with pytest.raises(SystemExit):
            main([*command, "--push", "somebody/forbidden"])
        said = capsys.readouterr().err
        assert "is written, but could not be pushed to somebody/forbidden" in said
        assert len(said.splitlines()) == 1
        assert "hf_secret" not in said


# Programs


@pytest.mark.parametrize("model", ["resnet18", "torchvision/resnet18", "convnext_atto"])
def test_onnx_encoder(tmp_path: Path, model: str) -> None:
    """One output per feature map, for any batch."""
    pytest.importorskip("onnxscript")
    weights = encoder_file(tmp_path, model)
    result = sparkmim.export(weights=weights, format="onnx", out=tmp_path / "encoder.onnx", image_size=[64, 96])
    assert result.difference is not None
    assert result.difference < 1e-4
    assert [file.name for file in tmp_path.glob("*.onnx*")] == ["encoder.onnx"]
    session = onnx_session(tmp_path / "encoder.onnx")
    assert [output.name for output in session.get_outputs()] == ["stride4", "stride8", "stride16", "stride32"]
    assert session.get_inputs()[0].name == "images"
    assert session.get_inputs()[0].shape[1:] == [3, 64, 96]
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["sparkmim.mean"]) == MEAN
    encoder = sparkmim.SparK(open_weights(weights).encoder(), image_size=[64, 96], decoder_width=32).hierarchy
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 64, 96)
        with torch.no_grad():
            expected = encoder.eval()(pixels)
        for one, other in zip(session.run(None, {"images": pixels.numpy()}), expected, strict=True):
            assert np.abs(one - other.numpy()).max() < 1e-4


def test_onnx_classifier(tmp_path: Path, network: str, cli: Any) -> None:
    """Of a network of the user's own, through the command line, which says how far it is from PyTorch."""
    pytest.importorskip("onnxscript")
    weights = classifier_file(tmp_path, network)
    done = cli("export", "--weights", weights, "--format", "onnx", "--out", "net.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("net.onnx: ")
    assert "largest difference to PyTorch" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    session = onnx_session(tmp_path / "net.onnx")
    expected = open_weights(weights).classifier()(images()).detach()
    (logits,) = session.run(["logits"], {"images": images().numpy()})
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    assert json.loads(session.get_modelmeta().custom_metadata_map["sparkmim.classes"]) == ["cat", "dog", "owl"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_onnx_is_optional(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ValueError, match=rf"onnx needs the package {missing}; .* pip install 'sparkmim\[onnx\]'"):
        sparkmim.export(weights=encoder_file(tmp_path, "resnet18"), format="onnx", out=tmp_path / "net.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_torch_export(tmp_path: Path) -> None:
    """Loads in a process that knows nothing of this package or of timm."""
    weights = encoder_file(tmp_path, "resnet18")
    result = sparkmim.export(weights=weights, format="torch-export", out=tmp_path / "encoder.pt2")
    assert result.difference is not None
    assert result.difference < 1e-5
    torch.save(images(), tmp_path / "images.pt")
    script = (
        "import sys, torch; program = torch.export.load('encoder.pt2').module(); "
        "torch.save(list(program(torch.load('images.pt'))), 'maps.pt'); "
        "assert not {'timm', 'sparkmim'} & sys.modules.keys()"
    )
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = open_weights(weights).encoder().forward_intermediates(images(), intermediates_only=True)[-4:]
    for one, other in zip(torch.load(tmp_path / "maps.pt"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_torch_export_of_an_own_network(tmp_path: Path, network: str) -> None:
    weights = encoder_file(tmp_path, network)
    maps = torch.export.load(export(tmp_path, weights, "torch-export", image_size=32)).module()(images(32))
    assert [tuple(map_.shape) for map_ in maps] == [(2, 8, 16, 16), (2, 16, 8, 8)]


# The original release


@pytest.mark.parametrize("arch", ["resnet50", "convnext_small"])
def test_there_and_back(tmp_path: Path, arch: str) -> None:
    """An original file rebuilds images, and exports to the same names, in the same order, and values."""
    path = original_file(arch, tmp_path)
    weights = open_weights(path)
    assert (weights.kind, weights.model) == ("pretrained", arch)
    with torch.no_grad():
        out = weights.spark()(torch.randn(1, 3, 224, 224))
    assert out.loss.isfinite()
    assert out.reconstruction.isfinite().all()

    back = export(tmp_path, path, "spark")
    before, after = (torch.load(file, weights_only=True, mmap=True) for file in (path, back))
    assert list(after) == PUBLISHED[arch]["top_level_keys"]
    assert (after["arch"], after["input_size"], after["is_pretrain"]) == (arch, 224, True)
    assert after["module"].pop("config") == before["module"].pop("config") == PUBLISHED[arch]["config"]
    assert after["module"].keys() == before["module"].keys()
    for name, tensor in after["module"].items():
        assert tensor.shape == before["module"][name].shape
        assert tensor.dtype == before["module"][name].dtype
        if name not in ("imn_m", "imn_s", "norm_black"):  # they mean nothing
            assert torch.equal(tensor, before["module"][name]), name


@pytest.mark.parametrize("arch", ["resnet50", "convnext_small"])
def test_original_files_are_fine_tuned(tmp_path: Path, arch: str) -> None:
    """The encoder starts as the file has it: one small step is not far from there."""
    path = original_file(arch, tmp_path)
    images = [(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), index % 2) for index in range(4)]
    data = Images(images, ["cat", "dog"])
    result = sparkmim.finetune(
        data=data, val_data=data, weights=path, out=tmp_path / "run", image_size=64, epochs=1, warmup_epochs=0,
        batch_size=4, learning_rate=1e-4, workers=0, precision="32-true",
    )  # fmt: skip
    assert result.finished
    before, after = open_weights(path).encoder_tensors, result.model.state_dict()
    weights = [name for name, tensor in before.items() if tensor.ndim > 1]
    assert len(weights) > 50
    moved = [(after[name] - before[name]).abs().max().item() for name in weights]
    assert max(moved) < 1e-4
    assert min(moved) > 0
    assert open_weights(tmp_path / "run").metadata.mean == MEAN


@pytest.mark.parametrize("arch", ["resnet50", "convnext_small"])
def test_encoder_alone_there_and_back(tmp_path: Path, arch: str) -> None:
    """`*_timm_style.pth` and `*_official_style.pth`."""
    prefix = "sparse_encoder.sp_cnn."
    module = torch.load(original_file(arch, tmp_path), weights_only=True, mmap=True)["module"]
    encoder = {name.removeprefix(prefix): value for name, value in module.items() if name.startswith(prefix)}
    path = tmp_path / "style.pth"
    torch.save(encoder, path)
    assert open_weights(path).kind == "encoder"
    back = torch.load(export(tmp_path, path, "spark"), weights_only=True)
    assert back.keys() == encoder.keys()
    assert all(torch.equal(back[name], encoder[name]) for name in back)


@pytest.mark.parametrize("model", ["resnet18", "torchvision/convnext_tiny"])
def test_own_runs_in_the_original_form(tmp_path: Path, model: str) -> None:
    """What this package pretrained loads from such a file again, decoder and all."""
    spark = spark_run(tmp_path, model, mask_ratio=0.5)
    content = torch.load(export(tmp_path, tmp_path / "run", "spark"), weights_only=True)
    assert content["module"]["config"]["dense_decoder.width"] == 32
    back = SparK(model.removeprefix("torchvision/"), image_size=64, decoder_width=32, mask_ratio=0.5).eval()
    official.load_into(back, content)
    torch.testing.assert_close(*losses(spark, back, pixels=images()))


def test_shallower_stages_have_no_original_form(tmp_path: Path) -> None:
    spark_run(tmp_path, "resnet18", stages=2)
    with pytest.raises(ValueError, match=r"at stride 32, but this was trained at stride 8 \(--stages\)"):
        export(tmp_path, tmp_path / "run", "spark")


class Hourglass(nn.Module):
    """A network of the user's own with parts that are called as those of a `SparK` model are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def test_parts_called_encoder_and_decoder(tmp_path: Path) -> None:
    network = Hourglass()
    known = metadata(None, image_size=[32, 32], decoder_width=16)
    write(network, tmp_path / "encoder.safetensors", known)
    opened = open_weights(tmp_path / "encoder.safetensors")
    assert opened.kind == "encoder"
    assert torch.equal(opened.encoder(Hourglass()).decoder[0].weight, network.decoder[0].weight)
    whole = SparK(network, image_size=32, decoder_width=16)
    save(whole, tmp_path / "run" / "weights", known)
    assert open_weights(tmp_path / "run").kind == "pretrained"


def test_a_module_that_is_given_stays_as_it_is(tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=0).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sparkmim.export(weights=encoder_file(tmp_path, "resnet18"), format="timm", out=tmp_path / "a.pth", model=network)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("crop", "mode"), [(0.0, "squash"), (0.875, "center")])
def test_the_hub_prepares_images_as_validation_did(tmp_path: Path, crop: float, mode: str) -> None:
    hub = export(tmp_path, encoder_file(tmp_path, "resnet18", crop=crop), "huggingface")
    network = timm.create_model(f"local-dir:{hub}", pretrained=True)
    config = timm.data.resolve_model_data_config(network)
    assert config["crop_mode"] == mode
    wide = Image.fromarray(np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (64, 1, 3)))  # 64×128, a ramp
    seen = timm.data.create_transform(**config)(wide)[0]  # [64, 64]
    ours = eval_transform((64, 64), crop=crop or None)(pil_to_tensor(wide))[0]
    assert (seen - ours).abs().max() < 0.1


# Networks of the user's own: in every format, under the names that they have


BACKBONE = ("stem.", "body.")
"""What the maps of the network `tiny` come from; behind them stands its own classifier, `fc`."""


def held(path: Path) -> dict[str, Tensor]:
    """The tensors of an exported file or folder."""
    if path.is_dir():
        return load_file(path / "model.safetensors")
    if path.suffix == ".pkl":
        content = pickle.loads(path.read_bytes())
        assert content["matching_heuristics"] is True
        return {name: torch.from_numpy(array) for name, array in content["model"].items()}
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


@pytest.mark.parametrize("kind", ["encoder", "pooled classifier", "classifier"])
def test_an_own_network(tmp_path: Path, network: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Formats that hold a whole network load into it strictly; those of backbones hold what its maps come from."""
    if kind == "classifier":  # a factory that takes `num_classes` has a head of its own for them
        file = Path(network.rpartition(":")[0])
        code = (
            file.read_text().replace("in_chans=3", "in_chans=3, num_classes=5").replace("(16, 5)", "(16, num_classes)")
        )
        file.write_text(code.replace("Tiny(in_chans)", "Tiny(in_chans, num_classes)"))
    weights = encoder_file(tmp_path, network) if kind == "encoder" else classifier_file(tmp_path, network)
    if kind == "classifier":
        write(shaken(create_classifier(network, 3)), weights, replace(open_weights(weights).metadata, pooled=False))
    source = open_weights(weights)
    whole = dict(source.encoder_tensors)
    backbone = {name: tensor for name, tensor in whole.items() if name.startswith(BACKBONE)}
    head = {"head.fc.weight": (3, 16), "head.fc.bias": (3,)} if kind == "pooled classifier" else {}
    assert len(backbone) == len(whole) - 2
    for format, expected, prefix in (
        ("timm", whole, ""), ("torchvision", whole, ""), ("huggingface", whole, ""), ("detectron2", backbone, ""),
        ("mmdet", backbone, "backbone."), ("mmpretrain", whole, "backbone."), ("spark", backbone, ""),
    ):  # fmt: skip
        out = path_of(tmp_path, format)
        main(["export", "--weights", str(weights), "--format", format, "--out", str(out)])
        found = held(out)
        more = head if format == "mmpretrain" else {}
        assert {name for name in found if name not in more} == {prefix + name for name in expected}
        assert all(torch.equal(tensor, found[prefix + name]) for name, tensor in expected.items())
        assert {name: tuple(found[name].shape) for name in more} == more
        said = capsys.readouterr().out
        assert said == f"{out}: {network} as {format}, {len(found)} tensors under its own names\n"
        if expected is whole and not prefix:
            module = create_encoder(network, classes=3 if kind == "classifier" else None).eval()
            module.load_state_dict(found)
            like = source.classifier() if kind == "classifier" else source.encoder()
            assert torch.equal(module(images()), like(images()))


@pytest.mark.parametrize("classes", [True, False])
def test_the_card_of_an_own_network(tmp_path: Path, network: str, classes: bool) -> None:
    """Its lines of Python load it, but for the address of the hub."""
    weights = classifier_file(tmp_path, network) if classes else encoder_file(tmp_path, network)
    hub = export(tmp_path, weights, "huggingface").rename(tmp_path / "hub")
    _, header, card = (hub / "README.md").read_text().split("---\n", 2)
    assert "library_name" not in yaml.safe_load(header)
    assert str(tmp_path) not in header + card
    code = card.split("```python\n")[1].split("```")[0].replace("images = ...", "images = torch.ones(2, 3, 64, 64)")
    code = code.replace('hf_hub_download("OWNER/NAME", "model.safetensors")', '"hub/model.safetensors"')
    (tmp_path / "load.py").write_text(f"import torch\n{code}\ntorch.save(features, 'features.pt')")
    done = run([sys.executable, "load.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    expected = open_weights(weights).encoder()(torch.ones(2, 3, 64, 64))
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), expected.detach())
    config = json.loads((hub / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("tiny", 0)


def test_timm_knows_a_registered_network(tmp_path: Path) -> None:
    """The user's factory, registered in timm, is found by what the folder for the hub says."""
    path = tmp_path / "my_registered.py"
    path.write_text(
        """
from timm.models import build_model_with_cfg, register_model
from torch import nn


class MyRegistered(nn.Module):
    def __init__(self, in_chans=3, num_classes=0, **ignored):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x):
        return self.body(self.stem(x)).mean((2, 3))


@register_model
def my_registered(pretrained=False, **settings):
    return build_model_with_cfg(MyRegistered, "my_registered", pretrained, **settings)
"""
    )
    weights = encoder_file(tmp_path, f"{path}:my_registered")
    network = timm.create_model(f"local-dir:{export(tmp_path, weights, 'huggingface')}", pretrained=True).eval()
    assert torch.equal(network(images()), open_weights(weights).encoder()(images()))


@pytest.mark.parametrize("channels", [3, 1])
def test_an_own_run_in_the_original_form(tmp_path: Path, network: str, channels: int) -> None:
    """Encoder and decoder, there and back; other channels too, which the original can be told of."""
    colours = {"mean": [0.3] * channels, "std": [0.4] * channels}
    spark = spark_run(tmp_path, network, size=32, channels=channels, **colours).eval()
    out = export(tmp_path, tmp_path / "run", "spark")
    content = torch.load(out, weights_only=True)
    assert content["arch"] == "tiny"
    assert content["module"]["norm_black"].shape == (1, channels, 32, 32)
    assert {name for name in content["module"] if name.startswith("sparse_encoder.")} == {
        f"sparse_encoder.sp_cnn.{name}" for name in spark.encoder.state_dict() if name.startswith(BACKBONE)
    }
    opened = open_weights(out)
    assert (opened.kind, opened.channels, opened.metadata.patch_size) == ("pretrained", channels, 4)
    assert opened.metadata.given("mean", "std") == colours
    assert torch.equal(*losses(spark, opened.spark(network), pixels=images(32, channels)))


# What is refused


@pytest.mark.parametrize(
    ("model", "format", "message"),
    [
        ("convnext_atto", "detectron2", "detectron2 takes ordinary ResNets, and convnext_atto is not one; use mmdet"),
        ("mobilenetv3_small_050", "torchvision", "torchvision has no network equivalent to timm's mobilenetv3_small_"),
        ("resnet18d", "torchvision", "torchvision has no network equivalent to timm's resnet18d"),
        ("resnet18d", "detectron2", "detectron2 takes ordinary ResNets, and resnet18d is not one"),
        ("mobilenetv3_small_050", "mmdet", "mmdet takes ordinary ResNets and ConvNeXts, and mobilenetv3_small_050 is"),
        ("mobilenetv3_small_050", "mmpretrain", "mmpretrain takes ordinary ResNets"),
        ("convnextv2_atto", "spark", r"ResNets and ConvNeXts \(V1\), and convnextv2_atto is neither; use timm"),
        ("torchvision/shufflenet_v2_x0_5", "timm", "timm has no network equivalent to torchvision/shufflenet_v2_x0_5"),
    ],
)
def test_networks_without_a_place(tmp_path: Path, model: str, format: str, message: str) -> None:
    weights = encoder_file(tmp_path, model)
    with pytest.raises(ValueError, match=message) as refusal:
        export(tmp_path, weights, format)
    assert len(str(refusal.value).splitlines()) == 1
    assert not list(tmp_path.glob(f"{format}*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "tensorflow"}, "there is no format 'tensorflow'; choose timm, torchvision, detectron2"),
        ({"out": "net.pkl"}, r"net\.pkl; its name ends in \.safetensors or \.pth"),
        ({"out": "taken.pth"}, r"taken\.pth exists already; choose another --out, or replace it with --overwrite"),
        ({"out": "folder.pth"}, "is a folder; --out names a file"),
        ({"out": "taken.pth/new.pth"}, r"taken\.pth cannot be made a folder"),
        ({"out": "taken.pth", "format": "huggingface"}, "is a file; --out names a folder"),
        ({"push": "a/b"}, "push uploads a folder of the format huggingface, not a timm file; use that format"),
        ({"image_size": 32}, "image_size is for onnx and torch-export; a timm file has none"),
        ({"format": "torch-export", "out": "new.pt2", "image_size": 60}, "60×60 is not a multiple of .* stride, 32"),
        ({"model": "resnet34"}, "do not fit this model"),
    ],
)
def test_mistakes(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    """Are told in a sentence, and leave what is there as it was."""
    weights = encoder_file(tmp_path, "resnet18")
    (tmp_path / "taken.pth").write_text("taken")
    (tmp_path / "folder.pth").mkdir()
    before = sorted(tmp_path.iterdir())
    settings = {"weights": weights, "format": "timm", "out": "new.pth", **given}
    settings["out"] = tmp_path / settings["out"]
    with pytest.raises(ValueError, match=message) as refusal:
        sparkmim.export(**settings)
    assert len(str(refusal.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken.pth").read_text() == "taken"


def test_overwrite_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = encoder_file(tmp_path, "resnet18"), tmp_path / "out.pth"
    out.write_text("old")
    command = ["export", "--weights", str(weights), "--format", "timm", "--out", str(out)]
    with pytest.raises(SystemExit):
        main(command)
    assert "exists already" in capsys.readouterr().err
    main([*command, "--overwrite"])
    assert capsys.readouterr().out == f"{out}: resnet18 as timm, 120 tensors\n"
    assert len(torch.load(out, weights_only=True)) == 120


def test_every_format_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, from the folder of a pretraining run; a line each, and nothing else is left there."""
    pytest.importorskip("onnxscript")
    spark_run(tmp_path, "resnet18")
    for format in EXPORTS:
        out = path_of(tmp_path / "out", format)
        main(["export", "--weights", str(tmp_path / "run"), "--format", format, "--out", str(out)])
        said = capsys.readouterr().out
        assert said.startswith(f"{out}: resnet18 as {format}, ")
        assert len(said.splitlines()) == 1
        assert out.exists()
    assert len(list((tmp_path / "out").iterdir())) == len(EXPORTS)
