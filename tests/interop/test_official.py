"""Weights of the original release: every name and shape of the published files, and what does not fit."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from originals import PUBLISHED
from sparkmim.interop import official
from sparkmim.models import SparK


def file_of(arch: str) -> dict[str, Any]:
    """What a released file holds under `module`: constants, which take no memory, each of its own value."""
    module = {
        name: torch.full((), float(number)).expand(shape)
        for number, (name, shape) in enumerate(PUBLISHED[arch]["module"].items())
    }
    return {**module, "config": PUBLISHED[arch]["config"]}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_published_names_and_shapes_fit(arch: str) -> None:
    """All names have a place in the full-size model, and all of the model's places a name."""
    with torch.device("meta"):  # no weight to initialise, and none to keep
        model = SparK(timm.create_model(arch, num_classes=0), image_size=224)
    own = model.state_dict()
    used = {name: tensor for name, tensor in file_of(arch).items()
            if name not in ("imn_m", "imn_s", "norm_black", "config")}  # fmt: skip
    names = [official.parameter_name(name) for name in used]
    assert len(set(names)) == len(names)
    assert set(names) == own.keys() - set(model.unreached_parameters)
    loaded: dict[str, Tensor] = {}
    model.load_state_dict = loaded.update  # type: ignore[assignment]  # nothing to copy on the meta device
    official.load_into(model, file_of(arch))
    assert loaded.keys() == own.keys()
    for name, tensor in zip(names, used.values(), strict=True):
        assert loaded[name].flatten()[0] == tensor.flatten()[0]
    for name, tensor in own.items():
        assert loaded[name].shape == tensor.shape


@pytest.fixture(scope="module")
def small() -> SparK:
    return SparK(timm.create_model("resnet18", num_classes=0), image_size=64, decoder_width=32)


def original_names(model: SparK) -> dict[str, Tensor]:
    """A state dictionary as the original would have named it, with other values."""
    renamed = {}
    for name, value in model.state_dict().items():
        if name.startswith("encoder."):
            original = "sparse_encoder.sp_cnn." + name.removeprefix("encoder.")
        elif name.startswith("densify."):
            _, number, part = name.split(".", 2)
            layer, dot, rest = part.partition(".")
            theirs = {"norm": "densify_norms", "project": "densify_projs", "mask_token": "mask_tokens"}[layer]
            original = f"{theirs}.{3 - int(number)}{dot}{rest}"
        else:
            original = name
            for ours, theirs in (("decoder.blocks.", "dense_decoder.dec."), ("decoder.head.", "dense_decoder.proj."),
                                 (".upsample.", ".up_sample."), (".conv1.", ".conv.0."), (".norm1.", ".conv.1."),
                                 (".conv2.", ".conv.3."), (".norm2.", ".conv.4.")):  # fmt: skip
                original = original.replace(ours, theirs)
        renamed[original] = value + 1
    return renamed


def test_values_arrive(small: SparK) -> None:
    expected = {name: value + 1 for name, value in small.state_dict().items()}
    state = original_names(small)
    assert {official.parameter_name(name) for name in state} == expected.keys()
    for wrapped in (state, {"module": {name: value + 1 for name, value in state.items()}, "epoch": 3}):
        official.load_into(small, wrapped)
        for name, value in small.state_dict().items():
            assert torch.equal(value, expected[name]), name
        expected = {name: value + 1 for name, value in expected.items()}


