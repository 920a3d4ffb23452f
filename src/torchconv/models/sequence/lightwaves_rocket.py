"""ROCKET and MiniROCKET, which LightWaveS (arXiv 2204.01379) is measured against.

ROCKET (Dempster et al., arXiv 1910.13051) filters with thousands of random kernels and keeps the share of positive
values and the maximum of each. MiniROCKET (arXiv 2012.08791) uses the 84 kernels of LightWaveS and keeps the share of
values above biases that are quantiles of training outputs. Parameters are named and ordered as in aeon, so that those
of a transformer fitted there give the same features here; ``draw`` makes new ones with PyTorch's random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models.sequence.lightwaves_features import KERNELS, TAPS

LENGTHS = (7, 9, 11)
ROCKET = ("weights", "lengths", "biases", "dilations", "paddings", "num_channel_indices", "channel_indices")
MINIROCKET = ("num_channels_per_combination", "channel_indices", "dilations", "num_features_per_dilation", "biases")
GOLDEN = (1 + 5**0.5) / 2
TWOS = list(itertools.combinations(range(TAPS), 3))  # where each of MiniROCKET's kernels has weight 2


class _Fixed(nn.Module):
    """Holds parameters as buffers under aeon's names."""

    def __init__(self, parameters: Mapping[str, Any], names: tuple[str, ...]) -> None:
        super().__init__()
        missing = [n for n in names if n not in parameters]
        check(not missing, "parameters", sorted(parameters), f"lacks {', '.join(missing)}")
        for name in names:
            value = torch.as_tensor(parameters[name])
            kept = value.dtype if value.is_floating_point() else torch.int64
            self.register_buffer(name, value.detach().clone().to(kept).flatten())

    def _channels(self, x: Tensor, needed: int) -> None:
        check(x.dim() == 3 and x.shape[1] >= needed, "x", tuple(x.shape), f"must be (B, C >= {needed}, T)")


@part("rocket", paper="lightwaves", kind="model", dims=(1,), keywords="ROCKET random kernels time series aeon")
class Rocket(_Fixed):
    """Random convolutional kernels: share of positive values and maximum of each.

    Args:
        parameters: aeon's ``weights`` (of all kernels, each (channels, taps) row-major), ``lengths``, ``biases``,
            ``dilations``, ``paddings``, ``num_channel_indices``, ``channel_indices``.
        normalise: first give every channel of every series mean 0 and spread 1, which is aeon's default.

    Shape:
        (B, C, T) → (B, 2 · kernels): share and maximum of the first kernel, of the second, ….

    Raises:
        ValueError: parameters that do not fit together, or series with too few channels or steps.

    Example:
        >>> layer = Rocket.draw(100, channels=3, length=50, seed=0)
        >>> layer(torch.zeros(2, 3, 50)).shape
        torch.Size([2, 200])

    Reference: Dempster et al., arXiv 1910.13051.
    """

    biases: Tensor

    def __init__(self, parameters: Mapping[str, Any], *, normalise: bool = True) -> None:
        super().__init__(parameters, ROCKET)
        self.normalise = normalise
        lists = {n: getattr(self, n).tolist() for n in ROCKET[1:] if n != "biases"}
        counts = [c * n for c, n in zip(lists["num_channel_indices"], lists["lengths"], strict=True)]
        weights: Tensor = self.get_buffer("weights")
        fits = sum(counts) == len(weights) and sum(lists["num_channel_indices"]) == len(lists["channel_indices"])
        check(fits, "parameters", len(weights), "weights or channel_indices are not as many as the counts say")
        self.groups: dict[tuple[int, int, int], list[int]] = {}
        self.first_weight, self.first_channel, a, b = [], [], 0, 0
        for n in range(len(counts)):
            key = (lists["lengths"][n], lists["dilations"][n], lists["paddings"][n])
            self.groups.setdefault(key, []).append(n)
            self.first_weight.append(a)
            self.first_channel.append(b)
            a, b = a + counts[n], b + lists["num_channel_indices"][n]
        self.needed = 1 + max(lists["channel_indices"])

    @classmethod
    def draw(cls, kernels: int, channels: int, length: int, *, seed: int = 0, normalise: bool = True) -> Rocket:
        """Random kernels for series of ``channels`` and ``length``, as ROCKET draws them."""
        for name, value in (("kernels", kernels), ("channels", channels), ("length", length)):
            check_positive(name, value)
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        found: dict[str, list[Any]] = {name: [] for name in ROCKET}
        for _ in range(kernels):
            taps = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
            chosen = int(2 ** uniform(0, torch.log2(torch.tensor(min(channels, taps) + 1.0)).item()))
            weights = torch.randn(chosen, taps, generator=generator)
            found["weights"].append((weights - weights.mean(1, keepdim=True)).flatten())
            octaves = max(0.0, torch.log2(torch.tensor(max(length - 1, 1) / (taps - 1))).item())
            dilation = int(2 ** uniform(0, octaves))
            found["lengths"].append(taps)
            found["biases"].append(uniform(-1, 1))
            found["dilations"].append(dilation)
            padded = bool(torch.randint(2, (), generator=generator)) or length <= (taps - 1) * dilation
            found["paddings"].append((taps - 1) * dilation // 2 if padded else 0)
            found["num_channel_indices"].append(chosen)
            found["channel_indices"] += torch.randperm(channels, generator=generator)[:chosen].tolist()
        weights = torch.cat(found.pop("weights"))
        return cls({**found, "weights": weights, "biases": torch.tensor(found["biases"])}, normalise=normalise)

    def forward(self, x: Tensor) -> Tensor:
        """Filter with all kernels of one shape at once, and describe."""
        self._channels(x, self.needed)
        if self.normalise:
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + 1e-8)
        weights, channels = self.get_buffer("weights"), self.get_buffer("channel_indices")
        counts = self.get_buffer("num_channel_indices").tolist()
        found: list[Tensor] = []
        order: list[int] = []
        for (taps, dilation, padding), members in self.groups.items():
            check(x.shape[2] + 2 * padding > (taps - 1) * dilation, "x", tuple(x.shape), "series are too short")
            dense = x.new_zeros(len(members), x.shape[1], taps)
            for row, n in enumerate(members):
                a, b = self.first_weight[n], self.first_channel[n]
                rows = weights[a : a + counts[n] * taps].view(counts[n], taps)
                dense[row].index_add_(0, channels[b : b + counts[n]], rows.to(x.dtype))
            bias = self.biases[members].to(x.dtype)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                z = F.conv1d(x, dense, bias, padding=padding, dilation=dilation)
            found.append(torch.stack([(z > 0).sum(-1).to(x.dtype) / z.shape[-1], z.amax(-1)], -1))
            order += members
        place = torch.empty(len(order), dtype=torch.int64)
        place[order] = torch.arange(len(order))
        return torch.cat(found, 1)[:, place.to(x.device)].flatten(1)


