"""Responses of the last convolution: read in batches, thresholded, voted on and localised (PatternNet, 1703.06339)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.analysis._cka_features import place, quiet
from torchconv.analysis._patternnet_geometry import Geometry, tap
from torchconv.analysis.erf import erf


class FeatureMaps:
    """Maps of one layer after a ReLU, a batch of images at a time; can be gone through again and again.

    What fits is kept, so that the network runs once; beyond ``keep_bytes`` it runs again for every pass and memory
    stays that of a batch.

    Args:
        model: any network; left as it was.
        images: (N, C, \\*spatial), normalised as it expects them.
        layer: whose output, "" for the model's; by default the last one with more than one position, that is, a
            classifier's last maps before pooling.
        batch_size: images at once.
        keep_bytes: keep the maps when they need no more than this.

    Example:
        >>> maps = FeatureMaps(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(10, 3, 9, 9), batch_size=4)
        >>> [tuple(m.shape) for m in maps]
        [(4, 8, 7, 7), (4, 8, 7, 7), (2, 8, 7, 7)]
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        layer: str | None = None,
        *,
        batch_size: int = 32,
        keep_bytes: int = 1 << 29,
    ) -> None:
        check_positive("batch_size", batch_size)
        check(len(images) > 0, "images", tuple(images.shape), "give at least one image")
        self.model, self.images, self.batch_size, self.keep_bytes = model, images, batch_size, keep_bytes
        self.layer = erf(model, images[:1]).layer if layer is None else layer
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        if sum(map(len, self._kept)) == len(self):
            yield from self._kept
            return
        made: list[Tensor] = []
        keep = True
        for batch in self.images.split(self.batch_size):
            maps = self._run(batch)
            keep = keep and maps.nbytes * math.ceil(len(self) / self.batch_size) <= self.keep_bytes
            made = [*made, maps] if keep else []
            yield maps
        self._kept = made

    def _run(self, batch: Tensor) -> Tensor:
        found: list[Tensor] = []
        with quiet(self.model), tap(self.model, self.layer, lambda t: found.append(t.relu())):
            self.model(place(self.model, batch))
        check(bool(found), "layer", self.layer, "did not run")
        return found[-1].cpu()


Maps = Tensor | FeatureMaps
"""Post-ReLU maps (B, N, \\*spatial): in memory, or read from a network."""


def batches(maps: Maps, size: int = 64) -> Iterator[Tensor]:
    """The maps in pieces."""
    if isinstance(maps, Tensor):
        check(maps.dim() >= 3, "maps", tuple(maps.shape), "must be (B, N, spatial axes)")
        yield from maps.split(size)
    else:
        yield from maps


