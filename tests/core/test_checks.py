"""Checks and typed errors: what was got, what was expected, how to fix it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from feint.core import errors, random
from feint.core.checks import check_eps, check_images, check_keys, check_labels, check_mask
from feint.core.errors import DeviceError, DtypeError, FeintError, RangeError, ShapeError

X = torch.full((2, 3, 4, 5), 0.5)


def spoilt(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([0.5], DtypeError, "x is a list; expected a torch tensor (B, C, H, W)"),
        (X[0], ShapeError, "(3, 4, 5); expected (B, C, H, W); add the batch axis with x[None]"),
        (X[0, 0], ShapeError, "x has shape (4, 5); expected (B, C, H, W)"),
        (X.to(torch.int64), DtypeError, "torch.int64; expected floating point in [0, 1]; convert"),
        (spoilt(float("nan")), RangeError, "x contains NaN"),
        (spoilt(255.0), RangeError, "[0.5, 255]; expected [0, 1]; divide by 255"),
        (spoilt(-2.1), RangeError, "undo the normalisation; it belongs inside the model"),
        (spoilt(1.0001), RangeError, "values in [0.5, 1.0001]; expected [0, 1]; rescale it"),
        (spoilt(float("inf")), RangeError, "expected [0, 1]"),
    ],
)
def test_images(x: Any, error: type[FeintError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_images(x)


def test_good_images_pass(dtype: torch.dtype) -> None:
    for x in (X, spoilt(0.0), spoilt(1.0), X[:0], X[:, :, :0]):
        check_images(x.to(dtype))
    with pytest.raises(ShapeError, match="x_adv has shape"):
        check_images(X[0], "x_adv")


@pytest.mark.parametrize(
    ("y", "classes", "error", "message"),
    [
        (torch.tensor([0, 3]), 3, RangeError, "[0, 3]; expected 0 to 2"),
        (torch.tensor([-1, 0]), None, RangeError, "[-1, 0]; expected 0 or more"),
        (torch.tensor([0]), None, ShapeError, "(1,); expected (2,), one per image"),
        (torch.zeros(2, 3, dtype=torch.int64), None, ShapeError, "one per image"),
        (torch.zeros(2, dtype=torch.int32), None, DtypeError, "torch.int32; expected an int64"),
        ([0, 1], None, DtypeError, "list; expected an int64 tensor"),
    ],
)
def test_labels(y: Any, classes: int | None, error: type[FeintError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_labels(y, 2, classes)


def test_good_labels_pass() -> None:
    check_labels(torch.tensor([0, 2]), 2, 3)
    check_labels(torch.empty(0, dtype=torch.int64), 0, 3)


@pytest.mark.parametrize(
    ("eps", "norm", "message"),
    [
        (8, "linf", "eps is 8 for linf; images are in [0, 1], so expected at most 1; write 8/255"),
        (200, "l1", "expected at most 60"),
        (7.8, "l2", "expected at most 7.74597"),
        (-1, "l2", "eps is -1; expected a number ≥ 0"),
        (float("nan"), "linf", "eps is nan; expected a number ≥ 0"),
    ],
)
def test_eps(eps: float, norm: str, message: str) -> None:
    with pytest.raises(RangeError, match=re.escape(message)):
        check_eps(eps, norm, X.shape)


@pytest.mark.parametrize(("norm", "most"), [("linf", 1), ("l2", 60**0.5), ("l1", 60), ("l0", 20)])
def test_good_eps_pass(norm: str, most: float) -> None:
    # Oracle: closed form: the diagonal of the box.
    for eps in (0, most / 2, most):
        check_eps(eps, norm, X.shape)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (1, 1, 4, 5)])
def test_good_masks_pass(shape: tuple[int, ...]) -> None:
    check_mask(torch.ones(shape, dtype=torch.bool), X)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.ones(2, 3, 4, 5), DtypeError, "float32; expected bool (True = may"),
        (lambda: torch.ones(4, 5).bool(), ShapeError, "expected (2 or 1, 1 or 3, 4, 5)"),
        (lambda: torch.ones(2, 2, 4, 5).bool(), ShapeError, "(2, 2, 4, 5)"),
        (lambda: torch.ones(1, 1, 5, 4).bool(), ShapeError, "(1, 1, 5, 4)"),
        (lambda: torch.ones(1, 1, 4, 5, device="meta").bool(), DeviceError, "meta, x on cpu"),
    ],
)
def test_masks(make: Callable[[], Any], error: type[FeintError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        check_mask(make(), X)


def test_keys() -> None:
    check_keys(random.keys(0, 2), 2)
    for bad in (random.keys(0, 3), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"from feint\.core\.random\.keys"):
            check_keys(bad, 2)


def test_errors_are_feints_own_and_of_the_builtin_kind() -> None:
    kinds = {
        "ShapeError": ValueError,
        "RangeError": ValueError,
        "DtypeError": TypeError,
        "DeviceError": ValueError,
        "GradientError": RuntimeError,
        "UnknownNameError": LookupError,
        "ConfigError": ValueError,
        "DataError": OSError,
        "ModelError": RuntimeError,
    }
    for name, kind in kinds.items():
        assert issubclass(getattr(errors, name), (FeintError, kind))
        assert issubclass(getattr(errors, name), kind)
    assert errors.GradientError("lost", module="front").module == "front"
