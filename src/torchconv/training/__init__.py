"""Training: one ``fit`` for every model, resumable to the bit, on one device or many (Hugging Face accelerate)."""

from torchconv.training.config import CheckpointError, EpochRecord, FitConfig, FitResult, NonFiniteLossError
from torchconv.training.evaluate import Evaluation, evaluate, predict
from torchconv.training.loop import fit
from torchconv.training.optim import learning_rate, param_groups
from torchconv.training.rng import seed_everything

__all__ = [
    "CheckpointError",
    "EpochRecord",
    "Evaluation",
    "FitConfig",
    "FitResult",
    "NonFiniteLossError",
    "evaluate",
    "fit",
    "learning_rate",
    "param_groups",
    "predict",
    "seed_everything",
]
