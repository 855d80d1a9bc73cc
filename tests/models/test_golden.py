"""The numbers of the original implementation.

Every number is held to a relative 1e-9 in float64 and 1e-4 in float32, training included, where its own conditioning
permits. It does not everywhere: the ResNet-50 case sees 2 samples of 64² pixels, so that the batch norms of its last
stages average over 4 to 16 positions, some of them nearly alike, and divide by next to nothing. Moving every weight to
a neighbouring floating-point number, up or down at random, moves its gradients by 1e-8 of themselves in float64 (and by
more than half in float32). So much is lost in the rounding of the inputs alone, and no implementation can agree better
on another machine: against 80-bit arithmetic the golden running statistics are themselves off by up to 3e-9, and ours
by 8e-10 (`benchmarks/golden_precision.py`). In that case, and in float32 (where one gradient of the ConvNeXt case is a
sum that cancels, and its training passes so near to a kink that on some processors the losses differ by a hundredth,
and not after moving all weights by such a step), a number may be off by a few times what it moves when its weights move
by one such step, which the test measures. What the first two stages and the evaluation mode give is well conditioned
everywhere, and held to the plain tolerance.
"""

from collections.abc import Callable

import pytest
import torch
from golden_case import CASES, Numbers, golden_pass, golden_training, mask_of, one_pass, one_ulp, training

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SEEDS = range(3)
"""Of the random steps by which conditioning is measured."""
MULTIPLE = {torch.float64: 10, torch.float32: 50}
"""How many times such a move an error may be: three draws tell its size, not its maximum, and in float32 the kernels of
some processors round more than that."""

BOTH_TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def errors_of(found: Numbers, golden: Numbers) -> Numbers:
    """Relative errors."""
    assert found.keys() == golden.keys()
    return {name: abs(found[name] - value) / abs(value) for name, value in golden.items()}


def allowed_errors(
    run: Callable[..., Numbers], arch: str, dtype: torch.dtype, found: Numbers, golden: Numbers
) -> Numbers:
    """The plain tolerance or, where the case does not permit it, what its conditioning permits."""
    allowed = dict.fromkeys(golden, TOLERANCE[dtype])
    forgiving = arch == "resnet50" or dtype == torch.float32
    if forgiving and max(errors_of(found, golden).values()) > TOLERANCE[dtype]:
        moved = [run(CASES[arch], dtype, one_ulp(seed)) for seed in SEEDS]
        for name, value in golden.items():
            if not name.startswith(("eval", "feature 0", "feature 1")):
                move = max(abs(other[name] - found[name]) for other in moved) / abs(value)
                allowed[name] = max(TOLERANCE[dtype], MULTIPLE[dtype] * move)
        if dtype == torch.float64 or arch != "resnet50":  # so that the test says something of every number
            assert max(allowed.values()) < 1e4 * TOLERANCE[dtype]
    return allowed


def assert_golden(found: Numbers, golden: Numbers, allowed: Numbers) -> None:
    errors = errors_of(found, golden)
    wrong = [f"{name}: {found[name]!r}, not {golden[name]!r}" for name in golden if not errors[name] <= allowed[name]]
    assert not wrong, f"{len(wrong)} of {len(golden)} numbers are off; {'; '.join(wrong[:5])}"


@pytest.mark.parametrize("arch", CASES)
def test_mask(arch: str) -> None:
    assert mask_of(CASES[arch]).long().tolist() == CASES[arch]["mask"]


@BOTH_TYPES
@pytest.mark.parametrize("arch", CASES)
def test_one_pass(arch: str, dtype: torch.dtype) -> None:
    golden, found = golden_pass(CASES[arch]), one_pass(CASES[arch], dtype)
    assert len(golden) > 150
    assert_golden(found, golden, allowed_errors(one_pass, arch, dtype, found, golden))


@BOTH_TYPES
@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny_test"])
def test_training(arch: str, dtype: torch.dtype) -> None:
    golden, found = golden_training(CASES[arch]), training(CASES[arch], dtype)
    assert_golden(found, golden, allowed_errors(training, arch, dtype, found, golden))
