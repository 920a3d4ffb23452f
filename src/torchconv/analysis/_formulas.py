"""FLOP formulas for ATen operators, and which operators do no arithmetic at all; used by :mod:`.count`.

The convolution and matrix-product families come from ``torch.utils.flop_counter``; what that registry lacks (FFT,
element-wise work, reductions, normalisation, resampling, recurrent kernels) is here. ``count`` states the conventions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

KINDS = ("convolution", "matmul", "fft", "elementwise")
Work = Mapping[str, int]
#: A formula sees the operator's arguments by name (as in its schema) and the result under "out".
Formula = Callable[[Mapping[str, Any]], Work]

#: Copies, indexing, selection, comparison, construction and random draws: no arithmetic on floating-point values.
NO_ARITHMETIC = frozenset(
    """
    clone contiguous copy _to_copy to detach alias lift lift_fresh lift_fresh_copy resolve_conj resolve_neg _conj
    _neg_view _conj_physical conj_physical complex view_as_real_copy set resize as_strided as_strided_scatter empty
    empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros new_ones new_full zeros zeros_like
    ones ones_like full full_like fill zero scalar_tensor eye arange linspace logspace tril triu tril_indices
    triu_indices rand randn rand_like randn_like randint randint_like randperm normal uniform bernoulli exponential
    random multinomial split split_with_sizes unbind chunk view_as_complex view_as_real _unsafe_view _reshape_copy
    _reshape_alias reshape index index_select _unsafe_index index_copy index_fill gather scatter select_scatter
    slice_scatter diagonal_scatter masked_select masked_scatter take embedding nonzero nonzero_static where
    masked_fill cat stack split_with_sizes_copy unbind_copy constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d roll flip repeat repeat_interleave rot90
    im2col pixel_shuffle pixel_unshuffle channel_shuffle diag_embed block_diag unfold_copy view_copy expand_copy
    permute_copy t_copy sort topk kthvalue argsort argmax argmin searchsorted bucketize median nanmedian mode
    unique2 _unique2 unique_dim upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d max_unpool2d max_unpool3d is_same_size equal item
    _local_scalar_dense is_nonzero isnan isinf any all record_stream _assert_async _assert_scalar
    _assert_tensor_metadata
    """.split()  # noqa: SIM905
)

#: Pointwise operators that cost more than one FLOP per output element.
_POINTWISE_COST = {"addcmul": 2, "addcdiv": 2, "lerp": 3, "glu": 2, "polar": 2, "addr": 2}

#: Arithmetic pointwise operators that torch does not tag as pointwise, at least in some releases.
_UNTAGGED_POINTWISE = frozenset(
    "rrelu_with_noise prelu _prelu_kernel glu logit hypot hardswish hardsigmoid hardtanh log_sigmoid_forward".split()  # noqa: SIM905
)

#: Reductions: FLOPs per input element.
_REDUCTION_COST = {
    "sum": 1, "mean": 1, "prod": 1, "nansum": 1, "amax": 1, "amin": 1, "aminmax": 2, "max": 1, "min": 1, "cumsum": 1,
    "cumprod": 1, "cummax": 1, "cummin": 1, "_cummax_helper": 1, "_cummin_helper": 1, "trace": 1,
    "linalg_vector_norm": 2, "norm": 2, "var": 4, "std": 4, "var_mean": 4, "std_mean": 4, "logsumexp": 4,
    "logcumsumexp": 4, "_softmax": 5, "_log_softmax": 5, "_safe_softmax": 5,
}  # fmt: skip

#: Resampling: taps per output element, each a multiply and (but for one) an add.
_INTERPOLATION_TAPS = {
    "upsample_linear1d": 2, "upsample_bilinear2d": 4, "upsample_trilinear3d": 8, "upsample_bicubic2d": 16,
}  # fmt: skip


def is_floating(value: Any) -> bool:
    """Whether ``value`` is a tensor that arithmetic is counted on: floating-point or complex."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


