"""Features of a frozen network: which activations, how a map becomes one row, and many views of an image in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.analysis._cka_features import chosen, place, quiet
from torchconv.analysis._offtheshelf_views import View, whole_size

Layer = str | Callable[[Tensor], Tensor] | None
POOLS = ("auto", "mean", "max", "gem", "flatten", "cls")
GEM_POWER = 3.0
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def extract(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    layer: Layer = None,
    *,
    pool: str = "auto",
    layout: str = "auto",
    views: Sequence[View] | None = None,
    size: int | Sequence[int] | None = None,
    shared: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """One row of features for every image, or for every view of every image, from a network that stays as it is.

    Args:
        model: any module; eval mode and no gradients while it runs, afterwards as before.
        images: (N, C, \\*spatial) or a sequence of (C, H, W) of any sizes (read one batch at a time), normalised as the
            network expects them.
        layer: name of a module whose output is taken, or a function of a batch. By default what the classifier gets:
            ``forward_features`` and then ``forward_head(pre_logits=True)`` where the network has these (those of
            torchconv and timm), else the input of the last linear or convolutional layer that runs.
        pool: how a map or tokens become a row: "mean", "max" or "gem" (generalised mean, power 3) over positions,
            "flatten", "cls" (the first token); "auto" is the network's own pooling where the classifier's input is
            read through ``forward_head``, else "mean".
        layout: where channels stand: "first", "last", or "auto": last for (B, T, D), else first.
        views: of each image, see :func:`patches` and :func:`sixteen_views`; the whole image by default.
        size: height and width that the network gets, whatever the aspect ratio; those of the images by default.
        shared: run the network once an image and pool the part of the map that belongs to each view's box: cheaper by
            the number of views, and near to the features of the separate boxes but not equal.
        batch_size: images at once.

    Returns:
        (N, D), or (N, views, D) with ``views``; float32, or float64 from a float64 network; where the network is.

    Raises:
        ValueError: an unknown layer or choice, a layer that did not run, sizes that differ without ``size``, turned or
            mirrored views with ``shared``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> extract(net, torch.randn(4, 3, 9, 9)).shape, extract(net, torch.randn(4, 3, 9, 9), "4").shape
        (torch.Size([4, 8]), torch.Size([4, 5]))
    """
    check_choice("pool", pool, POOLS)
    check_choice("layout", layout, ("auto", "first", "last"))
    check_positive("batch_size", batch_size)
    check(len(images) > 0, "images", len(images), "give at least one")
    if views is not None:
        check(len(views) > 0, "views", list(views), "give at least one, or None for the whole image")
    if shared:
        check(views is not None, "shared", shared, "needs views; it pools parts of one map")
        plain = all(view.angle == 0 and not view.mirror for view in views or ())
        check(plain, "shared", shared, "turned or mirrored views need passes of their own; use shared=False")
    if pool == "auto" and shared:
        pool = "mean"
    ready = _Batches(model, images, size, resize=views is not None or size is not None)
    rows: list[Tensor] = []
    with reading(model, layer, ready.batch(0, 1), own_head=pool == "auto") as read:
        pool = "mean" if pool == "auto" else pool
        for start in range(0, len(images), batch_size):
            batch = range(start, min(start + batch_size, len(images)))
            if views is None:
                rows.append(_kept(pooled(read(ready.batch(batch.start, batch.stop)), pool, layout)))
            elif shared:
                maps = read(ready.batch(batch.start, batch.stop))
                rows.append(_kept(torch.stack([pooled(_part(maps, v, layout), pool, layout) for v in views], 1)))
            else:
                seen = [pooled(read(ready.batch(batch.start, batch.stop, v)), pool, layout) for v in views]
                rows.append(_kept(torch.stack(seen, 1)))
    return torch.cat(rows)


class _Batches:
    """Images as batches of one size, or a view of them, where the network's parameters are."""

    def __init__(self, model: nn.Module, images: Any, size: int | Sequence[int] | None, *, resize: bool) -> None:
        first = images[0]
        check(first.is_floating_point(), "images", first.dtype, "must be floating point, normalised for the network")
        if resize:
            check(first.dim() == 3, "images", tuple(first.shape), "views and size are for pictures (C, H, W)")
        self.model, self.images, self.resize = model, images, resize
        self.size, self.given = (whole_size(size, first) if resize else (0, 0)), size is not None

    def batch(self, start: int, stop: int, view: View | None = None) -> Tensor:
        view = view or View()
        if isinstance(self.images, Tensor):
            x = self.images[start:stop]
            return place(self.model, view(x, self.size) if self.resize else x)
        some = [self.images[i] for i in range(start, stop)]
        shapes = sorted({tuple(image.shape) for image in some})
        check(self.given or len(shapes) == 1, "size", None, f"images of {shapes} need one size for the network")
        x = torch.cat([view(image[None], self.size) for image in some]) if self.resize else torch.stack(some)
        return place(self.model, x)