@part("minirocket", paper="lightwaves", kind="model", dims=(1,), keywords="MiniROCKET PPV time series aeon fast")
class MiniRocket(_Fixed):
    """84 fixed kernels, shares of values above biases taken from training outputs.

    Args:
        parameters: aeon's ``num_channels_per_combination``, ``channel_indices``, ``dilations``,
            ``num_features_per_dilation``, ``biases``; combinations run over dilations, kernels inside.

    Shape:
        (B, C, T) → (B, 84 · features per kernel), in the order of ``biases``.

    Raises:
        ValueError: parameters that do not fit together, or series with too few channels or steps.

    Example:
        >>> series = torch.randn(6, 2, 50, generator=torch.Generator().manual_seed(0))
        >>> MiniRocket.draw(series, 336)(series).shape
        torch.Size([6, 336])

    Reference: Dempster et al., arXiv 2012.08791.
    """

    biases: Tensor

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters, MINIROCKET)
        dilations, numbers = (self.get_buffer(n).tolist() for n in ("dilations", "num_features_per_dilation"))
        self.steps: list[tuple[int, int]] = list(zip(dilations, numbers, strict=True))
        self.counts: list[int] = self.get_buffer("num_channels_per_combination").tolist()
        self.channels: list[int] = self.get_buffer("channel_indices").tolist()
        fits = len(self.counts) == KERNELS * len(self.steps) and sum(self.counts) == len(self.channels)
        fits = fits and len(self.biases) == KERNELS * sum(n for _, n in self.steps)
        check(fits, "parameters", len(self.biases), "biases or channels are not as many as the dilations say")

    @classmethod
    def draw(
        cls, x: Tensor, features: int = 10_000, *, max_dilations_per_kernel: int = 32, seed: int = 0
    ) -> MiniRocket:
        """Biases and channels for training series (N, C, T), as MiniROCKET fits them."""
        check_positive("features", features)
        check(x.dim() == 3 and x.shape[2] >= TAPS, "x", tuple(x.shape), f"must be (N, C, T >= {TAPS})")
        generator = torch.Generator().manual_seed(seed)
        channels, length = x.shape[1:]
        steps = _dilations(length, max(1, features // KERNELS), max_dilations_per_kernel)
        top = torch.log2(torch.tensor(min(channels, TAPS) + 1.0))
        combinations = KERNELS * len(steps)
        counts = (2 ** (torch.rand(combinations, generator=generator) * top)).long().clamp(max=channels).tolist()
        chosen = [c for n in counts for c in torch.randperm(channels, generator=generator)[:n].tolist()]
        total = KERNELS * sum(n for _, n in steps)
        quantiles = (torch.arange(1, total + 1, dtype=torch.float64) * GOLDEN) % 1
        found = {
            "num_channels_per_combination": counts,
            "channel_indices": chosen,
            "dilations": [d for d, _ in steps],
            "num_features_per_dilation": [n for _, n in steps],
            "biases": torch.zeros(total, dtype=x.dtype),
        }
        layer, at = cls(found), 0
        for n, (_, number) in enumerate(steps):
            for kernel in range(KERNELS):
                row = int(torch.randint(len(x), (), generator=generator))
                z = layer._filtered(x[row : row + 1], n)[0, kernel]
                wanted = quantiles[at : at + number].to(z)
                layer.biases[at : at + number] = torch.quantile(z, wanted)
                at += number
        return layer

    def _filtered(self, x: Tensor, step: int) -> Tensor:
        """Outputs of all kernels at one dilation, zeros outside the series: (B, C, T) → (B, 84, T).

        Nine shifted copies serve all kernels, −Σ x + 3 (three of them), in aeon's order of summation.
        """
        dilation, length, middle = self.steps[step][0], x.shape[-1], TAPS // 2
        padded = F.pad(x, (middle * dilation, middle * dilation))
        shifts = [padded.narrow(-1, n * dilation, length) for n in range(TAPS)]
        alpha = -x
        for n in (*range(middle), *range(middle + 1, TAPS)):
            alpha = alpha - shifts[n]
        gamma = 3 * torch.stack(shifts, 2)
        start = KERNELS * step
        at = sum(self.counts[:start])
        chosen = []
        for count in self.counts[start : start + KERNELS]:
            chosen.append(self.channels[at : at + count])
            at += count
        z = x.new_zeros(len(x), KERNELS, length)
        for n in range(max(map(len, chosen))):
            kernels = [k for k, channels in enumerate(chosen) if n < len(channels)]
            channels = [chosen[k][n] for k in kernels]
            a, b, c = ([TWOS[k][i] for k in kernels] for i in range(3))
            z[:, kernels] += alpha[:, channels] + gamma[:, channels, a] + gamma[:, channels, b] + gamma[:, channels, c]
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Shares of values above each bias; every second combination leaves the padded ends out."""
        self._channels(x, 1 + max(self.channels))
        found = []
        at = 0
        for n, (dilation, number) in enumerate(self.steps):
            z, margin = self._filtered(x, n), TAPS // 2 * dilation
            check(x.shape[2] > 2 * margin, "x", tuple(x.shape), f"series need more than {2 * margin} steps")
            biases = self.biases[at : at + KERNELS * number].view(KERNELS, number, 1).to(x.dtype)
            shares = torch.empty(len(x), KERNELS, number, dtype=x.dtype, device=x.device)
            for first, seen in ((n % 2, z), ((n + 1) % 2, z[..., margin : x.shape[2] - margin])):
                above = seen[:, first::2, None] > biases[first::2]
                shares[:, first::2] = above.sum(-1).to(x.dtype) / seen.shape[-1]
            found.append(shares.flatten(1))
            at += KERNELS * number
        return torch.cat(found, 1)


def _dilations(length: int, features: int, most: int) -> list[tuple[int, int]]:
    """Dilations and the features of each, for so many features a kernel."""
    limit = min(features, most)
    top = torch.log2(torch.tensor((length - 1) / (TAPS - 1), dtype=torch.float64)).item()
    exponents = torch.linspace(0, top, limit, dtype=torch.float64)
    values, counts = torch.unique((2**exponents).long(), return_counts=True)
    numbers = (counts * (features / limit)).long().tolist()
    for n in range(features - sum(numbers)):
        numbers[n % len(numbers)] += 1
    return list(zip(values.tolist(), numbers, strict=True))
