"""Checkpoints: reading the authors' files, saving and loading networks, the Hugging Face hub.

Nothing is unpickled beyond tensors: ``.pth`` files are read with ``torch.load(weights_only=True)``.
"""

from torchconv.weights.official import load_official
from torchconv.weights.reading import read_state
from torchconv.weights.report import LoadReport, compare_states, load_into
from torchconv.weights.store import check_place, from_pretrained, load, open_model, push_to_hub, save

__all__ = [
    "LoadReport",
    "check_place",
    "compare_states",
    "from_pretrained",
    "load",
    "load_into",
    "load_official",
    "open_model",
    "push_to_hub",
    "read_state",
    "save",
]
