"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.data import Dataset
from torchconv.training import checkpoint
from torchconv.training.batches import Batch, Batches
from torchconv.training.config import CheckpointError, EpochRecord, FitConfig, FitResult, NonFiniteLossError
from torchconv.training.device import accelerator
from torchconv.training.ema import Ema
from torchconv.training.evaluate import check_logits, exact, score
from torchconv.training.inputs import inputs_for, resident
from torchconv.training.optim import Hooks, learning_rate, make_optimizer
from torchconv.training.rng import get_rng_state, preserved_rng, seed_everything, set_rng_state

OnEpoch = Callable[[EpochRecord], None]


def fit(
    model: nn.Module,
    data: Dataset,
    config: FitConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = True,
    on_epoch: OnEpoch | None = None,
) -> FitResult:
    """Train ``model`` in place on ``data`` and leave it with the weights of its best epoch, in eval mode.

    The best epoch has the highest validation accuracy, the lowest validation loss among equals. Device, mixed precision
    and several processes (``accelerate launch``) are accelerate's; every process gets a slice of each batch, so
    ``config`` means the same on any number of them. The order of the data and the augmentation depend on the seed and
    the epoch alone; the caller's random state is untouched.

    Args:
        model: maps normalised float32 (N, C, \\*spatial) to logits (N, classes). Its modules may declare
            ``param_options()``, ``after_step()`` (called after each optimiser step) and a class method
            ``auxiliary_loss(modules, epoch)`` (added to each loss; ``epoch`` counts from 0).
        data: the training and validation splits are used.
        config: see :class:`FitConfig`.
        run_dir: where ``checkpoint.pt`` is written after each epoch; ``None`` writes nothing.
        resume: continue from ``run_dir/checkpoint.pt`` if it is there. On a CPU the numbers are bit for bit those of an
            uninterrupted run; a finished run comes back at once. ``False`` overwrites it.
        on_epoch: called with each new record on the main process, after the checkpoint is written.

    Raises:
        ValueError: an argument is out of range or does not fit the data.
        CheckpointError: the checkpoint is damaged or belongs to another run (a ValueError).
        NonFiniteLossError: the loss became NaN or infinite (a FloatingPointError); checked once an epoch.

    Example:
        >>> from torchconv.data import load
        >>> data = load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = fit(model, data, FitConfig(epochs=2, device="cpu"))
        >>> result.epochs_run, result.history[-1].val_accuracy > 0.5
        (2, True)
    """
    config.validate()
    for name in ("train", "val"):
        check(len(getattr(data, name).y) > 0, f"data.{name}", "empty", "fit needs training and validation items")
    with accelerator(config) as runner, preserved_rng(runner.device):
        run = _Run(model, data, config, runner, None if run_dir is None else Path(run_dir) / checkpoint.NAME)
        try:
            return run.train(resume, on_epoch)
        finally:
            run.close()


