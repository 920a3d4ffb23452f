"""The structured kernel of SGConv: octaves of few numbers, interpolated to twice the length each and decayed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.kernels.precision import widen


def octave_count(l_max: int, kernel_dim: int, init_scale: int = 0) -> int:
    """How many octaves of K = ``kernel_dim`` numbers reach over ``l_max`` taps: 1 + ⌈log2(l_max / K)⌉ − init_scale.

    Example:
        >>> octave_count(16384, 64)
        9
    """
    check_positive("l_max", l_max)
    check_positive("kernel_dim", kernel_dim)
    return 1 + math.ceil(math.log2(l_max / kernel_dim)) - init_scale


def check_mode(mode: str) -> None:
    """Assembly, start and options are words in one string."""
    remedy = "must contain 'cat' or 'sum' and 'randn' or 'cos'; 'nearest', 'learnable' and 'fixed' may be added"
    check(("cat" in mode or "sum" in mode) and ("randn" in mode or "cos" in mode), "mode", mode, remedy)


def structured_kernel(
    octaves: Sequence[Tensor],
    multiplier: Tensor | float = 2.0,
    mode: str = "cat",
    init_scale: int = 0,
    decay: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Assemble a long kernel from octaves.

    With n octaves of K numbers and s = init_scale,

    - "cat": block i, interpolated by 2^(max(0, i − 1) + s) and weighted by multiplier^(n − i − 1), follows block i − 1;
    - "sum": block i, interpolated by 2^(i + s), so weighted and padded to the longest, is added to the others;
    - with ``decay`` tap j is then multiplied by (j + 1)^(−decay).

    Early octaves grow instead of late ones decaying, which the normalisation makes the same.

    Args:
        octaves: n tensors.
        multiplier: a number, or (1, H, 1) with one for every channel.
        mode: contains "sum" or else means "cat"; with "nearest" the interpolation is nearest, otherwise linear.
        init_scale: octaves that the first block is stretched by beforehand; negative squeezes.
        decay: (H,) or None.
        length: give only the first taps of the kernel (or all of them, if it is shorter).

    Shape:
        n × (C, H, K) → (C, H, K·2^(n − 1 + s)). Half precision gives float32, in which the weights do not overflow.

    Example:
        >>> structured_kernel([torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 2)], 2.0)
        tensor([[[4., 4., 2., 2., 1., 1., 1., 1.]]])

    Reference: Li et al., arXiv 2210.09298, section 3.
    """
    check(len(octaves) > 0, "octaves", octaves, "there must be one at least")
    n, blocks, reached = len(octaves), [], 0
    total = _stretched(octaves[0].shape[-1], n - 1 + init_scale)
    wanted = total if length is None else min(length, total)
    for i, octave in enumerate(octaves):
        wide = widen(octave)
        added = "sum" in mode
        block = _interpolated(wide, (i if added else max(0, i - 1)) + init_scale, "nearest" in mode)
        scale = multiplier ** (n - i - 1)
        block = block * (scale.to(block.dtype) if isinstance(scale, Tensor) else scale)
        if added:
            block = F.pad(block[..., :wanted], (0, max(0, wanted - block.shape[-1])))
        blocks.append(block)
        reached += block.shape[-1]
        if not added and reached >= wanted:
            break
    kernel = torch.stack(blocks).sum(0) if "sum" in mode else torch.cat(blocks, -1)[..., :wanted]
    if decay is not None:
        position = torch.arange(1, kernel.shape[-1] + 1, device=kernel.device, dtype=kernel.dtype)
        kernel = kernel * position ** -decay.to(kernel.dtype).reshape(1, -1, 1)
    return kernel


def _stretched(size: int, octaves: int) -> int:
    return size << octaves if octaves >= 0 else size >> -octaves


def _interpolated(x: Tensor, octaves: int, nearest: bool) -> Tensor:
    if octaves == 0:
        return x
    factor = float(2.0**octaves)
    if nearest:
        return F.interpolate(x, scale_factor=factor, mode="nearest")
    return F.interpolate(x, scale_factor=factor, mode="linear", align_corners=False)


class _Octaves(nn.ParameterList):
    """The octaves, which are not decayed by the optimiser."""

    def param_options(self) -> dict[str, dict[str, float]]:
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters(recurse=False)}


