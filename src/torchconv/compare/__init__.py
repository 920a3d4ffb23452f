"""The main job: operators × seeds at an equal budget → results → report."""

from torchconv.compare.config import DEFAULT_OPS, CompareConfig
from torchconv.compare.run import Listener, compare

__all__ = ["DEFAULT_OPS", "CompareConfig", "Listener", "compare"]
