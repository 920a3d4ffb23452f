"""What all tunable layers share: the tuning vector, the map from it to mixing weights, and setting it over a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive

MODES = ("linear", "mlp")
Params = Tensor | Sequence[float] | Sequence[Sequence[float]]
"""ω as a tensor or as numbers: one vector or a row for each item."""


class Tunable(nn.Module):
    """Base of the tunable layers: N = num_params · expand_params copies of what a plain layer has once, mixed by a(ω).

    a = ω in mode "linear" with ``expand_params`` 1, else a = A·ω + c with A = ``mlp.weight`` (N, P), c = ``mlp.bias``.

    The buffer ``tuning`` is the ω used when ``forward`` is called without one; 1/P everywhere at first. A state dict
    without it (the authors' checkpoints) loads too and leaves it as it is.
    """

    tuning: Tensor

    def __init__(
        self, num_params: int, expand_params: int, mode: str, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_positive("num_params", num_params)
        check_positive("expand_params", expand_params)
        check_choice("mode", mode, MODES)
        self.num_params, self.expand_params, self.mode = num_params, expand_params, mode
        self.num_kernels = num_params * expand_params
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        affine = mode == "mlp" or expand_params > 1
        self.mlp = nn.Linear(num_params, self.num_kernels, **options) if affine else None
        self.register_buffer("tuning", torch.full((num_params,), 1 / num_params, **options))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}tuning", self.tuning)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def set_tuning(self, params: Params) -> None:
        """Set the default ω, a vector of ``num_params`` numbers."""
        value = torch.as_tensor(params)
        if value.shape != (self.num_params,):
            raise ValueError(f"params of shape {tuple(value.shape)}: expected ({self.num_params},), one number each")
        with torch.no_grad():
            self.tuning = value.to(self.tuning).clone()

    def mixing(self, params: Params | None = None, batch: int | None = None) -> Tensor:
        """Mixing weights a(ω): (P,) → (N,), or (B, P) → (B, N); equal rows give one vector where that is cheap to see.

        Args:
            params: ω for all, or one for each item; None takes ``tuning``.
            batch: the batch that (B, P) must fit; one row fits any.

        Raises:
            ValueError: ``params`` has another shape.
        """
        omega = self.tuning if params is None else params
        if not isinstance(omega, Tensor):
            omega = torch.as_tensor(omega).to(self.tuning)
        fits = omega.dim() in (1, 2) and omega.shape[-1] == self.num_params
        if fits and omega.dim() == 2 and batch is not None and omega.shape[0] != batch:
            fits = omega.shape[0] == 1
        if not fits:
            items = "B" if batch is None else batch
            expected = f"({self.num_params},) or ({items}, {self.num_params})"
            raise ValueError(f"params of shape {tuple(omega.shape)}: expected {expected}")
        if omega.dim() == 2 and batch is not None and _one_row(omega):
            omega = omega[0]
        if self.mlp is not None:
            mixed: Tensor = self.mlp(omega.to(self.mlp.weight.dtype))
            return mixed
        return omega.to(self.tuning.dtype)

    def _mixing_for_merge(self, params: Params | None) -> Tensor:
        omega = self.tuning if params is None else torch.as_tensor(params).to(self.tuning)
        if omega.dim() == 2 and omega.shape[0] == 1:
            omega = omega[0]
        if omega.shape != (self.num_params,):
            raise ValueError(f"params of shape {tuple(omega.shape)}: merging needs one vector, ({self.num_params},)")
        return self.mixing(omega).detach()

    def _copy_into_slots(self, sources: dict[str, Tensor | None]) -> None:
        """The same values in every slot; the affine map averages over the expansion, so that Σω = 1 keeps them."""
        with torch.no_grad():
            for name, source in sources.items():
                if source is not None:
                    getattr(self, name).copy_(source.expand_as(getattr(self, name)))
            if self.mlp is not None:
                eye = torch.eye(self.num_params).repeat(self.expand_params, 1) / self.expand_params
                self.mlp.weight.copy_(eye)
                nn.init.zeros_(self.mlp.bias)

    def _describe(self) -> str:
        return f"num_params={self.num_params}, expand_params={self.expand_params}, mode={self.mode!r}"


def _one_row(omega: Tensor) -> bool:
    """All rows of ω are equal, as far as that can be seen without waiting for a device or losing a gradient."""
    if torch.compiler.is_exporting():
        return False
    if omega.shape[0] == 1:
        return True
    if torch.compiler.is_compiling() or omega.requires_grad or omega.shape[0] == 0:
        return False
    if omega.stride(0) == 0:
        return True
    return omega.device.type == "cpu" and bool((omega == omega[0]).all())


def tunable_modules(model: nn.Module) -> list[Tunable]:
    """The tunable layers of ``model``, itself included."""
    return [m for m in model.modules() if isinstance(m, Tunable)]


def set_tuning(model: nn.Module, params: Params) -> nn.Module:
    """Set the default ω of every tunable layer of ``model``; returns ``model``.

    Raises:
        ValueError: there is no tunable layer, or ``params`` is not a vector of their ``num_params`` numbers.
    """
    found = tunable_modules(model)
    check(bool(found), "model", type(model).__name__, "has no tunable layer; make them with make_tunable")
    for module in found:
        module.set_tuning(params)
    return model


@contextmanager
def tuned(model: nn.Module, params: Params) -> Iterator[nn.Module]:
    """Within the context every tunable layer of ``model`` uses ``params``, (P,) or one row for each item of the batch.

    For models whose ``forward`` knows nothing of tuning. Gradients reach ``params``; call ``backward`` inside or
    outside.
    """
    found = tunable_modules(model)
    check(bool(found), "model", type(model).__name__, "has no tunable layer; make them with make_tunable")
    before = [module.tuning for module in found]
    try:
        for module in found:
            module.tuning = params if isinstance(params, Tensor) else torch.as_tensor(params).to(module.tuning)
        yield model
    finally:
        for module, value in zip(found, before, strict=True):
            module.tuning = value
