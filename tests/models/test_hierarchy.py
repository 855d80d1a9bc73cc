"""Feature hierarchies of networks that know nothing of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from small_networks import PlainCNN, signal_network, volume_network
from torch import Tensor, nn

from sparkmim.models import Hierarchy, create_encoder, verify_encoder
from sparkmim.models.encoders import factory_of
from sparkmim.models.hierarchy import NoHierarchy

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": (lambda: timm.create_model("resnet18"), (4, 8, 16, 32), (64, 128, 256, 512)),
    "convnext": (lambda: timm.create_model("convnext_atto"), (4, 8, 16, 32), (40, 80, 160, 320)),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050"), (4, 8, 16, 32), (8, 16, 24, 288)),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(), (4, 8, 16, 32), (64, 128, 256, 512)),
    "torchvision vgg11_bn": (lambda: torchvision.models.vgg11_bn(), (4, 8, 16, 32), (256, 512, 512, 512)),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(), (4, 8, 16, 32), (256, 512, 1024, 1024)),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), (4, 8, 16, 32), (24, 32, 96, 1280)),
    "torchvision shufflenet": (
        lambda: torchvision.models.shufflenet_v2_x0_5(), (4, 8, 16, 32), (24, 48, 96, 1024)),
    "a user's own": (PlainCNN, (2, 4, 8), (8, 12, 16)),
    "a sequence of layers": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.ReLU(), nn.Conv2d(5, 7, 2, 2)), (2, 4), (5, 7)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weights are initialized:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_maps(name: str) -> None:
    factory, strides, channels = NETWORKS[name]
    encoder = factory().eval()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    hierarchy = Hierarchy(encoder)
    assert hierarchy.strides == strides
    assert hierarchy.channels == channels
    assert hierarchy.stride == strides[-1]
    assert hierarchy.encoder is encoder
    with torch.no_grad():
        maps = hierarchy(torch.randn(1, 3, 64, 96))
    assert [tuple(map_.shape) for map_ in maps] == [
        (1, width, 64 // stride, 96 // stride) for width, stride in zip(channels, strides, strict=True)
    ]
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert not any(module._forward_hooks for module in encoder.modules())
    assert not encoder.training


def test_maps_are_those_of_the_network() -> None:
    encoder = PlainCNN().eval()
    images = torch.randn(2, 3, 32, 32)
    maps = Hierarchy(encoder)(images)
    stem = encoder.stem(images)
    assert torch.equal(maps[0], stem)
    assert torch.equal(maps[1], encoder.stage1(stem))
    assert torch.equal(maps[2], encoder.stage2(encoder.stage1(stem)))
    resnet = timm.create_model("resnet18", num_classes=0).eval()
    assert torch.equal(Hierarchy(resnet)(images)[-1], resnet.forward_features(images))


@pytest.mark.parametrize(
    ("factory", "unreached"),
    [
        (lambda: timm.create_model("resnet18"), {"fc.weight", "fc.bias"}),
        (lambda: timm.create_model("resnet18", num_classes=0), set()),
        (lambda: torchvision.models.resnet18(), {"fc.weight", "fc.bias"}),
        (PlainCNN, {"head.weight", "head.bias"}),
    ],
)
def test_parameters_that_no_map_depends_on(factory: Callable[[], nn.Module], unreached: set[str]) -> None:
    encoder = factory()
    assert set(Hierarchy(encoder).unreached) == unreached
    maps = Hierarchy(encoder)(torch.randn(2, 3, 64, 64))
    torch.stack([map_.sum() for map_ in maps]).sum().backward()
    assert {name for name, parameter in encoder.named_parameters() if parameter.grad is None} == unreached


def test_other_ranks() -> None:
    volume = Hierarchy(volume_network(), channels=1, rank=3)
    assert (volume.strides, volume.channels) == ((2, 4), (4, 8))
    assert [tuple(map_.shape) for map_ in volume(torch.randn(2, 1, 8, 8, 16))] == [(2, 4, 4, 4, 8), (2, 8, 2, 2, 4)]
    signal = Hierarchy(signal_network(), channels=2, rank=1)
    assert (signal.strides, signal.channels) == ((2, 4, 8), (4, 8, 16))
    assert [tuple(map_.shape) for map_ in signal(torch.randn(2, 2, 32))] == [(2, 4, 16), (2, 8, 8), (2, 16, 4)]


def test_the_deepest_maps() -> None:
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 2, 2) for i in range(6)]
    assert Hierarchy(nn.Sequential(*layers)).strides == (8, 16, 32, 64)


def test_other_channels_and_types() -> None:
    hierarchy = Hierarchy(timm.create_model("resnet18", in_chans=5).double(), channels=5)
    assert hierarchy(torch.randn(2, 5, 32, 32, dtype=torch.float64))[-1].dtype == torch.float64


class NoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.mean((2, 3)))
        return out


def test_no_hierarchy() -> None:
    with pytest.raises(NoHierarchy, match=r"NoMaps has no module whose output is a 2-D feature map that divides"):
        Hierarchy(NoMaps())
    with pytest.raises(NoHierarchy, match=r"pad its convolutions"):
        Hierarchy(nn.Sequential(nn.Conv2d(3, 4, 3)))  # shrinks: no map divides the image
    with pytest.raises(NoHierarchy, match=r"no feature map of InceptionV3 divides .* 3×256×256 gave 64×125×125"):
        Hierarchy(timm.create_model("inception_v3"))


def test_tokens_are_no_maps() -> None:
    """Of a transformer, the patch embedding alone would be left."""
    with pytest.raises(NoHierarchy, match=r"VisionTransformer goes on with tokens after .*`conv_proj`"):
        Hierarchy(torchvision.models.vit_b_16())


def test_stages() -> None:
    network = timm.create_model("resnet18")
    assert Hierarchy(network).strides == (4, 8, 16, 32)
    shallow = Hierarchy(network, stages=2)
    assert shallow.strides == (4, 8)
    assert {name.split(".")[0] for name in shallow.unreached} == {"layer3", "layer4", "fc"}
    assert Hierarchy(PlainCNN(), stages=1).stride == Hierarchy(PlainCNN()).strides[0]
    with pytest.raises(ValueError, match=r"stages is 5; ResNet has 4 to use, so it takes 1 to 4"):
        Hierarchy(network, stages=5)


class UNet(nn.Module):
    """An encoder, and a decoder that comes back to its strides."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.down2 = nn.Conv2d(4, 8, 3, 2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(x)
        return x + self.up(self.down2(x))