class _Run:
    """One call of :func:`fit`: what the epochs share."""

    def __init__(self, model: nn.Module, data: Dataset, config: FitConfig, runner: Any, path: Path | None) -> None:
        self.model, self.data, self.config, self.runner, self.path = model, data, config, runner, path
        self.device: torch.device = runner.device
        self.processes: int = runner.num_processes
        remedy = f"needs at least 2 items for each of {self.processes} processes"
        check(self.processes == 1 or config.batch_size >= 2 * self.processes, "batch_size", config.batch_size, remedy)
        self.fingerprint = checkpoint.fingerprint(model, data, config, self.processes)
        self.inputs = inputs_for(model.to(self.device), data, self.device)
        seed_everything(config.seed + runner.process_index, self.device)
        self.batches = Batches(data, config, self.inputs, runner.process_index, self.processes)
        mine = slice(runner.process_index, None, self.processes)
        self.val_x, self.val_y = resident(data.val.x[mine], self.device), data.val.y[mine].to(self.device)
        self.hooks = Hooks(model)
        self.optimizer = make_optimizer(model, config)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = Ema(model, config.ema) if config.ema else None
        self.net = runner.prepare_model(model) if self.processes > 1 else model
        self.steps = math.ceil(self.batches.count / config.grad_accum)
        self.history: list[EpochRecord] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0, "loss": math.inf, "risen": 0, "state": {}}
        self.finished = self.stopped = False

    def train(self, resume: bool, on_epoch: OnEpoch | None) -> FitResult:
        """Run the epochs that are left."""
        if resume and self.path is not None and self.path.exists():
            self._load(self.path)
        while not self.finished:
            record = self._epoch(len(self.history))
            self._judge(record)
            states = self._save()
            if on_epoch is not None and self.runner.is_main_process:
                on_epoch(record)
            # A callback may draw random numbers, and it is not called again when the run is resumed.
            set_rng_state(states[self.runner.process_index], self.device)
        self.model.load_state_dict(self.best["state"])
        seconds = sum(record.seconds for record in self.history)
        return FitResult(self.history, self.model.eval(), seconds, len(self.history), self.stopped, self.best["epoch"])

    def close(self) -> None:
        """Take accelerate's wrappers off the caller's model."""
        if self.net is not self.model:
            self.runner.unwrap_model(self.net, keep_fp32_wrapper=False)
        self.optimizer.zero_grad(set_to_none=True)

    def _epoch(self, epoch: int) -> EpochRecord:
        """Train and validate epoch ``epoch`` (from 0)."""
        started = time.perf_counter()
        self.net.train()
        losses: list[Tensor] = []
        shares: list[float] = []
        step, group = epoch * self.steps, []
        for number, batch in enumerate(self.batches.epoch(epoch), start=1):
            group.append(batch)
            if len(group) == self.config.grad_accum or number == self.batches.count:
                losses += self._step(step, group, epoch)
                shares += [len(b.y) / self.batches.items for b in group]
                step, group = step + 1, []
        rate = learning_rate(step - 1, self.steps, self.config)
        # The only place where the host waits for the device.
        values = self._sum(torch.stack(losses).float() * torch.tensor(shares, device=self.device)).tolist()
        trained = time.perf_counter() - started
        for index, value in enumerate(values):
            if not math.isfinite(value):
                at = index // self.config.grad_accum
                rate = learning_rate(epoch * self.steps + at, self.steps, self.config)
                self._diverged(f"step {at + 1} of {self.steps}", epoch, rate)
        loss, accuracy = self._validate()
        if not math.isfinite(loss):
            self._diverged("validation", epoch, rate)
        return EpochRecord(
            epoch=epoch + 1,
            train_loss=math.fsum(values),
            val_loss=loss,
            val_accuracy=accuracy,
            lr=rate,
            seconds=time.perf_counter() - started,
            images_per_second=self.batches.items / trained,
        )

    def _step(self, step: int, group: list[Batch], epoch: int) -> list[Tensor]:
        """One optimiser step over a group of batches; the loss of each, left on the device."""
        rate = learning_rate(step, self.steps, self.config)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate * settings["lr_mult"]
        items, losses = sum(batch.total for batch in group), []
        for batch in group:
            last = batch is group[-1]
            with nullcontext() if last or self.processes == 1 else self.runner.no_sync(self.net):
                with self.runner.autocast():
                    logits = check_logits(self.net(batch.x), len(batch.y), self.data.num_classes, self.model)
                loss = self.hooks.auxiliary_loss(self._loss(logits.float(), batch), epoch)
                losses.append(loss.detach())
                # Exact mean over the group's items; DDP divides by the number of processes.
                weight = len(batch.y) * self.processes / items
                self.runner.backward(loss if weight == 1 else loss * weight)
        scaler = self.runner.scaler
        if self.config.clip_grad:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.hooks.after_step()
        if self.ema is not None:
            self.ema.update()
        return losses

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, with the labels in the shares of the mixed images."""
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits, batch.y, label_smoothing=smoothing)
        if batch.mix is None:
            return loss
        other = F.cross_entropy(logits, batch.y.flip(0), label_smoothing=smoothing)
        return torch.lerp(other, loss, batch.mix.share)

    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the validation split, the same on every process."""
        subject = self.ema.model if self.ema else self.model
        self._share_buffers(subject)
        subject.eval()
        items, several = len(self.data.val.y), self.processes > 1
        with torch.no_grad():
            size, context, classes = max(256, self.config.batch_size), self.runner.autocast, self.data.num_classes
            total, accuracy = score(subject, self.val_x, self.val_y, classes, size, self.inputs, context, several)
        loss = self._sum(torch.tensor([total], device=self.device)).item() / items
        return loss, exact(accuracy, items)

    def _judge(self, record: EpochRecord) -> None:
        """Keep the weights if this epoch is the best so far, and decide whether the run ends."""
        self.history.append(record)
        best = self.best
        if record.val_accuracy > best["accuracy"]:
            best["risen"] = record.epoch
        if (record.val_accuracy, -record.val_loss) > (best["accuracy"], -best["loss"]):
            subject = self.ema.model if self.ema else self.model
            state = {name: value.detach().to("cpu", copy=True) for name, value in subject.state_dict().items()}
            best.update(epoch=record.epoch, accuracy=record.val_accuracy, loss=record.val_loss, state=state)
        stale = self.config.early_stop > 0 and record.epoch - best["risen"] >= self.config.early_stop
        done = record.epoch >= self.config.epochs
        # One process decides for all: a reduction need not give every process the same last bit.
        self.stopped, self.finished = self._agree([stale and not done, stale or done])

    def _save(self) -> list[dict[str, Any]]:
        """Write the checkpoint on the main process; the random states of all processes."""
        state = get_rng_state(self.device)
        if self.processes == 1:
            states = [state]
        else:
            from accelerate.utils import gather_object

            states = gather_object([state])
        if self.path is not None and self.runner.is_main_process:
            payload = {
                "fingerprint": self.fingerprint,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.runner.scaler.state_dict() if self.runner.scaler is not None else None,
                "ema": {"state": self.ema.model.state_dict(), "steps": self.ema.steps} if self.ema else None,
                "best": self.best,
                "history": [asdict(record) for record in self.history],
                "rng": states,
                "finished": self.finished,
                "stopped": self.stopped,
            }
            checkpoint.save(self.path, payload)
        return states

    def _load(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``."""
        payload = checkpoint.load(path, self.fingerprint)
        try:
            self.model.load_state_dict(payload["model"])
            self.optimizer.load_state_dict(payload["optimizer"])
            if self.ema:
                self.ema.model.load_state_dict(payload["ema"]["state"])
                self.ema.steps = payload["ema"]["steps"]
            if self.runner.scaler is not None and payload["scaler"] is not None:
                self.runner.scaler.load_state_dict(payload["scaler"])
            self.history = [EpochRecord(**record) for record in payload["history"]]
            self.best, self.finished, self.stopped = payload["best"], payload["finished"], payload["stopped"]
            set_rng_state(payload["rng"][self.runner.process_index], self.device)
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{path}: is incomplete ({error}); delete it, or pass resume=False") from error

    def _sum(self, value: Tensor) -> Tensor:
        return self.runner.reduce(value, "sum") if self.processes > 1 else value

    def _agree(self, flags: list[bool]) -> list[bool]:
        if self.processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(flags)
        return flags

    def _share_buffers(self, subject: nn.Module) -> None:
        """Give all processes the main one's buffers (running statistics), which DDP does before a forward only."""
        if self.processes > 1:
            for buffer in subject.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _diverged(self, where: str, epoch: int, rate: float) -> None:
        way = "lower lr, lengthen warmup_epochs or set clip_grad=1"
        if self.config.amp == "fp16":
            way += ", or use amp='bf16'"
        raise NonFiniteLossError(f"the loss is not finite at epoch {epoch + 1}, {where} (lr {rate:g}): {way}")