def first_numel(out: Any) -> int:
    """Elements of the first tensor of a result."""
    found = tensors(out)
    return found[0].numel() if found else 0


def _elementwise(flops: float) -> Work:
    return {"elementwise": int(flops)}


def _complex_mac(value: Any) -> int:
    """One complex multiply-add is four real ones in the direct form."""
    return 4 if isinstance(value, Tensor) and value.is_complex() else 1


# -- convolution and matrix products -----------------------------------------------------------------------------------


def _torch_formula(packet: Any, kind: str) -> Callable[..., Work]:
    counted = flop_counter.flop_registry[packet]

    def formula(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Work:
        return {kind: int(counted(*args, **kwargs, out_val=out)) * _complex_mac(args[0])}

    return formula


def torch_registry() -> dict[Any, Callable[..., Work]]:
    """Formulas of ``torch.utils.flop_counter``, with the kind each belongs to."""
    table: dict[Any, Callable[..., Work]] = {}
    for packet in flop_counter.flop_registry:
        name = str(packet).rsplit(".", 1)[-1]
        ours = str(packet).startswith("aten.")
        # A formula somebody registered with torch for an operator of their own says FLOPs, not multiply-adds.
        ours = ours or not isinstance(packet, torch._ops.OpOverloadPacket)  # flex attention
        kind = ("convolution" if "conv" in name else "matmul") if ours else "elementwise"
        table[packet] = _torch_formula(packet, kind)
    return table


def _bias(a: Mapping[str, Any]) -> Work:
    return _elementwise(first_numel(a["out"]) if isinstance(a.get("bias"), Tensor) else 0)


def _added(a: Mapping[str, Any]) -> Work:
    return _elementwise(first_numel(a["out"]))


def _attention_extra(a: Mapping[str, Any]) -> Work:
    """Scale (1) and softmax (5) on the score matrix that a fused attention kernel never writes out."""
    query, key = a["query"], a["key"]
    scores = query.numel() // max(query.shape[-1], 1) * key.shape[-2]
    return _elementwise(6 * scores)


def _attention(a: Mapping[str, Any]) -> Work:
    """Both products, for the kernels that some releases of torch leave out of their registry."""
    query, key, value = a["query"], a["key"], a["value"]
    scores = query.numel() // max(query.shape[-1], 1) * key.shape[-2]
    return {"matmul": 2 * scores * (query.shape[-1] + value.shape[-1]), **_attention_extra(a)}


#: Element-wise work that comes with an operator whose products the torch registry counts.
EXTRAS: dict[str, Formula] = {
    "convolution": _bias,
    "_convolution": _bias,
    "convolution_overrideable": _bias,
    "_slow_conv2d_forward": _bias,
    "addmm": _added,
    "baddbmm": _added,
    "_scaled_dot_product_efficient_attention": _attention_extra,
    "_scaled_dot_product_flash_attention": _attention_extra,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_extra,
    "_scaled_dot_product_cudnn_attention": _attention_extra,
}


def _product(left: str, right: str, added: bool = False) -> Formula:
    """2·MACs of a product whose right operand meets every row of the left: MACs = |left| · |right| / contracted."""

    def formula(a: Mapping[str, Any]) -> Work:
        x, y = a[left], a[right]
        inner = max(x.shape[-1], 1)
        macs = x.numel() * (y.numel() // inner)
        return {"matmul": 2 * macs * _complex_mac(x), "elementwise": first_numel(a["out"]) if added else 0}

    return formula


def _addbmm(a: Mapping[str, Any]) -> Work:
    batch, rows, inner = a["batch1"].shape
    return {"matmul": 2 * batch * rows * inner * a["batch2"].shape[-1], "elementwise": first_numel(a["out"])}


def _fused_rnn(weights: Iterable[Tensor], steps: int, batch: int) -> Work:
    matrices = sum(w.numel() for w in weights if isinstance(w, Tensor) and w.dim() == 2)
    biases = sum(w.numel() for w in weights if isinstance(w, Tensor) and w.dim() == 1)
    return {"matmul": 2 * matrices * steps * batch, "elementwise": biases * steps * batch}


def _mkldnn_rnn(a: Mapping[str, Any]) -> Work:
    steps, batch = a["input"].shape[:2]
    return _fused_rnn([a["weight0"], a["weight1"], a["weight2"], a["weight3"]], steps, batch)


def _cudnn_rnn(a: Mapping[str, Any]) -> Work:
    first, second = a["input"].shape[:2]
    return _fused_rnn(a["weight"], first, second)


def _deform_conv2d(a: Mapping[str, Any]) -> Work:
    """The convolution over the sampled values, and 7 FLOPs per bilinear sample (8 when it is modulated)."""
    out, weight = a["out"], a["weight"]
    batch, channels = a["input"].shape[:2]
    samples = batch * channels * math.prod(weight.shape[2:]) * math.prod(out.shape[2:])
    sampling = (8 if a.get("use_mask") else 7) * samples
    return {"convolution": 2 * out.numel() * math.prod(weight.shape[1:]), "elementwise": sampling + out.numel()}


# -- FFT ---------------------------------------------------------------------------------------------------------------


def _fft(real_in: bool, real_out: bool) -> Formula:
    """5 N log2 N per complex transform of N points, half of it when the input or the output is real."""

    def formula(a: Mapping[str, Any]) -> Work:
        full = a["out"] if real_out else a["self"]  # the side whose length along ``dim`` is the signal's
        points = math.prod(full.shape[d] for d in a["dim"])
        if points < 2:
            return {"fft": 0}
        factor = 2.5 if real_in or real_out else 5.0
        return {"fft": round(factor * full.numel() * math.log2(points))}

    return formula


# -- element-wise ------------------------------------------------------------------------------------------------------


def pointwise(name: str, a: Mapping[str, Any]) -> Work:
    """One FLOP per output element; more for the fused few, for a scaled addition and for complex values."""
    out = a["out"]
    n = first_numel(out)
    cost = _POINTWISE_COST.get(name, 1)
    scale = a.get("alpha", a.get("value"))
    if name in ("add", "sub", "rsub", "addcmul", "addcdiv") and isinstance(scale, int | float) and scale != 1:
        cost += 1
    operands = [v for k, v in a.items() if k != "out" and isinstance(v, Tensor)]
    if any(v.is_complex() for v in [*operands, *tensors(out)]):
        both = len(operands) >= 2 and all(v.is_complex() for v in operands[:2])
        cost *= {"mul": 6 if both else 2, "div": 11 if both else 2}.get(name, 2)
    return _elementwise(cost * n)


def _reduction(name: str) -> Formula:
    cost = _REDUCTION_COST[name]

    def formula(a: Mapping[str, Any]) -> Work:
        operands = [v for k, v in a.items() if k != "out" and isinstance(v, Tensor)]
        # max and min of two tensors are pointwise
        n = first_numel(a["out"]) if len(operands) > 1 else operands[0].numel()
        return _elementwise(cost * n * (2 if operands[0].is_complex() else 1))

    return formula


def _normalise(statistics: int, *, running: bool = False) -> Formula:
    """``statistics`` FLOPs per element when they are taken from the data, and 1 each for an affine weight and bias."""

    def formula(a: Mapping[str, Any]) -> Work:
        x = a.get("input", a.get("self"))
        n = x.numel() if x is not None else first_numel(a["out"])
        taken = not running or bool(a.get("training", a.get("train", False)))
        if not taken:
            return _elementwise(2 * n)  # frozen statistics and affine fold into one scale and one shift per channel
        affine = isinstance(a.get("weight"), Tensor) + isinstance(a.get("bias"), Tensor)
        return _elementwise((statistics + affine) * n)

    return formula


def _pool(a: Mapping[str, Any]) -> Work:
    kernel = a["kernel_size"]
    out = tensors(a["out"])[0]
    axes = out.dim() - 2 if len(kernel) > 1 else 1
    taps = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** axes
    return _elementwise(out.numel() * taps)


def _per_input(a: Mapping[str, Any]) -> Work:
    return _elementwise(a["self"].numel())


def _interpolate(taps: int) -> Formula:
    return lambda a: _elementwise(first_numel(a["out"]) * (2 * taps - 1))


def _grid_sample(axes: int) -> Formula:
    def formula(a: Mapping[str, Any]) -> Work:
        taps = {0: 2**axes, 1: 0, 2: 4**axes}[int(a["interpolation_mode"])]
        return _elementwise(first_numel(a["out"]) * max(2 * taps - 1, 0))

    return formula


def _accumulate(source: str) -> Formula:
    return lambda a: _elementwise(a[source].numel() if isinstance(a.get(source), Tensor) else 0)


def _index_put(a: Mapping[str, Any]) -> Work:
    return _elementwise(a["values"].numel() if a.get("accumulate") else 0)


def _cdist(a: Mapping[str, Any]) -> Work:
    return _elementwise(3 * first_numel(a["out"]) * a["x1"].shape[-1])


#: Base operator name (no trailing underscore) → formula, beyond the torch registry.
ATEN: dict[str, Formula] = {
    **{name: _reduction(name) for name in _REDUCTION_COST},
    **{name: _interpolate(taps) for name, taps in _INTERPOLATION_TAPS.items()},
    "mv": _product("self", "vec"),
    "addmv": _product("mat", "vec", added=True),
    "dot": _product("self", "tensor"),
    "vdot": _product("self", "other"),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_int_mm": lambda a: {"matmul": 2 * a["self"].numel() * a["mat2"].shape[1]},
    "addbmm": _addbmm,
    "mkldnn_rnn_layer": _mkldnn_rnn,
    "_cudnn_rnn": _cudnn_rnn,
    "_fft_r2c": _fft(True, False),
    "_fft_c2r": _fft(False, True),
    "_fft_c2c": _fft(False, False),
    "native_batch_norm": _normalise(5, running=True),
    "cudnn_batch_norm": _normalise(5, running=True),
    "miopen_batch_norm": _normalise(5, running=True),
    "_native_batch_norm_legit": _normalise(5, running=True),
    "_native_batch_norm_legit_no_training": _normalise(5, running=True),
    "_batch_norm_no_update": _normalise(5, running=True),
    "_batch_norm_with_update": _normalise(5),
    "native_layer_norm": _normalise(5),
    "native_group_norm": _normalise(5),
    "_fused_rms_norm": _normalise(3),
    "avg_pool1d": _pool,
    "avg_pool2d": _pool,
    "avg_pool3d": _pool,
    "max_pool2d_with_indices": _pool,
    "max_pool3d_with_indices": _pool,
    "_adaptive_avg_pool2d": _per_input,
    "_adaptive_avg_pool3d": _per_input,
    "adaptive_avg_pool1d": _per_input,
    "adaptive_max_pool2d": _per_input,
    "adaptive_max_pool3d": _per_input,
    "grid_sampler_2d": _grid_sample(2),
    "grid_sampler_3d": _grid_sample(3),
    "index_add": _accumulate("source"),
    "scatter_add": _accumulate("src"),
    "scatter_reduce": _accumulate("src"),
    "index_put": _index_put,
    "_unsafe_index_put": _index_put,
    "_index_put_impl": _index_put,
    "native_dropout": _added,
    "col2im": _per_input,
    "_cdist_forward": _cdist,
}

#: Operators of other libraries, by qualified name.
OTHER: dict[str, Formula] = {"torchvision::deform_conv2d": _deform_conv2d}


def is_pointwise(func: Any, name: str) -> bool:
    """Whether an ATen operator computes its output element by element; some in-place forms lack the tag."""
    if torch.Tag.pointwise in func.tags or name in _UNTAGGED_POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
