"""Small helpers below every layer: argument checks, sizes, atomic files, optional extras. Imports no torch."""

from torchconv._common.checks import check, check_choice, check_positive, did_you_mean
from torchconv._common.extras import require
from torchconv._common.files import atomic_write, check_writable, write_json, write_text
from torchconv._common.sizes import Padding, Size, ntuple, resolve_padding

__all__ = [
    "Padding",
    "Size",
    "atomic_write",
    "check",
    "check_choice",
    "check_positive",
    "check_writable",
    "did_you_mean",
    "ntuple",
    "require",
    "resolve_padding",
    "write_json",
    "write_text",
]
