"""DCLS layers whose positions are learned on one axis only (arXiv 2112.03740, the authors' restricted layers).

- :class:`Dcls2_1d`, :class:`Dcls3_1d`: the last axis of a 2-D or 3-D kernel is learned; on the axes before it every
  cell has m weights of its own: weight (out, in/groups, \\*dense, m), P (1, out, in/groups, \\*dense, m).
- :class:`Dcls2dK1d`: a 1-D kernel, upright or flat, in a 2-D convolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.ops._common import Padding, Size, check_unit, ntuple
from torchconv.ops.dcls import DCLSBase


class _LastAxis(DCLSBase):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dense_kernel_size: Size = 1,
        kernel_count: int | None = None,
        version: str = "gauss",
        axis_order: str = "spatial",
        position_init: float | str = "uniform",
        sigma_init: float | None = None,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_unit("dilation", dilation, self.ndim, "DCLS", "enlarge kernel_size instead")
        check_choice("version", version, ("v1", "max", "gauss"))
        dense = ntuple("dense_kernel_size", dense_kernel_size, self.ndim - 1)
        if version == "gauss" and self.ndim == 2 and axis_order == "official":
            self.least_width = 1.0  # the authors' 2-D layer adds 1 to the width where all others add 0.27
        super().__init__(
            in_channels,
            out_channels,
            ntuple("kernel_size", kernel_size, 1),
            dense,
            stride,
            padding,
            groups,
            bias,
            kernel_count,
            version,
            axis_order,
            position_init,
            sigma_init,
            padding_mode,
            device,
            dtype,
        )
        self.kernel_size = (*dense, *self.size)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for table in ("IDX", "lim"):  # the authors' 2-D layer stores its grid, which follows from the sizes
            state_dict.pop(f"{prefix}DCK.{table}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Dcls2_1d(_LastAxis):
    """2-D convolution with learned positions along the width and ``dense_kernel_size`` rows.

    Args:
        kernel_size: S of the learned (last) axis, one integer.
        dense_kernel_size: the number of rows, default 1.
        version: "v1", "max" or "gauss".
        axis_order: "official" reproduces the authors' wider windows for "gauss", s = \\|σ\\| + 1 instead of + 0.27.
        position_init: "uniform" (default) over the axis, or the deviation of a normal distribution.

    Other arguments as :class:`~torchconv.ops.dcls.DCLSConv`.

    Example:
        >>> Dcls2_1d(4, 6, 9, dense_kernel_size=3, kernel_count=2).kernel().shape
        torch.Size([6, 4, 3, 9])
    """

    ndim = 2


class Dcls3_1d(_LastAxis):
    """3-D convolution with learned positions along the width and a dense depth × height of ``dense_kernel_size``.

    Arguments as :class:`Dcls2_1d`; ``dense_kernel_size`` is one integer or two.
    """

    ndim = 3


class Dcls2dK1d(DCLSBase):
    """2-D convolution with a 1-D kernel whose positions are learned: a column of S × 1 or a row of 1 × S.

    Args:
        kernel_size: S, one integer.
        flat_dim: 0 for S × 1 (along the height), 1 for 1 × S (along the width).
        version: "v1" (default, as the authors'), "v0", "max" or "gauss".

    Other arguments as :class:`~torchconv.ops.dcls.DCLSConv`; an integer ``padding`` pads both axes.

    Example:
        >>> Dcls2dK1d(4, 4, 9, flat_dim=1, groups=4, kernel_count=3).kernel().shape
        torch.Size([4, 1, 1, 9])
    """

    ndim = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        flat_dim: int = 0,
        kernel_count: int | None = None,
        version: str = "v1",
        axis_order: str = "spatial",
        position_init: float | str = 0.5,
        sigma_init: float | None = None,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_unit("dilation", dilation, self.ndim, "DCLS", "enlarge kernel_size instead")
        check(flat_dim in (0, 1), "flat_dim", flat_dim, "0 for a column (S, 1), 1 for a row (1, S)")
        super().__init__(
            in_channels,
            out_channels,
            ntuple("kernel_size", kernel_size, 1),
            (),
            stride,
            padding,
            groups,
            bias,
            kernel_count,
            version,
            axis_order,
            position_init,
            sigma_init,
            padding_mode,
            device,
            dtype,
        )
        self.flat_dim = flat_dim
        self.kernel_size = (*self.size, 1) if flat_dim == 0 else (1, *self.size)

    def kernel(self) -> Tensor:
        """The kernel (out, in/groups, S, 1) or (out, in/groups, 1, S)."""
        return self.learned_kernel().unsqueeze(-1 - self.flat_dim)
