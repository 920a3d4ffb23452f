"""What ``torchconv.training.fit`` costs over a loop written by hand, on the same model, data and optimiser.

Both sides train copies of one small residual network on random 32 × 32 images, in alternating order, after a warm-up.
The ratio is taken pair by pair, so that load from elsewhere on the machine, which hits both sides alike, cancels; its
median comes with a bootstrap interval. On a CPU the processor time of this process is compared too, which other
processes disturb less.

    python benchmarks/fit_overhead.py --pairs 15 --steps 60
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv.data import Dataset, Split, normalise
from torchconv.training import EpochRecord, FitConfig, fit, learning_rate, param_groups

TARGET = 1.05


class Block(nn.Module):
    """Two 3 × 3 convolutions and a short cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm_two(self.two(self.norm_one(self.one(x)).relu()))).relu()


def make_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), Block(width), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)),
        *(Block(2 * width), nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), Block(4 * width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def make_data(items: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        x = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(x, torch.randint(10, (count,), generator=generator))

    # One validation item: validating is not what is compared.
    return Dataset.from_splits("random", split(items), split(1), split(1), [str(c) for c in range(10)])


def bare(model: nn.Module, data: Dataset, config: FitConfig, device: torch.device) -> tuple[float, float]:
    """Training time of the loop that one would write by hand: data ready on the device, nothing recorded but a sum."""
    model = model.to(device).train()
    x = normalise(data.train.x, data.mean, data.std).to(device)
    if device.type == "cpu":
        x = x.to(memory_format=torch.channels_last)  # as fit does; otherwise it would win by that
    y = data.train.y.to(device)
    optimizer = torch.optim.AdamW(param_groups(model, config.lr, config.weight_decay), fused=True)
    steps, size = len(x) // config.batch_size, config.batch_size
    amp = {"no": None, "bf16": torch.bfloat16}[config.amp]
    total = torch.zeros((), device=device)
    wall, cpu = time.perf_counter(), time.process_time()
    for epoch in range(config.epochs):
        order = torch.randperm(len(x)).to(device)
        for step in range(steps):
            chosen = order[step * size : (step + 1) * size]
            rate = learning_rate(epoch * steps + step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_mult"]
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        total.item()
    return time.perf_counter() - wall, time.process_time() - cpu


def fitted(model: nn.Module, data: Dataset, config: FitConfig) -> tuple[float, float]:
    """Training time of ``fit`` as its history reports it, and its processor time from the first to the last step."""
    clock: list[float] = []
    handle = model.register_forward_pre_hook(lambda *_: clock.append(time.process_time()) if not clock else None)

    def note(record: EpochRecord) -> None:
        if record.epoch == config.epochs:
            clock.append(time.process_time())

    result = fit(model, data, config, on_epoch=note)
    handle.remove()
    items = len(data.train.y)
    return sum(items / record.images_per_second for record in result.history), clock[1] - clock[0]


def interval(ratios: list[float]) -> dict[str, float]:
    """Median of the paired ratios with a 95 % bootstrap interval."""
    values, draw = np.array(ratios), np.random.default_rng(0)
    medians = np.median(values[draw.integers(len(values), size=(5000, len(values)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return {"device": str(device), "name": name, "cores": cores, "threads": threads, "load": load, **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of torchconv.training.fit over a loop written by hand.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=15, help="alternating measurements of each side")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--amp", choices=("no", "bf16"), default="no")
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch on the CPU; 0 leaves its default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    data = make_data(arguments.steps * arguments.batch_size)
    config = FitConfig(
        epochs=arguments.epochs, batch_size=arguments.batch_size, amp=arguments.amp, device=arguments.device
    )
    model = make_model(arguments.width)
    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "bare": lambda: bare(copy.deepcopy(model), data, config, device),
        "fit": lambda: fitted(copy.deepcopy(model), data, config),
    }
    for side in sides.values():
        side()
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "fit": []}
    for pair in range(arguments.pairs):
        for name in ("bare", "fit") if pair % 2 == 0 else ("fit", "bare"):
            times[name].append(sides[name]())
    count = arguments.steps * arguments.epochs
    report: dict[str, object] = {"machine": machine(device), "pairs": arguments.pairs, "steps": count}
    for index, kind in enumerate(("wall", "cpu")):
        ratios = [f[index] / b[index] for f, b in zip(times["fit"], times["bare"], strict=True)]
        medians = {name: 1e3 * float(np.median([t[index] for t in values])) / count for name, values in times.items()}
        report[kind] = {"ratio": interval(ratios), "ms_a_step": medians}
    print(json.dumps(report, indent=2))
    ratio = report["wall"]["ratio"]  # type: ignore[index]
    word = "within" if ratio["median"] <= TARGET else "ABOVE"
    low, high = ratio["low"], ratio["high"]
    print(f"fit / bare = {ratio['median']:.3f} ({low:.3f} to {high:.3f}), {word} the target of {TARGET}")


if __name__ == "__main__":
    main()
