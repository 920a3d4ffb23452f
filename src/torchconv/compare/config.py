"""What a comparison is asked to do; every field is checked before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchconv._common import check, check_choice, check_positive
from torchconv.compare.match import MATCHES
from torchconv.compare.nets import Candidate, make_candidate, make_net
from torchconv.training import FitConfig

DEFAULT_OPS = ("conv", "depthwise", "dcls", "inceptionnext", "unireplknet", "lsnet")
DEFAULT_EPOCHS = 8
# Where a run happens and how it is shown; everything else decides its numbers and must agree on --resume.
WHERE = ("out", "jobs", "dask", "data_root")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of operators.

    Attributes:
        data: "digits", a named set, a folder of images by class, an .npz, a .ts file.
        ops: operators, each with options (``dcls:kernel_size=9``); the first is the baseline.
        net: "mini", "resnet" or "timm:NAME", with options (``mini:depth=6``).
        match: what is made equal: "params", "macs", "latency" or "none".
        seeds: number of repetitions, ≥ 1; ``seed`` is the first.
        epochs: per trial; 8 when neither it nor ``time_budget`` is given.
        time_budget: seconds for all training; the number of epochs is set from a measurement.
        device: "auto", "cpu", "cuda", ….
        jobs: trials at a time; None chooses.
        dask: address of a Dask scheduler, instead of jobs.
        out: the run directory.
        data_root, image_size, limit: handed to ``torchconv.data.load``.
        batch_size … early_stop: handed to ``torchconv.training.FitConfig``; augment "auto" fits the data.
    """

    data: str = "digits"
    ops: tuple[str, ...] = DEFAULT_OPS
    net: str = "mini"
    match: str = "params"
    seeds: int = 3
    seed: int = 0
    epochs: int | None = None
    time_budget: float | None = None
    device: str = "auto"
    jobs: int | None = None
    dask: str | None = None
    out: str = "torchconv-compare"
    data_root: str | None = None
    image_size: int | None = None
    limit: int | None = None
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    augment: str = "auto"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    amp: str = "no"
    early_stop: int = 0

    def __post_init__(self) -> None:
        check_positive("seeds", self.seeds)
        check_positive("seed", self.seed, zero=True)
        check_choice("match", self.match, MATCHES)
        check(bool(self.ops), "ops", self.ops, "name at least one operator")
        for name in ("epochs", "jobs"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.time_budget is not None:
            check(self.time_budget > 0, "time_budget", self.time_budget, "must be positive")
            check(self.epochs is None, "epochs", self.epochs, "give either epochs or a time budget")
        check(self.dask is None or self.jobs is None, "jobs", self.jobs, "give either jobs or dask")
        make_net(self.net)
        labels = [c.label for c in self.candidates()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        check(not twice, "ops", ",".join(twice), "is named twice")
        self.fit_config(0, 1, "none").validate()

    def candidates(self) -> tuple[Candidate, ...]:
        """The operators, baseline first."""
        return tuple(make_candidate(op) for op in self.ops)

    def data_options(self) -> dict[str, Any]:
        """Arguments of ``torchconv.data.load``."""
        return {
            "spec": self.data,
            "root": self.data_root,
            "image_size": self.image_size,
            "limit": self.limit,
            "seed": self.seed,
        }

    def fit_config(self, seed: int, epochs: int, augment: str) -> FitConfig:
        """The training recipe of one trial."""
        return FitConfig(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            warmup_epochs=min(1.0, epochs / 4),
            label_smoothing=self.label_smoothing,
            mixup=self.mixup,
            cutmix=self.cutmix,
            augment=augment,
            ema=self.ema,
            amp=self.amp,
            early_stop=self.early_stop,
            seed=seed,
            device=self.device,
        )

    def describe(self) -> dict[str, Any]:
        """All fields as plain data."""
        return {**asdict(self), "ops": list(self.ops), "out": Path(self.out).name}

    def decisive(self) -> dict[str, Any]:
        """The fields that decide the numbers."""
        return {k: v for k, v in self.describe().items() if k not in WHERE}
