"""MaskSparsity: sparse regularisation of those channels alone that will be pruned (arXiv 2201.06776).

N. Jiang, X. Zhao et al., "Pruning-aware Sparse Regularization for Network Pruning", 2022. Network slimming pulls the
scale γ of every batch-norm channel to zero and removes those that arrive, which also harms the channels that stay. Here
it is decided first which channels go; only those are pulled, the others train freely.

    γ.grad += λ · sign(γ) ⊙ (1 − m),   m = 1 for channels that stay;   as a loss λ · Σ_pruned |γ|

Steps: train; choose masks (:func:`channel_masks`, often after a short training with the pull on all channels); train
on with :class:`MaskSparsity`; remove the channels (:func:`torchconv.surgery.prune`); fine-tune. The pull costs
O(channels) a step and nothing afterwards. Over a training it moves γ by up to λ · Σ lr / (1 − momentum): at λ = 5e-4
that takes as many steps as ImageNet has; where it is below 1, raise λ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchconv._common import check, check_choice, did_you_mean
from torchconv.catalog import part
from torchconv.weights import read_state

KINDS = ("L1", "L2", "smoothL1")
_NORM = nn.modules.batchnorm._BatchNorm


def sparse_gradient(
    gamma: Tensor, keep: Tensor | None = None, lam: float = 5e-4, kind: str = "L1", lr: float | None = None
) -> Tensor:
    """What is added to the gradient of the scales ``gamma``; zero for channels that are kept.

    Args:
        gamma: scales, any shape.
        keep: bool of its shape, True where a channel stays; unset, all are pulled (network slimming).
        lam: λ.
        kind: "L1" λ·sign(γ); "L2" λ·γ; "smoothL1" λ·sign(γ), but λ·γ where |γ| < lr·λ, which stops γ from swinging
            around zero.
        lr: the present learning rate, for "smoothL1".

    Raises:
        ValueError: an unknown kind, "smoothL1" without lr, or a mask of another shape.

    Example:
        >>> sparse_gradient(torch.tensor([2.0, -3.0, 0.0]), torch.tensor([True, False, False]), lam=0.5)
        tensor([ 0.0000, -0.5000,  0.0000])

    Reference: arXiv 2201.06776, equation 4.
    """
    near = _check(gamma, keep, lam, kind, lr)
    term = gamma if kind == "L2" else gamma.sign()
    if kind == "smoothL1":
        term = torch.where(gamma.abs() < near, gamma, term)
    term = lam * term
    return term if keep is None else term.masked_fill(keep, 0)


def sparsity_penalty(
    gamma: Tensor, keep: Tensor | None = None, lam: float = 5e-4, kind: str = "L1", lr: float | None = None
) -> Tensor:
    """The loss whose gradient is :func:`sparse_gradient`: λ·Σ|γ|, λ·Σγ²/2, or the two joined at |γ| = lr·λ.

    Example:
        >>> sparsity_penalty(torch.tensor([2.0, -3.0]), torch.tensor([True, False]), lam=0.5)
        tensor(1.5000)
    """
    near = _check(gamma, keep, lam, kind, lr)
    term = gamma.square() / 2 if kind == "L2" else gamma.abs()
    if kind == "smoothL1":
        term = torch.where(gamma.abs() < near, gamma.square() / 2, term + (near * near / 2 - near))
    return lam * (term if keep is None else term.masked_fill(keep, 0)).sum()


def _check(gamma: Tensor, keep: Tensor | None, lam: float, kind: str, lr: float | None) -> float:
    """The distance from zero at which "smoothL1" changes."""
    check_choice("kind", kind, KINDS)
    check(lam >= 0, "lam", lam, "must not be negative")
    check(kind != "smoothL1" or lr is not None, "lr", lr, "kind='smoothL1' needs the learning rate")
    if keep is not None:
        check(keep.dtype == torch.bool, "keep", keep.dtype, "expected bool, True where a channel stays")
        check(keep.shape == gamma.shape, "keep", tuple(keep.shape), f"expected the shape {tuple(gamma.shape)} of gamma")
    return lam * (lr or 0.0)


def optimal_threshold(gamma: Tensor, energy: float = 1e-4) -> float:
    """The scale below which channels hold at most the share ``energy`` of Σγ², half way to the next channel.

    Args:
        gamma: scales of one layer, (channels,).
        energy: share that may be lost.

    Returns:
        The threshold: 0 where the smallest channel alone holds more, 1 where all are below 1e-3 (all go).

    Example:
        >>> optimal_threshold(torch.tensor([0.75, 0.001, 0.25]))
        0.1255...

    Reference: arXiv 2201.06776, section 3.2; Ye et al., arXiv 2003.04566 (optimal thresholding).
    """
    check(gamma.dim() == 1 and gamma.numel() > 0, "gamma", tuple(gamma.shape), "expected the scales of one layer")
    check(energy >= 0, "energy", energy, "must not be negative")
    values = gamma.detach().cpu().double().abs().clamp(min=1e-18).sort().values
    if float(values[-1]) < 1e-3:
        return 1.0
    lost = values.square().cumsum(0) / values.square().sum()
    over = (lost > energy).nonzero()
    first = int(over[0]) if len(over) else len(values) - 1
    return float(values[first - 1] + values[first]) / 2 if first else 0.0


def keep_mask(gamma: Tensor, threshold: float, min_channels: int = 1) -> Tensor:
    """Which channels stay: |γ| > threshold, and the largest ``min_channels`` where fewer would.

    As in the authors' code, where equal scales make that more than ``min_channels``, channel 0 stays beside those above
    the threshold.

    Args:
        gamma: scales of one layer, (channels,).
        threshold: in the paper 0.01, or :func:`optimal_threshold`.
        min_channels: 0 leaves a layer without any.

    Returns:
        (channels,) of bool.

    Example:
        >>> keep_mask(torch.tensor([0.5, -0.2, 0.001]), 0.01), keep_mask(torch.tensor([1e-4, 1e-3]), 0.01)
        (tensor([ True,  True, False]), tensor([False,  True]))
    """
    check(min_channels >= 0, "min_channels", min_channels, "must not be negative")
    size = gamma.detach().abs()
    least = min(min_channels, len(size))
    keep = size > threshold
    if int(keep.sum()) >= least:
        return keep
    largest = size >= size.sort(descending=True).values[least - 1]
    if int(largest.sum()) == least:
        return largest
    keep[0] = True
    return keep


def vote(keeps: Sequence[Tensor]) -> Tensor:
    """One mask for layers whose channels are added: the strictest agreement that prunes enough.

    Channels go that all members want to prune; or all but one; and so on, up to the first agreement by which at least
    as many go as the member that prunes least wants.

    Args:
        keeps: the members' own masks, each (channels,) of bool.

    Raises:
        ValueError: no masks, or of different sizes.

    Example:
        >>> vote([torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])])
        tensor([False, False, False,  True])
    """
    check(len({k.shape for k in keeps}) == 1, "keeps", [tuple(k.shape) for k in keeps], "expected masks of one size")
    pruned = ~torch.stack(list(keeps))
    votes, least = pruned.sum(0), int(pruned.sum(1).min())
    agreed = next(found for n in range(len(keeps), 0, -1) if int((found := votes >= n).sum()) >= least)
    return ~agreed


def channel_masks(
    model: nn.Module,
    *,
    threshold: float | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    scope: str = "layer",
    groups: Iterable[Any] = (),
    norms: Iterable[str] | None = None,
    min_channels: int = 1,
) -> dict[str, Tensor]:
    """Which channels stay, chosen by the size of the batch norms' scales. Give one of threshold, energy and ratio.

    Args:
        model: any module.
        threshold: channels with |γ| at or below it go.
        energy: per layer :func:`optimal_threshold`; the paper's is 1e-4.
        ratio: the share of channels that goes, in [0, 1).
        scope: of ``ratio``: "layer" takes that share of each, "global" of all together, by one threshold. The latter
            can leave single layers with ``min_channels``.
        groups: of norms that share channels: what :func:`torchconv.surgery.channel_groups` returns, or lists of names.
            Each gets one mask by :func:`vote`, with ``min_channels`` of the largest Σ|γ| where that leaves fewer;
            norms whose channels cannot be removed get none.
        norms: the batch norms that may lose channels; unset, all that have scales.
        min_channels: that each layer keeps at least.

    Returns:
        Name → (channels,) of bool, True where a channel stays; norms that lose nothing have no entry.

    Raises:
        ValueError: not one of the three, out of range, or a name that is no batch norm with scales.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> _ = net[1].weight.data.copy_(torch.tensor([0.9, 0.1, 0.8, 0.2]))
        >>> channel_masks(net, ratio=0.5)
        {'1': tensor([ True, False,  True, False])}

    Reference: arXiv 2201.06776, section 3.2.
    """
    check_choice("scope", scope, ("layer", "global"))
    given = [n for n, v in (("threshold", threshold), ("energy", energy), ("ratio", ratio)) if v is not None]
    check(len(given) == 1, "threshold, energy, ratio", given or None, "give one of them")
    check(ratio is None or 0 <= ratio < 1, "ratio", ratio, "is the share of channels that goes, in [0, 1)")
    scales = _scales(model, norms)
    if ratio is not None and scope == "global" and scales:
        everything = torch.cat([g.cpu().double().abs() for g in scales.values()]).sort().values
        gone = round(ratio * len(everything))
        threshold, ratio = (float(everything[gone - 1]) if gone else -1.0), None
    own: dict[str, Tensor] = {}
    for name, gamma in scales.items():
        if ratio is not None:
            own[name] = _without_smallest(gamma, ratio, min_channels)
        else:
            limit = optimal_threshold(gamma, energy) if energy is not None else threshold
            assert limit is not None
            own[name] = keep_mask(gamma, limit, min_channels)
    for group in groups:
        names = list(getattr(group, "norms", group))
        reason = getattr(group, "reason", "")
        members = [n for n in names if n in own]
        if reason or len(members) < len(names):  # some of them may not lose channels
            for name in members:
                del own[name]
        else:
            keep = vote([own[n] for n in names])
            if int(keep.sum()) < min_channels:  # members that disagree about all channels
                together = torch.stack([scales[n].abs() for n in names]).sum(0)
                keep[together.topk(min(min_channels, len(keep))).indices] = True
            own |= dict.fromkeys(names, keep)
    return {name: keep for name, keep in own.items() if not bool(keep.all())}


def _scales(model: nn.Module, norms: Iterable[str] | None) -> dict[str, Tensor]:
    found = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, _NORM) and m.weight is not None}
    if norms is None:
        return found
    wanted = list(norms)
    for name in wanted:
        check(name in found, "norms", name, f"is no batch norm with scales; {did_you_mean(name, found)}")
    return {name: found[name] for name in wanted}


def _without_smallest(gamma: Tensor, ratio: float, min_channels: int) -> Tensor:
    gone = min(round(ratio * len(gamma)), max(len(gamma) - min_channels, 0))
    keep = torch.ones(len(gamma), dtype=torch.bool, device=gamma.device)
    keep[gamma.abs().argsort(stable=True)[:gone]] = False
    return keep


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks of an authors' file (``*.mask``, layer → bool, True where a channel stays); nothing is unpickled.

    Args:
        path: the file; safetensors are read too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    masks = read_state(path)
    for name, keep in masks.items():
        check(
            keep.dtype == torch.bool and keep.dim() == 1, f"mask {name!r}", keep.dtype, "expected (channels,) of bool"
        )
    return masks


@part(
    "masksparsity",
    paper="masksparsity",
    kind="compression",
    dims=(1, 2, 3),
    keywords="channel pruning network slimming sparsity batch norm scale structured smaller faster",
)
class MaskSparsity(nn.Module):
    """A network that is trained while the scales of the channels that will be pruned are pulled to zero.

    In :func:`torchconv.training.fit` nothing more is needed: the penalty is added to each loss. In a loop of your own
    add :meth:`penalty` to the loss, or call :meth:`apply_gradient` between ``backward()`` and ``step()`` (once a step,
    after gradients were unscaled and reduced); for L1 the two are the same. In eval mode it computes what the pruned
    network will, so that the epoch with the best validation accuracy is the best to prune; without masks, what
    ``model`` does.

    Args:
        model: the network; it is trained in place, and is ``self.model`` afterwards.
        masks: norm → (channels,) of bool, True where a channel stays (:func:`channel_masks`). Norms without an entry
            are left alone. Unset, all channels of all batch norms are pulled: network slimming.
        lam: λ, see the module's docstring for its size.
        kind: "L1", "L2" or "smoothL1", see :func:`sparse_gradient`.
        lr: the learning rate, for "smoothL1" where a call is given none.

    Shape:
        As ``model``.

    Raises:
        ValueError: a mask that fits no norm, or an option out of range.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> sparse = MaskSparsity(net, {"1": torch.tensor([True, True, False, False])}, lam=0.5)
        >>> sparse.penalty(), sparse.eval()(torch.randn(2, 3, 8, 8))[:, 2:].any()
        (tensor(1., grad_fn=<MulBackward0>), tensor(False))

    Reference: arXiv 2201.06776, section 3.3.
    """

    keep: Tensor

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor] | None = None,
        lam: float = 5e-4,
        kind: str = "L1",
        lr: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check(lam >= 0, "lam", lam, "must not be negative")
        self.chosen = masks is not None
        if masks is None:
            masks = {n: torch.zeros(len(g), dtype=torch.bool) for n, g in _scales(model, None).items()}
        check(bool(masks), "masks", dict(masks), "there is no channel to pull; see channel_masks")
        known = dict(model.named_modules())
        for name, keep in masks.items():
            check(name in known, "masks", name, f"the network has no such layer; {did_you_mean(name, known)}")
            gamma: Any = getattr(known[name], "weight", None)
            ok = isinstance(gamma, nn.Parameter) and gamma.dim() == 1
            check(ok, "masks", name, f"{type(known[name]).__name__} has no scales; name a batch norm")
            ok = keep.dtype == torch.bool and keep.shape == gamma.shape
            shapes = f"expected bool of shape {tuple(gamma.shape)}"
            check(ok, f"masks[{name!r}]", f"{keep.dtype} {tuple(keep.shape)}", shapes)
        self.model, self.lam, self.kind, self.lr = model, lam, kind, lr
        self.names = list(masks)
        like = next(model.parameters())
        self.register_buffer("keep", torch.cat([masks[n].to(like.device) for n in self.names]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model`` makes of it; in eval mode without the channels that will be pruned."""
        if self.training or not self.chosen:
            return self.model(*args, **kwargs)
        without = {}
        parts = self.keep.split([len(gamma) for gamma in self.scales()])
        for name, keep in zip(self.names, parts, strict=True):
            norm: Any = self.model.get_submodule(name)
            without[f"{name}.weight"] = norm.weight * keep
            if norm.bias is not None:
                without[f"{name}.bias"] = norm.bias * keep
        return functional_call(self.model, without, args, kwargs)

    def scales(self) -> list[Tensor]:
        """The scales that have a mask, one tensor a norm."""
        return [self.model.get_parameter(f"{name}.weight") for name in self.names]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks, for :func:`torchconv.surgery.prune`; norms that lose nothing have no entry."""
        parts = self.keep.split([len(gamma) for gamma in self.scales()])
        return {name: keep for name, keep in zip(self.names, parts, strict=True) if not bool(keep.all())}

    def penalty(self, lr: float | None = None) -> Tensor:
        """The loss to be added, a scalar."""
        gamma = torch.cat(self.scales())
        return sparsity_penalty(gamma, self.keep, self.lam, self.kind, self.lr if lr is None else lr)

    @torch.no_grad()
    def apply_gradient(self, lr: float | None = None) -> None:
        """Add the pull to the gradients of the scales; those without a gradient, frozen or not reached, stay so."""
        scales = self.scales()
        term = sparse_gradient(torch.cat(scales), self.keep, self.lam, self.kind, self.lr if lr is None else lr)
        pairs = zip(scales, term.split([len(gamma) for gamma in scales]), strict=True)
        found = [(gamma.grad, part) for gamma, part in pairs if gamma.grad is not None]
        if found:
            torch._foreach_add_([grad for grad, _ in found], [part for _, part in found])

    @classmethod
    def auxiliary_loss(cls, modules: Sequence[MaskSparsity], epoch: int) -> Tensor:
        """The penalties, for :func:`torchconv.training.fit`."""
        return torch.stack([module.penalty() for module in modules]).sum()

    def extra_repr(self) -> str:
        """Options."""
        pulled = int((~self.keep).sum())
        return f"{pulled} of {self.keep.numel()} channels pulled, lam={self.lam}, kind={self.kind!r}"