def _kept(rows: Tensor) -> Tensor:
    """float32 at least, and never a view of an activation."""
    wide = rows.dtype if rows.dtype in (torch.float32, torch.float64) else torch.float32
    return rows.to(wide, copy=True)


@contextmanager
def reading(
    model: nn.Module, layer: Layer, example: Tensor, *, own_head: bool = True
) -> Iterator[Callable[[Tensor], Tensor]]:
    """While open, the network is in eval mode and the function yielded gives a batch's activations."""
    with quiet(model):
        if callable(layer):
            yield layer
        elif layer is None and hasattr(model, "forward_features"):
            yield _through_head(model, own_head)
        else:
            modules = dict(model.named_modules())
            if layer is None:
                name, before = _classifier(model, example), True
            else:
                name, before = chosen(model, [layer])[0], False
            seen: list[Any] = []

            def record(module: nn.Module, inputs: Any, output: Any) -> None:
                value = inputs[0] if before else output
                seen.append(value.clone() if isinstance(value, Tensor) else value)  # later modules may work in place

            def read(batch: Tensor) -> Tensor:
                seen.clear()
                model(batch)
                check(bool(seen), "layer", name, "did not run")
                value: Tensor = seen[-1]
                check(isinstance(value, Tensor), "layer", name, f"gives a {type(value).__name__}, not a tensor")
                return value

            handle = modules[name].register_forward_hook(record)
            try:
                yield read
            finally:
                handle.remove()


def _through_head(model: Any, own_head: bool) -> Callable[[Tensor], Tensor]:
    if own_head and hasattr(model, "forward_head"):

        def read(batch: Tensor) -> Tensor:
            found: Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)
            return found

        return read
    features: Callable[[Tensor], Tensor] = model.forward_features
    return features


def _classifier(model: nn.Module, example: Tensor) -> str:
    """Name of the last linear or convolutional layer that runs."""
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, i, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, _WEIGHTED)
    ]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    check(bool(ran), "layer", None, f"{type(model).__name__} runs no linear or convolutional layer; name a module")
    return ran[-1]


def pooled(output: Tensor, pool: str, layout: str = "auto") -> Tensor:
    """(B, …) → (B, D), see :func:`extract`; rows stay rows."""
    if output.dim() < 3 or pool == "flatten":
        return output.flatten(1) if output.dim() > 1 else output[:, None]
    tokens = _tokens(output, layout)
    if pool == "cls":
        check(output.dim() == 3, "pool", pool, f"needs tokens (B, T, D), not {tuple(output.shape)}")
        return tokens[:, 0]
    if pool == "max":
        return tokens.amax(1)
    if pool == "gem":
        return tokens.clamp(min=1e-6).pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)
    return tokens.mean(1)


def _last(output: Tensor, layout: str) -> bool:
    return layout == "last" or (layout == "auto" and output.dim() == 3)


def _tokens(output: Tensor, layout: str) -> Tensor:
    """(B, positions, channels)."""
    return output.flatten(1, -2) if _last(output, layout) else output.flatten(2).transpose(1, 2)


def _part(maps: Tensor, view: View, layout: str) -> Tensor:
    """The cells of a map that a view's box touches by their centres, at least the nearest one."""
    check(maps.dim() == 4, "shared", True, f"needs a map (B, C, H, W), not {tuple(maps.shape)}; use shared=False")
    rows, columns = (1, 2) if _last(maps, layout) else (2, 3)
    for axis, start, end in ((rows, view.box[1], view.box[3]), (columns, view.box[0], view.box[2])):
        length = maps.shape[axis]
        first = min(round(start * length), length - 1)
        maps = maps.narrow(axis, first, max(round(end * length) - first, 1))
    return maps


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays zero."""
    return F.normalize(x, dim=-1, eps=1e-12)


def signed_power(x: Tensor, power: float) -> Tensor:
    """sign(x) |x|^power, component by component."""
    check(power > 0, "power", power, "must be positive")
    return x if power == 1 else x.sign() * x.abs().pow(power)
