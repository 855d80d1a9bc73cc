"""Writes `docs/recipes.md`: the values of every recipe.

python docs/recipes.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparkmim.training.recipes import PAPER_DROP_PATH, RECIPES

HEAD = """\
# Recipes

A recipe decides the arguments that you leave open. `--recipe NAME` chooses one, and each of its settings is a flag:
`--recipe paper --epochs 800` keeps everything else. `--help` explains the settings and shows the values of the default
recipe. To see those of another, print the settings and train nothing:

```bash
sparkmim pretrain --data photos/ --out runs/r50 --recipe paper --print_config
```

- Rates are given for 256 images per step in pretraining and fine-tuning, and for 16 in detection and segmentation. They
  scale in proportion to the batch size.
- A recipe's batch size shrinks to the number of training images if there are fewer.
- From scratch, layer decay is 1 unless you give it.
- – means that the recipe says nothing. The drop path is then the network's own, and the image size that of the weights.

Made by `python docs/recipes.py` from `src/sparkmim/training/recipes.py`.
"""

ABOUT = {
    "pretrain": (
        "Pretraining",
        """\
- `default`: thousands of images on one machine, for a few hundred epochs. Rate, optimiser and decoder width were
  measured with a small network on CIFAR-10 (`benchmarks/results/recipe.json`).
- `contrast`: the same with a second loss: two views of each image, both masked, must find each other in the batch (CAN,
  arXiv:2210.16870). An epoch shows half of the images, twice each.
- `paper`: ImageNet at 224 pixels, or another data set of a million images, on many GPUs. Source: SparK
  (arXiv:2301.03580), appendix.
- `paper_384`: the same at 384 pixels; give `--image-size 384` with it.

The decoder width is that of SparK's decoder; `--decoder fcmae` has 512.""",
    ),
    "finetune": (
        "Fine-tuning",
        """\
- `default`: tens to thousands of labelled images on one machine. The rate was measured with a small network on CIFAR-10
  (`benchmarks/results/transfer.json`).
- The others: ImageNet, by the network of that name. `convnext_large_384` is for 384 pixels. Source: SparK, appendix;
  what its table leaves open is from the original's `downstream_imagenet/arg.py` and `data.py`.""",
    ),
    "detect": (
        "Detection",
        """\
- `default`: hundreds to thousands of images on one GPU; not tuned.
- `resnet50_1x`: COCO with a ResNet-50. Source: SparK, appendix, and the original's
  `downstream_d2/configs/coco_R_50_FPN_CONV_1x_moco_adam.yaml`; the rest is Detectron2's default.
- `convnext_base_3x`: COCO with a ConvNeXt-B. Source: SparK, appendix, and the original's
  `downstream_mmdet/configs/convnext_spark`, on ConvNeXt's `mask_rcnn_convnext_fpn.py` and MMDetection's
  `schedule_1x.py`.

The optimiser is AdamW. `drops` are the points of a run, as shares of its length, at which the rate is multiplied by
`drop_factor`.""",
    ),
    "segment": (
        "Segmentation",
        """\
- `default`: hundreds to thousands of images on one GPU; not tuned.
- `ade20k`: ADE20K with a ConvNeXt-B. The settings are ConvNeXt's (facebookresearch/ConvNeXt,
  `upernet_convnext_base_512_160k_ade20k_ss.py`); sizes and colours are from MMSegmentation's `ade20k.py`.

The optimiser is AdamW.""",
    ),
}
"""Title and explanation by command."""

DROP_PATH = "`paper` and `paper_384` also set the drop path, by the network; others keep their own:"


def page() -> str:
    """Returns the page as Markdown."""
    sections = [HEAD]
    for command, recipes in RECIPES.items():
        title, text = ABOUT[command]
        sections.append(f"## {title}\n\n{text}\n\n{recipe_table(recipes)}")
        if command == "pretrain":
            rates = table(
                ["network", "drop path"], ([f"`{name}`", shown(rate)] for name, rate in PAPER_DROP_PATH.items())
            )
            sections.append(f"{DROP_PATH}\n\n{rates}")
    return "\n".join(sections)


def recipe_table(recipes: Mapping[str, Any]) -> str:
    """Returns a table with a row per setting and a column per recipe."""
    names = [field.name for field in fields(next(iter(recipes.values())))]
    rows = ([f"`{name}`", *(shown(getattr(recipe, name)) for recipe in recipes.values())] for name in names)
    return table(["setting", *(f"`{name}`" for name in recipes)], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value: Any) -> str:
    """Returns a setting as a cell."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):  # by the network's norm
        return f"{value['batch']:g} with BatchNorm, else {value['none']:g}"
    if isinstance(value, tuple) and len(value) > 3:
        return f"{value[0]}, {value[1]}, …, {value[-1]}"
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
