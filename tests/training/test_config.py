"""What a configuration refuses, by name."""

from __future__ import annotations

import math

import pytest

from torchconv.training import FitConfig


def test_defaults_are_valid() -> None:
    FitConfig().validate()
    FitConfig(augment="rand-m9-mstd0.5-inc1", warmup_epochs=0.25, ema=0.999, mixup=0.8, cutmix=1.0).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("batch_size", -1),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", "fast"),
        ("weight_decay", -0.1),
        ("optimizer", "adam"),
        ("momentum", 1.0),
        ("warmup_epochs", -1),
        ("min_lr", 1.0),
        ("label_smoothing", 1.0),
        ("mixup", -0.2),
        ("cutmix", math.inf),
        ("augment", "shfit"),
        ("ema", 1.0),
        ("amp", "fp8"),
        ("grad_accum", True),
        ("clip_grad", -1.0),
        ("early_stop", -1),
        ("seed", -1),
        ("device", None),
    ],
)
def test_refusals_name_the_argument(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value!r}: ".replace("(", r"\(")):
        FitConfig(**{name: value}).validate()


def test_a_misspelling_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean shift"):
        FitConfig(augment="shfit").validate()