def test_ambiguous_maps_are_asked_for() -> None:
    with pytest.raises(NoHierarchy, match=r"feature_modules=\[...\]: down1 4×128×128, down2 8×64×64, up 4×128×128"):
        Hierarchy(UNet())
    hierarchy = Hierarchy(UNet(), feature_modules=["down1", "down2"])
    assert (hierarchy.strides, hierarchy.channels, hierarchy.unreached) == ((2, 4), (4, 8), ("up.weight", "up.bias"))
    assert Hierarchy(timm.create_model("resnet18"), feature_modules=["layer1", "layer3.0"]).strides == (4, 16)
    with pytest.raises(ValueError, match=r"no module named 'dwn1' for feature_modules; there is down1"):
        Hierarchy(UNet(), feature_modules=["dwn1"])
    with pytest.raises(NoHierarchy, match=r"ascending strides: 3×256×256 gave 8×64×64, 4×128×128"):
        Hierarchy(UNet(), feature_modules=["down2", "up"])
    with pytest.raises(ValueError, match="feature_modules is empty"):
        Hierarchy(UNet(), feature_modules=[])


def test_odd_strides() -> None:
    """They are read off at a size that they divide."""
    assert Hierarchy(nn.Sequential(nn.Conv2d(3, 4, 7, 7), nn.ReLU(), nn.Conv2d(4, 4, 2, 2))).strides == (7, 14)


def test_a_coarser_map_inside_decides_on_the_patch() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool = nn.Conv2d(3, 4, 2, 2), nn.AvgPool2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + nn.functional.interpolate(self.pool(x), scale_factor=4)

    hierarchy = Hierarchy(Detour(), feature_modules=["stem"])
    assert (hierarchy.stride, hierarchy.patch_unit) == (2, 2)  # what follows the last map is not run
    network = nn.Sequential(Detour(), nn.Conv2d(4, 8, 2, 2))
    hierarchy = Hierarchy(network, feature_modules=["0", "1"])
    assert (hierarchy.stride, hierarchy.patch_unit) == (4, 8)
    assert verify_encoder(network, feature_modules=["0", "1"]).exact
    with pytest.raises(ValueError, match=r"patch_size 4 is not a multiple of .* 8"):
        verify_encoder(network, patch_size=4, feature_modules=["0", "1"])


