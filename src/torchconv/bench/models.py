"""``torchconv bench models``: every named network against timm's of the same name or its nearest published peer."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchconv import catalog
from torchconv._common import check, check_choice, check_positive, did_you_mean, write_json
from torchconv.analysis.count import count
from torchconv.analysis.latency import machine, model_peak_memory, paired_latency, training_step
from torchconv.bench.mixers import DTYPES
from torchconv.kernels._layout import channels_last_format
from torchconv.models import create_model, list_models
from torchconv.surgery.merging import merge

ECA = {"block_args": {"attn_layer": "eca"}}
# The nearest network that timm or torchvision has, of about the same size, with its options; a network that timm has
# under the same name is measured against that one.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attnet_xxs": ("timm:starnet_s1", {}),
    "attnet_xs": ("timm:starnet_s3", {}),
    "attnet_s": ("timm:starnet_s4", {}),
    "attnet_t1": ("timm:convnext_nano", {}),
    "attnet_t2": ("timm:convnext_tiny", {}),
    "attnet_t3": ("timm:convnext_small", {}),
    "attnet_t4": ("timm:convnext_base", {}),
    "convfirstnet_tiny": ("timm:edgenext_xx_small", {}),
    "convfirstnet_small": ("timm:mobilenetv4_conv_small", {}),
    "convfirstnet_base": ("timm:mobilenetv4_conv_medium", {}),
    "convnext_dcls_tiny": ("timm:convnext_tiny", {}),
    "convnext_dcls_gauss_tiny": ("timm:convnext_tiny", {}),
    "convnext_dcls_small": ("timm:convnext_small", {}),
    "convnext_dcls_base": ("timm:convnext_base", {}),
    "deeplab_resnet101": ("torchvision:deeplabv3_resnet101", {"weights_backbone": None}),
    "dfyp_modis": ("timm:resnet34", {}),
    "eca_mobilenet_v2": ("timm:mobilenetv2_100", {}),
    "eca_resnet18": ("timm:resnet18", ECA),
    "eca_resnet34": ("timm:resnet34", ECA),
    "eca_resnet50": ("timm:resnet50", ECA),
    "eca_resnet101": ("timm:resnet101", ECA),
    "eca_resnet152": ("timm:resnet152", ECA),
    "hrvmamba_n": ("timm:hrnet_w18_small", {}),
    "hrvmamba_t": ("timm:hrnet_w18_small_v2", {}),
    "hrvmamba_s": ("timm:hrnet_w18", {}),
    "hrvmamba_b": ("timm:hrnet_w40", {}),
    "lsnet_t": ("timm:efficientvit_m4", {}),
    "lsnet_s": ("timm:efficientvit_m5", {}),
    "lsnet_b": ("timm:repvit_m1_1", {}),
    "p3d63": ("torchvision:r2plus1d_18", {}),
    "segnet": ("torchvision:fcn_resnet50", {"weights_backbone": None}),
    "segnet_basic": ("torchvision:lraspp_mobilenet_v3_large", {"weights_backbone": None}),
    "spartan_s": ("timm:fastvit_t8", {}),
    "unireplknet_a": ("timm:convnext_atto", {}),
    "unireplknet_f": ("timm:convnext_femto", {}),
    "unireplknet_p": ("timm:convnext_pico", {}),
    "unireplknet_n": ("timm:convnext_nano", {}),
    "unireplknet_t": ("timm:convnext_tiny", {}),
    "unireplknet_s": ("timm:convnext_small", {}),
    "unireplknet_b": ("timm:convnext_base", {}),
    "unireplknet_l": ("timm:convnext_large", {}),
    "unireplknet_xl": ("timm:convnext_xlarge", {}),
    "van_b0": ("timm:pvt_v2_b0", {}),
    "van_b1": ("timm:pvt_v2_b1", {}),
    "van_b2": ("timm:pvt_v2_b2", {}),
    "van_b3": ("timm:pvt_v2_b3", {}),
    "vmunet": ("torchvision:fcn_resnet50", {"weights_backbone": None}),
}
# Networks made for images of one size.
SIDES = {"convnext_dcls_mini": 32, "dfyp_modis": 32, "residual_parallel": 28, "residual_sequential": 28}
SIDES |= {"terminator": 32, "terminator_mini": 8}
SIZED = ("lsnet_",)  # take the side as an option
FRAMES = 16


def bench_models(
    patterns: tuple[str, ...] = (),
    *,
    size: int = 224,
    batch: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    channels_last: bool = False,
    training: bool = False,
    min_seconds: float = 0.5,
    repeats: int = 10,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Time named networks and their peers: latency of one image, throughput of a batch, peak memory.

    A network and its peer take turns call by call, both in their inference form: ours through :func:`merge` where that
    does not cost more multiply-adds, timm's through its own re-parameterisation. Videos have 16 frames of half the
    size. Memory is what a batch needs beyond the weights and the input.

    Args:
        patterns: shell patterns of :func:`torchconv.models.list_models`; all networks by default.
        size: side of the images; networks made for one size get that one.
        batch: images of a batch.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ….
        channels_last: memory format.
        training: also time forward and backward passes of a batch, of the training forms.
        min_seconds, repeats: at least so much time, and so many calls, for each network and kind of call.
        out: where the result is written after every network.
        resume: keep the networks that ``out`` holds already.
        progress: called with a name, how many are done, and of how many.

    Returns:
        {"schema", "machine", "input", "rows": [{"model", "paper", "task", "shape", "ours": {"model", "params", "macs",
        "latency_ms", "latency_p95_ms", "throughput", "memory_bytes", …}, "peer": the same or None, "speedup":
        {"latency": [median, low, high], …}}], "skipped": [{"model", "why"}]}; a speed-up is the peer's time over ours.

    Raises:
        ValueError: no such network, a number out of range, or ``out`` holds a run with other options.
    """
    check_choice("dtype", dtype, DTYPES)
    check_positive("size", size)
    check_positive("batch", batch)
    names = _named(patterns)
    settings = {
        "size": size,
        "batch": batch,
        "dtype": dtype,
        "device": device,
        "channels_last": channels_last,
        "training": training,
    }
    result = _earlier(out, settings) if resume else None
    result = result or {"schema": 1, "machine": machine(), "input": settings, "rows": [], "skipped": []}
    done = {row["model"] for row in (*result["rows"], *result["skipped"])}
    names = [n for n in names if n not in done]
    run = _Run(size, batch, DTYPES[dtype], device, channels_last, training, min_seconds, repeats)
    for index, name in enumerate(names):
        if progress is not None:
            progress(name, index, len(names))
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                result["rows"].append(run.measure(name))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # inputs or a type it does not take
            result["skipped"].append({"model": name, "why": str(error).split("\n")[0]})
        if out is not None:
            write_json(Path(out), result)
    if progress is not None:
        progress("", len(names), len(names))
    return result