def test_leftovers_are_ignored(small: SparK) -> None:
    leftovers = {"imn_m": torch.zeros(1, 3, 1, 1), "imn_s": torch.ones(1, 3, 1, 1),
                 "norm_black": torch.zeros(1, 3, 64, 64), "config": {"mask_ratio": 0.6}}  # fmt: skip
    official.load_into(small, {**original_names(small), **leftovers})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("sparse_encoder.sp_cnn.layer1.0.conv1.weight"),
         r"1 missing: encoder\.layer1\.0\.conv1\.weight\)"),
        (lambda state: state.pop("mask_tokens.0"), r"1 missing: densify\.3\.mask_token"),
        (lambda state: state.pop("sparse_encoder.sp_cnn.bn1.running_mean"), r"1 missing: encoder\.bn1\.running_mean"),
        (lambda state: state.update({"dense_decoder.proj.extra": torch.zeros(3)}),
         r"1 without a place in the model: decoder\.head\.extra|1 without a place in the model: .*proj\.extra"),
        (lambda state: state.update({"something": torch.zeros(3)}), "1 without a place in the model: something"),
        (lambda state: state.update({"mask_tokens.1": torch.zeros(1, 7, 1, 1)}),
         r"1 of another shape: densify\.2\.mask_token \[1, 7, 1, 1\] for \[1, 256, 1, 1\]"),
        (lambda state: state.clear(), r"missing: .* …"),
    ],
    ids=["encoder", "mask token", "buffer", "extra in the decoder", "extra", "shape", "nothing"],
)  # fmt: skip
def test_what_does_not_fit(small: SparK, change: Any, message: str) -> None:
    """One tensor too few, too many or of another shape: named, and nothing is loaded."""
    before = {name: value.clone() for name, value in small.state_dict().items()}
    state = original_names(small)
    change(state)
    with pytest.raises(ValueError, match=r"the weights do not fit this model \(") as failure:
        official.load_into(small, state)
    assert failure.match(message)
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_classifier_stays_as_it_is() -> None:
    """Pretraining never reaches it, so released files do not hold it."""
    model = SparK(timm.create_model("resnet18", num_classes=4), image_size=64, decoder_width=32)
    classifier = model.encoder.fc.weight.clone()
    state = {name: value for name, value in original_names(model).items() if ".fc." not in name}
    official.load_into(model, state)
    assert torch.equal(model.encoder.fc.weight, classifier)


def test_a_linear_may_be_a_convolution() -> None:
    """The original's ConvNeXt has linear layers where timm may have 1×1 convolutions."""
    encoder = timm.create_model("convnext_atto", num_classes=0, conv_mlp=True)
    model = SparK(encoder, image_size=64, decoder_width=32)
    state = original_names(model)
    flat = {name: value.flatten(1) if "mlp.fc" in name and value.ndim == 4 else value for name, value in state.items()}
    assert any(flat[name].ndim != state[name].ndim for name in state)
    official.load_into(model, flat)
    name = "stages.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(encoder.state_dict()[name], state[f"sparse_encoder.sp_cnn.{name}"])


# Files


def test_read(small: SparK, tmp_path: Path) -> None:
    path = tmp_path / "resnet18_withdecoder_1kpretrained_spark_style.pth"
    module = {**original_names(small), "config": {"mask_ratio": 0.6}}
    torch.save({"arch": "resnet18", "epoch": 1600, "module": module, "is_pretrain": True}, path)
    tensors, known = official.read(path)
    assert known.model == "resnet18"
    assert known.mask_ratio == 0.6
    small.load_state_dict(tensors)
    assert official.read(str(path))[0].keys() == tensors.keys()


class Code:
    """What a hostile file would hold."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_no_code_is_run(tmp_path: Path, save: str) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    if save == "torch":
        torch.save({"module": Code(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"module": Code(marker)}))
    with pytest.raises(ValueError, match=r"weights\.pth (holds Python objects|is no weight file)") as failure:
        official.read(path)
    assert len(str(failure.value).splitlines()) == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "holds no weights: neither tensors by name, nor a `module` entry with them$"),
        ({"module": {"epoch": 3}}, "holds no weights"),
        ([1, 2], "holds no weights"),
    ],
)
def test_other_files(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        official.read(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    """One clear sentence, not PyTorch's page on unpickling."""
    with pytest.raises(ValueError, match=r"missing\.pth"):
        official.read(tmp_path / "missing.pth")
    path = tmp_path / "text.pth"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth is no weight file of PyTorch") as failure:
        official.read(path)
    assert len(str(failure.value).splitlines()) == 1