def test_what_is_shared_stays_whole() -> None:
    """Modules of two names and tensors of two modules are found once, and are the network's own afterwards."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.again = self.one
            self.two.weight = self.one.weight
            self.down = nn.Conv2d(4, 8, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.two(self.again(self.one(self.stem(x)))))
            return out

    network = Shared()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hierarchy = Hierarchy(network)
    assert (hierarchy.strides, hierarchy.unreached) == ((2, 4), ())
    assert network.two.weight is network.one.weight
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert verify_encoder(network).exact


def test_the_rank_must_fit() -> None:
    with pytest.raises(ValueError, match=r"ResNet convolves in 2-D, but images of 3 spatial axes"):
        Hierarchy(timm.create_model("resnet18"), rank=3)
    with pytest.raises(ValueError, match=r"1, 2 or 3 spatial axes, not 4"):
        Hierarchy(timm.create_model("resnet18"), rank=4)


def test_encoders_by_name() -> None:
    assert type(create_encoder("resnet18")) is timm.models.ResNet
    assert not any("fc" in name for name, _ in create_encoder("resnet18").named_parameters())
    assert create_encoder("resnet18", channels=1).conv1.in_channels == 1
    assert isinstance(create_encoder("torchvision/resnet18"), torchvision.models.ResNet)
    paths = [module for module in create_encoder("convnext_atto", drop_path=0.3).modules()
             if isinstance(module, timm.layers.DropPath)]  # fmt: skip
    assert max(module.drop_prob for module in paths) == pytest.approx(0.3)


def test_encoders_from_a_file(tmp_path: object) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def plain(): return nn.Conv2d(3, 4, 2, 2)\n"
        "def with_channels(in_chans=3): return nn.Conv2d(in_chans, 4, 2, 2)\n"
        "def wrong(): return 3\n"
    )
    assert create_encoder(f"{file}:plain").in_channels == 3
    assert create_encoder(f"{file}:with_channels", channels=5).in_channels == 5
    with pytest.raises(ValueError, match=r"returned a int, not a torch\.nn\.Module"):
        create_encoder(f"{file}:wrong")
    for own in (f"{file}:plain", nn.Identity()):
        assert create_encoder(own, drop_path=0.0) is not None
        with pytest.raises(ValueError, match=r"drop_path is 0\.2, but .* of your own .*; use --drop-path 0"):
            create_encoder(own, drop_path=0.2)
    with pytest.raises(ValueError, match="has no function named 'missing'"):
        create_encoder(f"{file}:missing")
    with pytest.raises(ValueError, match=r"nowhere\.py does not exist"):
        create_encoder("nowhere.py:plain")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet5O", {}, "timm has no model named 'resnet5O'; did you mean .*resnet50"),
        ("torchvision/resnet5O", {}, "torchvision has no model named 'resnet5O'; did you mean torchvision/resnet50"),
        ("torchvision/resnet18", {"channels": 4}, "take 3 channels, not 4"),
        ("vgg11", {"drop_path": 0.1}, "vgg11 has no drop path; use --drop-path 0"),
        ("torchvision/resnet18", {"drop_path": 0.1}, "has no stochastic depth; use --drop-path 0"),
    ],
)
def test_encoders_that_cannot_be_built(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_encoder(name, **settings)


@pytest.mark.parametrize("name", ["vgg11", "torchvision/resnet18"])
def test_networks_without_drop_path_have_one_of_zero(name: str) -> None:
    assert create_encoder(name, drop_path=0.0).state_dict().keys() == create_encoder(name).state_dict().keys()


class ChannelsLast(nn.Module):
    """Its blocks give maps with the channels last, as many as the positions along a side at 256 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 64)
        self.down, self.last = nn.Conv2d(64, 32, 2, 2), nn.Linear(32, 32)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(self.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, 64, 64, 64] either way
        out: Tensor = self.last(self.down(x).permute(0, 2, 3, 1))
        return out


def test_maps_are_told_by_growing_with_the_image() -> None:
    """Not by sizes that agree by chance."""
    hierarchy = Hierarchy(ChannelsLast())
    assert (hierarchy.strides, hierarchy.channels, hierarchy.patch_unit) == ((4, 8), (64, 32), 8)
    assert verify_encoder(ChannelsLast()).exact


def test_a_file_is_compiled_as_it_is(tmp_path: Path) -> None:
    """Without what our own files import from `__future__`."""
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef net(in_chans: int = 3): return nn.Conv2d(in_chans, 4, 1)\n")
    assert factory_of(f"{file}:net").__annotations__ == {"in_chans": int}
