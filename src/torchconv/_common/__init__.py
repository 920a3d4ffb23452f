"""Small helpers below every layer: argument checks, atomic files, optional extras. Imports no torch."""

from torchconv._common.checks import check, check_choice, check_positive, did_you_mean
from torchconv._common.extras import require
from torchconv._common.files import atomic_write, write_json, write_text

__all__ = [
    "atomic_write",
    "check",
    "check_choice",
    "check_positive",
    "did_you_mean",
    "require",
    "write_json",
    "write_text",
]