def respond(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Largest response of every filter and its flat position, the first of equals; gradients go to that position only.

    Shape:
        (B, N, \\*spatial) → two of (B, N)
    """
    flat = maps.flatten(2)
    position = flat.argmax(-1)
    return flat.gather(-1, position[..., None]).squeeze(-1), position


def binarise_thresholds(maps: Maps, quantile: float = 0.9) -> Tensor:
    """The quantile of every filter's responses over all images and positions, linearly interpolated.

    Exact, in one pass: of every filter only the largest 1 − quantile of the responses are held, up to twice.

    Shape:
        (B, N, \\*spatial) → (N,)
    """
    check(0 <= quantile <= 1, "quantile", quantile, "must lie in 0..1")
    held: Tensor | None = None
    wanted, at = 0, 0.0
    for batch in batches(maps):
        if held is None:
            count = len(maps) * batch[0, 0].numel()
            check(count > 0, "maps", tuple(batch.shape), "must hold at least one response a filter")
            at = (count - 1) * quantile
            wanted = count - math.floor(at)
        new = batch.transpose(0, 1).flatten(1)
        held = new if held is None else torch.cat([held, new], 1)
        if held.shape[1] > 2 * wanted:
            held = held.topk(wanted, sorted=False).values
    if held is None:
        raise ValueError("maps=(0, …): give at least one image")
    held = held.float() if held.dtype in (torch.float16, torch.bfloat16) else held
    rank = held.shape[1] - wanted + 1
    low = held.kthvalue(rank).values
    high = held.kthvalue(min(rank + 1, held.shape[1])).values
    return torch.lerp(low, high, at - math.floor(at))


def binarise(maps: Tensor, thresholds: Tensor) -> Tensor:
    """Where each filter fires: its response is above its threshold.

    Shape:
        (B, N, \\*spatial), (N,) → the same, bool
    """
    return maps > thresholds.to(maps.device).view(-1, *[1] * (maps.dim() - 2))


@dataclass(frozen=True)
class Located:
    """Best position of every pattern in every image.

    Attributes:
        position: (B, P), flat, -1 where the pattern is absent.
        score: (B, P), mean response of its filters there, 0 where absent.
        box: (B, P, 2·axes), low corner and high corner, x before y, -1 where absent.
    """

    position: Tensor
    score: Tensor
    box: Tensor

    @property
    def present(self) -> Tensor:
        """(B, P), bool."""
        return self.position >= 0


def votes(masks: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """How many of each set's filters fire, at every position.

    Shape:
        (B, N, \\*spatial) → (B, P, \\*spatial), integers
    """
    return _summed(masks.long(), sets)


def locate(
    maps: Maps,
    thresholds: Tensor,
    sets: Sequence[Sequence[int]],
    min_votes: int | Sequence[int],
    geometry: Geometry | None = None,
) -> Located:
    """Where patterns are: the position of the largest mean response among those with enough votes.

    Args:
        maps: (B, N, \\*spatial).
        thresholds: (N,), of :func:`binarise_thresholds`.
        sets: filters of every pattern.
        min_votes: filters that must fire at one place, for all patterns or for each.
        geometry: of the boxes; cells of the map by default.

    Raises:
        ValueError: a set names a filter that is not there.
    """
    least = torch.tensor([min_votes] * len(sets) if isinstance(min_votes, int) else list(min_votes))
    check(len(least) == len(sets), "min_votes", min_votes, f"give one number, or one for each of {len(sets)} patterns")
    sizes = torch.tensor([max(1, len(s)) for s in sets])
    found = []
    for batch in batches(maps):
        shape = (1, -1, *[1] * (batch.dim() - 2))
        fires = binarise(batch, thresholds).view(torch.uint8)
        enough = _summed(fires, sets) >= least.view(shape).to(batch.device)
        mean = _summed(batch, sets) / sizes.view(shape).to(batch.device)
        score, position = respond(mean.masked_fill(~enough, -torch.inf))
        absent = ~enough.flatten(2).any(-1)
        position = position.masked_fill(absent, -1)
        boxes = (geometry or Geometry()).boxes(position, batch.shape[2:])
        found.append((position, score.masked_fill(absent, 0), boxes))
    return Located(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _summed(values: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """Sums over each set's channels, one member of all sets at a time: no (B, P, k, …) tensor is made."""
    count = values.shape[1]
    for chosen in sets:
        ok = all(0 <= n < count for n in chosen)
        check(ok, "sets", tuple(chosen), f"must name some of {count} filters, from 0")
    slots = max(map(len, sets), default=0)
    if values.dtype == torch.uint8 and slots > 255:
        values = values.long()
    total = values.new_zeros(len(values), len(sets), *values.shape[2:])
    for slot in range(slots):
        rows = [i for i, chosen in enumerate(sets) if len(chosen) > slot]
        members = values.index_select(1, _index([sets[i][slot] for i in rows], values))
        total = total + members if len(rows) == len(sets) else total.index_add(1, _index(rows, values), members)
    return total


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def supports(present: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Share of every class's images in which each pattern is present; 0 for a class without images.

    Shape:
        (B, P) bool, (B,) → (P, classes), float64
    """
    members = nn.functional.one_hot(labels, n_classes).double()
    return present.double().T @ members / members.sum(0).clamp_min(1)