class StructuredKernel(nn.Module):
    """Parameters and buffers of a structured kernel, for layers and operators to inherit, with the authors' names.

    ``kernel_norm`` is the norm of the kernel at its first use, here at construction; it is saved, never updated, and
    every kernel is divided by it. A state dict that says ``kernel_norm_initialized = False`` has it computed from the
    loaded weights, as the authors' first forward pass does.
    """

    kernel_norm: Tensor
    kernel_norm_initialized: Tensor
    multiplier: Tensor

    def make_kernel(
        self,
        sides: int,
        channels: int,
        l_max: int,
        mode: str,
        init_scale: int,
        kernel_dim: int,
        n_scales: int | None,
        decay_min: float,
        decay_max: float,
        device: Any,
        dtype: Any,
    ) -> None:
        """Create the octaves of ``sides`` kernels for each of ``channels``."""
        check_positive("l_max", l_max)
        check_positive("kernel_dim", kernel_dim)
        check_mode(mode)
        check(isinstance(init_scale, int), "init_scale", init_scale, "must be an integer")
        for name, end in (("decay_min", decay_min), ("decay_max", decay_max)):
            check(math.isfinite(end), name, end, "must be finite")
        n = octave_count(l_max, kernel_dim, init_scale) if n_scales is None else n_scales
        if n_scales is not None:
            check_positive("n_scales", n_scales)
        remedy = f"gives {n} octaves for l_max={l_max}; take a smaller kernel_dim or give n_scales of at least 1"
        check(n >= 1, "kernel_dim", kernel_dim, remedy)
        check(kernel_dim * 2.0**init_scale >= 1, "init_scale", init_scale, f"squeezes {kernel_dim} numbers to none")
        self.mode, self.init_scale = mode, init_scale
        shape, options = (sides, channels, kernel_dim), {"device": device, "dtype": dtype}
        self.kernel_list = _Octaves(nn.Parameter(torch.empty(shape, **options)) for _ in range(n))
        self._decays = float(decay_min), float(decay_max)
        learnable = "learnable" in mode
        self.register_buffer("multiplier", torch.empty(() if learnable else (1, channels, 1), **options))
        self.decay: nn.Parameter | None = None
        if learnable:
            self.decay = nn.Parameter(torch.empty(channels, **options), requires_grad="fixed" not in mode)
        self.register_buffer("kernel_norm", torch.ones(sides, channels, 1, **options))
        self.register_buffer("kernel_norm_initialized", torch.tensor(True, device=device))
        self.reset_kernel()
        self.register_load_state_dict_post_hook(_norm_when_missing)

    @torch.no_grad()
    def reset_kernel(self) -> None:
        """Set the multipliers, draw decays and octaves, and note the norm of the kernel they make."""
        low, high = self._decays
        if self.decay is None:
            options: Any = {"device": self.multiplier.device, "dtype": self.multiplier.dtype}
            self.multiplier.copy_(torch.linspace(low, high, self.multiplier.numel(), **options).reshape(1, -1, 1))
        else:
            self.multiplier.fill_(1)
            nn.init.uniform_(self.decay, min(low, high), max(low, high))
        sides, channels, size = self.kernel_list[0].shape
        for octave in self.kernel_list:
            if "randn" in self.mode:
                nn.init.normal_(octave)
                continue
            order = torch.randperm(channels, device=octave.device).to(octave.dtype)
            turn = torch.linspace(0, 2 * math.pi, size, device=octave.device, dtype=octave.dtype)
            octave.copy_((order[:, None] * turn).cos().expand(sides, -1, -1))
        self._note_norm()

    def _note_norm(self) -> None:
        if not self.kernel_norm.is_meta:
            norm = self._assembled(None).norm(dim=-1, keepdim=True)
            self.kernel_norm.copy_(norm)
            self.kernel_norm_initialized.fill_(True)

    def _assembled(self, length: int | None) -> Tensor:
        return structured_kernel(
            list(self.kernel_list), self.multiplier, self.mode, self.init_scale, self.decay, length
        )

    def one_sided(self, length: int | None = None) -> Tensor:
        """The normalised kernels (sides, channels, taps), cut to ``length``, in float32 or float64."""
        kernel = self._assembled(length)
        return kernel / self.kernel_norm.to(kernel.dtype)

    def weights(self) -> list[Tensor]:
        """All tensors that the kernel depends on."""
        decay = [] if self.decay is None else [self.decay]
        return [*self.kernel_list, self.multiplier, self.kernel_norm, *decay]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = prefix + "kernel_norm"
        found = state_dict.get(name)
        if found is not None and found.shape != self.kernel_norm.shape and found.dim() <= 2:
            state_dict[name] = found.expand_as(self.kernel_norm)  # (H, 1), as the authors' untrained module has it
        super()._load_from_state_dict(state_dict, prefix, *args)


def _norm_when_missing(module: Any, incompatible: Any) -> None:
    if not module.kernel_norm_initialized.is_meta and not bool(module.kernel_norm_initialized):
        with torch.no_grad():
            module._note_norm()
