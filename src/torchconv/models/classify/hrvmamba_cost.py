"""Operations of HRVMamba (H. Zhang et al. 2024, arXiv 2410.03174) as its tables count them.

Published numbers mix multiply-adds with floating-point operations: one for each multiply-add of convolutions and linear
maps, 9·L·C·n + L·C for a scan of C sequences of length L with n states (VMamba's count, arXiv 2401.10166), and 5 for
each tap and channel of a deformable sampling (InternImage's, arXiv 2211.05778). :func:`torchconv.analysis.count.count`
says what is really done, all of it, by kind.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from torchconv.models.classify.hrvmamba_block import DVSSBlock
from torchconv.ops.hrvmamba import MultiKernelDWConv2d
from torchconv.ops.hrvmamba_dcn import DCNv4Conv2d
from torchconv.ops.hrvmamba_scan import SelectiveScan2d


def scan_flops(length: int, channels: int, states: int = 1, batch: int = 1) -> int:
    """9·N·L·C·n + N·L·C, for sequences of ``channels`` in all directions together.

    Example:
        >>> scan_flops(4096, 4 * 16)
        2621440

    Reference: arXiv 2401.10166.
    """
    return batch * length * channels * (9 * states + 1)


def published_flops(net: nn.Module, size: tuple[int, int] = (256, 256)) -> int:
    """Operations of one image, as in the paper's tables.

    Args:
        net: :class:`torchconv.models.classify.hrvmamba.HRVMamba` or a network around it; it is left as it is, and
            nothing is computed.
        size: (H, W) of the image.

    Reference: arXiv 2410.03174, tables of results.
    """
    total = 0

    def add(module: nn.Module, inputs: Any, y: Any) -> None:
        nonlocal total
        total += _of(module, y)

    twin = copy.deepcopy(net).to("meta").eval()
    for module in twin.modules():
        module.register_forward_hook(add)
    # With gradients: the kernels are then operators whose results have shapes only.
    with torch.enable_grad():
        twin(torch.empty(1, getattr(net, "in_chans", 3), *size, device="meta", requires_grad=True))
    return total


def _of(module: nn.Module, y: Tensor) -> int:
    """What a module does itself, with the depthwise convolutions that it holds but does not call as modules."""
    if isinstance(module, nn.Conv2d):
        return y.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    if isinstance(module, MultiKernelDWConv2d):
        return sum(y[0, 0].numel() * int(p.numel()) for n, p in module.named_parameters() if n.endswith("weight"))
    if isinstance(module, DVSSBlock):
        return sum(y.numel() * conv.weight[0].numel() for conv in (module.cpe1, module.cpe2) if conv is not None)
    if isinstance(module, DCNv4Conv2d):
        taps = math.prod(module.kernel_size) - int(module.remove_center)
        head = 0 if module.offset_mask_dw is None else module.offset_mask_dw.weight[0].numel()
        return y.numel() * (5 * taps + head)
    if isinstance(module, SelectiveScan2d):
        length, channels = y.shape[2] * y.shape[3], 4 * module.inner
        maps = length * channels * (2 * module.rank + 2 * module.states)
        return maps + scan_flops(length, channels, module.states)
    return 0
