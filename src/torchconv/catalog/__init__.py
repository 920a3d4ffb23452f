"""What exists and where it is from: the methods (``papers.toml``) and the parts that implement them (``@part``).

Nothing here imports torch: parts are read from the source text, so that ``torchconv list`` answers at once.
"""

from torchconv.catalog.papers import Paper, paper, papers, planned
from torchconv.catalog.parts import Part, describe, load, operator, operators, part, parts
from torchconv.catalog.search import Hit, search
from torchconv.catalog.variants import Variant, matching, variant, variants

__all__ = [
    "Hit",
    "Paper",
    "Part",
    "Variant",
    "describe",
    "load",
    "matching",
    "operator",
    "operators",
    "paper",
    "papers",
    "part",
    "parts",
    "planned",
    "search",
    "variant",
    "variants",
]