def _named(patterns: tuple[str, ...]) -> list[str]:
    known = list_models()
    for pattern in patterns:
        check(bool(fnmatch.filter(known, pattern)), "filter", pattern, did_you_mean(pattern, known))
    return [n for n in known if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def _earlier(out: str | Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The run that ``out`` holds, if it was made like this one."""
    if out is None:
        raise ValueError("out=None: resuming needs the file of the run")
    if not Path(out).is_file():
        return None
    found: dict[str, Any] = json.loads(Path(out).read_text(encoding="utf-8"))
    here = machine()
    for name, value in settings.items():
        was = found.get("input", {}).get(name)
        check(was == value, "out", str(out), f"was made with {name}={was!r}, not {value!r}; name another file")
    for name in ("cpu", "gpu", "threads", "torch"):
        was = found["machine"].get(name)
        check(was == here.get(name), "out", str(out), f"was made with {name} {was}; name another file")
    return found


class _Run:
    """The options of a run, and how one network is measured."""

    def __init__(
        self,
        size: int,
        batch: int,
        dtype: torch.dtype,
        device: str,
        channels_last: bool,
        training: bool,
        min_seconds: float,
        repeats: int,
    ) -> None:
        self.size, self.batch, self.channels_last, self.training = size, batch, channels_last, training
        self.where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.times: dict[str, Any] = {"min_seconds": min_seconds, "repeats": repeats, "device": device}

    def measure(self, name: str) -> dict[str, Any]:
        """A row of the result."""
        variant = catalog.variant(name)
        side = SIDES.get(name, self.size)
        ours = create_model(name, **({"img_size": side} if name.startswith(SIZED) else {}))
        shape = _shape(ours, side)
        label, peer = _peer(name, shape[0])
        trained = {"torchconv": ours} | ({} if peer is None else {label: peer})
        one, many = (torch.randn(n, *shape).to(**self.where) for n in (1, self.batch))
        for model in trained.values():
            model.to(**self.where).eval()
        if self.channels_last:
            one, many = _channels_last(one), _channels_last(many)
            for parameter in (p for model in trained.values() for p in model.parameters()):
                parameter.data = _channels_last(parameter.data)
        ready = {"torchconv": merge(trained["torchconv"], one)}
        if label in trained:
            ready[label] = _reparameterised(label, trained[label]).to(**self.where)  # some new biases are float32
        facts: dict[str, dict[str, Any]] = {}
        for form, model in ready.items():
            counted = count(model, one)
            facts[form] = {"model": name if form == "torchconv" else label, "params": counted.params}
            facts[form] |= {"macs": counted.macs, "memory_bytes": model_peak_memory(model, many)}
        ratios: dict[str, list[float]] = {}
        self._time("latency", ready, one, facts, ratios)
        self._time("batch", ready, many, facts, ratios)
        for fact in facts.values():
            fact["throughput"] = 1e3 * self.batch / fact["batch_ms"]
        if self.training:
            for form, model in trained.items():
                facts[form]["training_memory_bytes"] = model_peak_memory(model, many, backward=True)
            steps = {form: training_step(model.train(), many) for form, model in trained.items()}
            self._time("training", steps, None, facts, ratios)
        return {
            "model": name,
            "paper": variant.paper,
            "task": variant.task,
            "shape": list(shape),
            "ours": facts["torchconv"],
            "peer": facts.get(label),
            "speedup": ratios,
        }

    def _time(self, kind: str, calls: Any, x: Any, facts: dict[str, Any], ratios: dict[str, list[float]]) -> None:
        timed = paired_latency(calls, x, **self.times)
        for form, single in timed.latencies.items():
            facts[form] |= {f"{kind}_ms": single.median_ms, f"{kind}_p95_ms": single.p95_ms}
        for ratio in timed.ratios.values():
            ratios[kind] = [ratio.median, ratio.low, ratio.high]


def _channels_last(x: Tensor) -> Tensor:
    """Maps, clips and their kernels with the channels last; others as they are (networks may hold both kinds)."""
    return x.contiguous(memory_format=channels_last_format(x.dim() - 2)) if x.dim() in (4, 5) else x


def _shape(model: nn.Module, side: int) -> tuple[int, ...]:
    """Of one input: images, or frames of half the side where the first kernel reaches over time."""
    kernel = next((p for p in model.parameters() if p.dim() in (4, 5)), None)
    check(kernel is not None, "model", type(model).__name__, "takes no images")
    assert kernel is not None
    channels = int(getattr(model, "in_chans", kernel.shape[1]))
    return (channels, FRAMES, side // 2, side // 2) if kernel.dim() == 5 else (channels, side, side)


def _peer(name: str, channels: int) -> tuple[str, nn.Module | None]:
    """The network to compare with, by "package:name"; none where there is none or its package is missing."""
    label, options = PEERS.get(name, (f"timm:{name}", {}))
    package, _, theirs = label.partition(":")
    if importlib.util.find_spec(package) is None:
        return label, None
    if package == "torchvision":
        return label, importlib.import_module("torchvision.models").get_model(theirs, weights=None, **options)
    timm: Any = importlib.import_module("timm")
    entry = timm.models.model_entrypoint(theirs) if timm.is_model(theirs) else None
    if entry is None or entry.__module__.startswith("torchconv."):
        return label, None
    same = f"{label} with ECA" if options is ECA else label
    return same, timm.create_model(theirs, in_chans=channels, **options)


def _reparameterised(label: str, model: nn.Module) -> nn.Module:
    """timm's network with its parallel branches joined, where it has any."""
    if not label.startswith("timm:"):
        return model
    ready: nn.Module = importlib.import_module("timm.utils").reparameterize_model(model)
    return ready.eval()
