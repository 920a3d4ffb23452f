"""The blocks, the stack of blocks, the statistics of convolutions and the waterline's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.analysis.waterline import Kernel, Machine, Waterline, block_kernels, conv2d_stats, fuse
from torchconv.ops.convfirst import MLP
from torchconv.ops.convfirst_stack import BLOCKS, StackedBlocks

STATS = "macs_bytesread_byteswritten_opbyte_accdepth"
LAYER = ("macs", "bytes", "op_per_byte", "t_arith", "t_mem", "t", "memory_bound")
BLOCK = ("macs", "weights", "bytes_unfused", "bytes_fused", "t_unfused", "t_fused")
BLOCK += ("efficiency_unfused", "efficiency_fused", "t_unfused_if_kernels_overlap")
NETWORK = ("t_ideal", "t_unfused", "t_fused", "efficiency_unfused", "efficiency_fused", "waterline_op_per_byte")
MODULES: dict[str, Callable[..., nn.Module]] = {**BLOCKS, "MLP": MLP, "StackedBlocks": StackedBlocks}


def adapt(case: Case) -> Adapted:
    """``rows`` are statistics, ``blocks`` a waterline; else ``cls`` names the module, the rest are its arguments."""
    if "x" in case.inputs:
        return _module(case)
    tables = _statistics if "rows" in case.config else _waterline if "blocks" in case.config else None
    if tables is None:
        raise ParityError("config has neither rows nor blocks, and there is no input.x")
    found = tables(case.config)
    _check_columns(case, found)
    return Adapted(lambda inputs: {}, extra=lambda inputs: found)


def _module(case: Case) -> Adapted:
    options = dict(case.config)
    name = options.pop("cls", "ConvFirst")
    if name not in MODULES:
        raise ParityError(f"cls {name!r}: known are {', '.join(MODULES)}")
    # The author's MLP has no convolution to give these to; neither groups the dense one.
    without = {"MLP": ("kernel_size", "stride", "group_width"), "FusedMBConv": ("group_width",)}.get(name, ())
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items() if n not in without}
    if isinstance(options.get("act_cls"), str):
        options["act_cls"] = getattr(nn, options["act_cls"].rpartition(".")[2])
    if name in ("ConvFirst", "MBConv", "StackedBlocks"):
        options["group_width"] = width_used(name, options)
    module = MODULES[name](**options)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y, **{f"after.{n}": b for n, b in module.named_buffers() if f"after.{n}" in case.outputs}}

    return Adapted(forward, module)


def width_used(name: str, options: Mapping[str, Any]) -> int:
    """The width that the author's ``channels // group_width`` groups really have; ours refuses a remainder."""
    channels, width = options.get("in_channels", options.get("num_channels", 64)), options.get("group_width", 8)
    if "MBConv" in (name, options.get("block_cls", "MBConv" if name == "StackedBlocks" else None)):
        channels = int(channels * options.get("expansion_ratio", 4))
    groups = channels // width
    return channels // groups if groups and channels % groups == 0 else width


def _statistics(config: Mapping[str, Any]) -> dict[str, Tensor]:
    rows = []
    for row in config["rows"]:
        kernel = row.get("r", 3), row.get("s", 3)
        found = conv2d_stats(
            *(row[name] for name in "nchw"),
            kernel_size=kernel,
            padding=row.get("padding", 1),
            group_width=row.get("group_width", 8),
            bias=row.get("has_bias", False),
            what=row.get("pass_", "output"),
            unit=row.get("unit", 2),
        )
        rows.append([found.macs, found.read, found.written, found.intensity, found.depth])
    return {STATS: torch.tensor(rows, dtype=torch.float64)}


def _waterline(config: Mapping[str, Any]) -> dict[str, Tensor]:
    unit = config.get("unit_bytes", 2)
    machine = Machine(config["peak_ops_per_s"], config["bandwidth_bytes_per_s"])
    layers, blocks, kernels, fused = [], [], [], []
    for options in config["blocks"]:
        found = block_kernels(unit=unit, **options)
        one = fuse(found, 2.0 * unit * options["n"] * options["h"] * options["w"] * options["c"])
        layers += [_layer(k, machine) for k in found]
        blocks.append(_block(found, one, machine, unit))
        kernels += found
        fused.append(one)
    apart, together = Waterline(tuple(kernels), machine), Waterline(tuple(fused), machine)
    network = {
        "t_ideal": apart.ideal,
        "t_unfused": apart.serial,
        "t_fused": together.serial,
        "efficiency_unfused": apart.attainable,
        "efficiency_fused": together.attainable,
        "waterline_op_per_byte": machine.waterline,
    }
    return {
        "layers": _table(layers, config.get("layer_columns", LAYER)),
        "blocks": _table(blocks, config.get("block_columns", BLOCK)),
        "network": _table([network], config.get("network_columns", NETWORK))[0],
    }


def _layer(kernel: Kernel, machine: Machine) -> dict[str, float]:
    return {
        "macs": kernel.macs,
        "bytes": kernel.bytes,
        "op_per_byte": kernel.intensity,
        "t_arith": kernel.ops / machine.ops,
        "t_mem": kernel.bytes / machine.bandwidth,
        "t": kernel.time(machine),
        "memory_bound": float(kernel.bytes / machine.bandwidth > kernel.ops / machine.ops),
    }


def _block(kernels: list[Kernel], one: Kernel, machine: Machine, unit: int) -> dict[str, float]:
    apart, together = Waterline(tuple(kernels), machine), Waterline((one,), machine)
    return {
        "macs": one.macs,
        "weights": one.weights / unit,
        "bytes_unfused": sum(k.bytes for k in kernels),
        "bytes_fused": one.bytes,
        "t_unfused": apart.serial,
        "t_fused": together.serial,
        "efficiency_unfused": apart.attainable,
        "efficiency_fused": together.attainable,
        "t_unfused_if_kernels_overlap": apart.overlapped,
    }


def _table(rows: list[dict[str, float]], columns: list[str] | tuple[str, ...]) -> Tensor:
    for column in columns:
        if rows and column not in rows[0]:
            raise ParityError(f"column {column!r}: known are {', '.join(rows[0])}")
    return torch.tensor([[row[c] for c in columns] for row in rows], dtype=torch.float64)


def _check_columns(case: Case, found: Mapping[str, Tensor]) -> None:
    """Column by column: they differ by many orders of magnitude, so that the largest of a table says nothing."""
    for name, ours in found.items():
        expected = case.outputs.get(name)
        if expected is None or expected.shape != ours.shape:
            continue  # the comparison of the whole tables says so
        scale = expected.double().abs() if expected.dim() == 1 else expected.double().abs().amax(0)
        wrong = ((ours - expected.double()).abs() > 1e-4 * scale).reshape(-1, ours.shape[-1]).any(0)
        if wrong.any():
            raise ParityError(f"output.{name}: columns {wrong.nonzero().flatten().tolist()} differ")
