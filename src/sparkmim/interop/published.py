"""List of the weights published by the authors of SparK, pretrained on ImageNet-1K without labels."""

from __future__ import annotations

from dataclasses import dataclass

from sparkmim.terminal import Terminal


@dataclass(frozen=True)
class PublishedWeights:
    """One published file.

    Attributes:
        model: timm's name of the network.
        image_size: side of the pretraining images, in pixels.
        top1: accuracy on ImageNet-1K in percent, after fine-tuning at this size.
        parameters: in millions.
        flops: per forward pass, in billions.
        file: name of the file.
        link: page to download it from in a browser.
        decoder: whether the file holds the decoder too, for reconstruction and further pretraining.
    """

    model: str
    image_size: int
    top1: float
    parameters: float
    flops: float
    file: str
    link: str
    decoder: bool = False


_DRIVE = "https://drive.google.com/file/d/{}/view?usp=share_link"

PUBLISHED = [
    PublishedWeights("resnet50", 224, 80.6, 26, 4.1, "resnet50_1kpretrained_timm_style.pth",
                     _DRIVE.format("1H8605HbxGvrsu4x4rIoNr-Wkd7JkxFPQ")),
    PublishedWeights("resnet101", 224, 82.2, 45, 7.9, "resnet101_1kpretrained_timm_style.pth",
                     _DRIVE.format("1ZwTztjU-_rfvOVfLoce9SMw2Fx0DQfoO")),
    PublishedWeights("resnet152", 224, 82.7, 60, 11.6, "resnet152_1kpretrained_timm_style.pth",
                     _DRIVE.format("1FOVuECnzQAI-OzE-hnrqW7tVpg8kTziM")),
    PublishedWeights("resnet200", 224, 83.1, 65, 15.1, "resnet200_1kpretrained_timm_style.pth",
                     _DRIVE.format("1_Q4e30qqhjchrdyW3fT6P98Ga-WnQ57s")),
    PublishedWeights("convnext_small", 224, 84.1, 50, 8.7, "convnextS_1kpretrained_official_style.pth",
                     _DRIVE.format("1Ah6lgDY5YDNXoXHQHklKKMbEd08RYivN")),
    PublishedWeights("convnext_base", 224, 84.8, 89, 15.4, "convnextB_1kpretrained_official_style.pth",
                     _DRIVE.format("1ZjWbqI1qoBcqeQijI5xX9E-YNkxpJcYV")),
    PublishedWeights("convnext_large", 224, 85.4, 198, 34.4, "convnextL_1kpretrained_official_style.pth",
                     _DRIVE.format("1qfYzGUpYBzuA88_kXkVl4KNUwfutMVfw")),
    PublishedWeights("convnext_large", 384, 86.0, 198, 101.0, "convnextL_384_1kpretrained_official_style.pth",
                     _DRIVE.format("1YgWNXJjI89l35P4ksAmBNWZ2JZCpj9n4")),
    PublishedWeights("convnext_large", 384, 86.0, 198, 101.0, "cnxL384_withdecoder_1kpretrained_spark_style.pth",
                     _DRIVE.format("1ZI9Jgtb3fKWE_vDFEly29w-1FWZSNwa0"), decoder=True),
]  # fmt: skip
"""In the order of the authors' list."""


def print_published(published: list[PublishedWeights]) -> None:
    """Prints a table, the links, and commands that take the files."""
    from rich.table import Table

    console = Terminal(out=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", justify="right")
    table.add_column("network", no_wrap=True)
    for heading in ("size", "top-1", "params", "flops"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("holds")
    for number, one in enumerate(published, 1):
        table.add_row(
            str(number), one.model, str(one.image_size), f"{one.top1:.1f}", f"{one.parameters:.0f} M",
            f"{one.flops:.1f} G", "encoder, decoder" if one.decoder else "encoder",
        )  # fmt: skip
    console.print(table)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)  # links stay whole

    say("\ntop-1: ImageNet-1K, in percent, after fine-tuning. Download with a browser:")
    for number, one in enumerate(published, 1):
        say(f"{number:3}  {one.file}\n     {one.link}")
    say(
        "\nEvery command takes these files by path:\n"
        "  sparkmim finetune --weights FILE --data labelled/ --out runs/finetuned\n"
        "  sparkmim pretrain --init-weights FILE --model NETWORK --data photos/ --out runs/further\n"
        "  sparkmim export --weights FILE --format timm --out backbone.safetensors"
    )
