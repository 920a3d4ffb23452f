"""Long convolution: layers, kernels, transforms, three passes, partial and frequency-sparse convolutions, the net."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.kernels import long_conv
from torchconv.models.sequence.longconv import LongConvModel
from torchconv.ops._longconv_kernel import wrapped
from torchconv.ops.longconv import LongConvKernel, LongConvLayer, double_exponential
from torchconv.ops.longconv_fft import (
    BlockFFT,
    first_pass,
    frequency_sparse_conv,
    inner_convolutions,
    last_pass,
    partial_conv,
)
from torchconv.ops.longconv_layers import H3Conv, StandaloneLongConv

# How fast to train, and what does nothing in the authors' code.
_IDLE = {"learning_rate", "kernel_learning_rate", "dft_lr", "verbose", "layer_idx", "use_fast_fftconv", "kernel_lr"}


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the source's last word, or from the keys of the config."""
    config = {k: v for k, v in case.config.items() if k not in _IDLE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the authors' thresholds silence their start
        return _adapt(case, config)


def _adapt(case: Case, config: dict[str, Any]) -> Adapted:
    if "cls" in config:
        convolve = frequency_sparse_conv if "Sparse" in config["cls"] else _partial
        return Adapted(lambda i: {"y": convolve(i["x"], i["k"], config["N_partial"])})
    if "N1" in config:
        return Adapted(lambda i: _three_passes(i["u"], i["k"], config["N1"], config["N2"]))
    if "fft_ri" in case.outputs:
        return _block_fft(case, config)
    if "kernel_init" in case.outputs:
        return Adapted(lambda i: {"kernel_init": _start(i, config)})
    if "kernel" in case.outputs:
        kernel = LongConvKernel(**{"lam": 0.1, **_known(config, LongConvKernel)})
        return Adapted(lambda i: {"kernel": kernel()}, kernel)
    module = _module(config, case.source.rsplit(":", 1)[-1].strip())
    duplicates = lambda n: ".dft_matrices." in n or n.endswith("num_batches_tracked")  # noqa: E731
    return Adapted(lambda i: {"y": module(*_ordered(i))}, module, ignore=duplicates)


def _module(config: dict[str, Any], source: str) -> nn.Module:
    if source == "LongConvModel" or "d_input" in config:
        return LongConvModel(**{"kernel_lam": 0.1, **config})
    if source == "H3Conv" or "head_dim" in config:
        config.pop("dropout", None)  # taken and not used
        return H3Conv(**{"lam": 0.1, **_known(config, H3Conv, LongConvKernel)}, wrap=True)
    if "H" in config:
        return StandaloneLongConv(**{"kernel_lam": 0.1, **config})
    block = {k: v for k, v in (config.pop("block_fft_conv_args", None) or {}).items() if k not in _IDLE}
    known = _known(config, LongConvLayer, LongConvKernel)
    return LongConvLayer(**{"lam": 0.1, **known, "block_fft_conv_args": block}, wrap=True)


def _known(config: dict[str, Any], *classes: type) -> dict[str, Any]:
    """The authors' kernel takes any other argument, and does nothing with it."""
    names = {name for c in classes for name in inspect.signature(c).parameters}
    return {k: v for k, v in config.items() if k in names}


def _ordered(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The sequence first, then ``lengths`` where there are any; files sort by name."""
    return [inputs[n] for n in sorted(inputs, key=lambda n: n == "lengths")]


def _start(inputs: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    draw = inputs["randn_times_0p02"] if "randn_times_0p02" in inputs else next(iter(inputs.values()))
    if config.get("weight_init", "random") == "double_exp":
        return draw * double_exponential(draw.shape[-2], draw.shape[-1], dtype=draw.dtype)
    return draw


def _partial(x: Tensor, kernel: Tensor, taps: int) -> Tensor:
    """The authors' transform of 2·L samples wraps round what is longer than the sequence."""
    length = x.shape[-1]
    if min(taps, kernel.shape[-1]) <= length:
        return partial_conv(x, kernel, taps)
    kernel, origin = wrapped(kernel[..., :taps], length, 2 * length)
    return long_conv(x, kernel, False, origin)


def _three_passes(u: Tensor, k: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    first = first_pass(u, rows, columns)
    second = inner_convolutions(first, first_pass(k, rows, columns))
    y = last_pass(second).real[..., : u.shape[-1]]
    return {"y": y, "pass1_ri": torch.view_as_real(first), "pass2_ri": torch.view_as_real(second)}


def _block_fft(case: Case, config: dict[str, Any]) -> Adapted:
    size = config.pop("N")
    module = BlockFFT(**config)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.view_as_complex(inputs["x_ri"])
        found = {"fft_ri": module(x, size), "ifft_ri": module(x, size, forward=False)}
        return {name: torch.view_as_real(z.resolve_conj()) for name, z in found.items()}

    return Adapted(forward, module, ignore=lambda n: n.startswith("dft_matrices."))
