"""The pull on scales, thresholds and masks, pruned residual networks, and counts of the authors' ResNet-50 masks."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.analysis.count import count
from torchconv.compress.masksparsity import keep_mask, optimal_threshold, sparse_gradient, vote
from torchconv.surgery import ChannelGroup, channel_groups, prune

_LIMITS = re.compile(r"(?P<method>[A-Za-z]+)_(?P<value>[-+.\deE]+)\.(?P<what>threshold|keep)(?P<at>\w+)")


def adapt(case: Case) -> Adapted:
    """What a case is about is told by its tensors."""
    if any(_LIMITS.fullmatch(name) for name in case.outputs):
        return Adapted(lambda inputs: {}, extra=lambda inputs: _limits(case, inputs))
    if "stem.weight" in case.state:
        return _residual(case)
    if any(name.startswith("keep.") for name in case.inputs):
        return Adapted(lambda inputs: {}, extra=lambda inputs: _counts(case, inputs))
    return _pulled(case)


def _limit(gamma: Tensor, method: str, value: float) -> float:
    return optimal_threshold(gamma, value) if method == "OT" else value


def _limits(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for name, expected in case.outputs.items():
        found = _LIMITS.fullmatch(name)
        if found is None:
            continue
        gamma = inputs[f"gamma{found['at']}"]
        limit = _limit(gamma, found["method"], float(found["value"]))
        is_keep = found["what"] == "keep"
        outputs[name] = keep_mask(gamma, limit, 0) if is_keep else torch.tensor(limit, dtype=expected.dtype)
    return outputs


class _Pulled(nn.Module):
    """Convolution, batch norm, ReLU; and the norm's scale once more for every way of pulling it."""

    def __init__(self, case: Case, kinds: list[str]) -> None:
        super().__init__()
        weight = case.state["c.weight"]
        out, into, *size = weight.shape
        self.c = nn.Conv2d(into, out, size, padding=size[-1] // 2, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=case.config.get("eps", 1e-5))
        self.pulled = nn.ParameterDict({kind: nn.Parameter(case.state["bn.weight"].clone()) for kind in kinds})
        config, keep = case.config, case.inputs.get("keep_mask")
        for kind, gamma in self.pulled.items():
            everywhere = kind.startswith("global_")
            options = (config.get("sparsity", 5e-4), kind.removeprefix("global_"), config.get("lr", 0.1))
            if kind != "task_only":
                gamma.register_hook(_pull(gamma, None if everywhere else keep, *options))

    def forward(self, x: Tensor) -> Tensor:
        made = self.c(x)
        bn, frozen = self.bn, (made.detach(), self.bn.bias.detach())
        y = F.relu(bn(made))
        for gamma in self.pulled.values():
            stats = (None, None) if self.training else (bn.running_mean, bn.running_var)
            again = F.relu(F.batch_norm(frozen[0], *stats, gamma, frozen[1], self.training, eps=bn.eps))
            y = y + again - again.detach()
        return y


def _pull(gamma: Tensor, keep: Tensor | None, lam: float, kind: str, lr: float) -> Any:
    return lambda grad: grad + sparse_gradient(gamma.detach(), keep, lam, kind, lr)


def _pulled(case: Case) -> Adapted:
    kinds = [n.removesuffix(".bn.weight") for n in case.grads if n.endswith(".bn.weight")]
    network = _Pulled(case, kinds)
    names = {f"{kind}.bn.weight": f"pulled.{kind}" for kind in kinds}
    fresh = lambda n: n.startswith("pulled.") or n.endswith("num_batches_tracked")  # noqa: E731
    return Adapted(lambda inputs: {"y": network(inputs["x"])}, network, names=lambda n: names.get(n, n), fresh=fresh)


class _Bottlenecks(nn.Module):
    """A stem and bottlenecks of one width, the first with a projection where the state has one; a linear head."""

    def __init__(self, state: Mapping[str, Tensor], eps: float) -> None:
        super().__init__()
        for name, weight in state.items():
            if not name.endswith(".weight") or weight.dim() == 1:
                continue
            *parents, leaf = name.removesuffix(".weight").split(".")
            parent: nn.Module = self
            for part in parents:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            bias = name.removesuffix("weight") + "bias" in state
            if weight.dim() == 2:
                parent.add_module(leaf, nn.Linear(weight.shape[1], weight.shape[0], bias))
                continue
            padding = weight.shape[-1] // 2
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=padding, bias=bias)
            parent.add_module(leaf, conv)
            parent.add_module("bn" if leaf == "proj" else f"{leaf}_bn", nn.BatchNorm2d(len(weight), eps=eps))
        self.blocks = sorted((n for n in self._modules if n[0] == "b"), key=lambda n: int(n[1:]))

    def forward(self, x: Any) -> Any:
        one: Any = self
        x = F.relu(one.stem_bn(one.stem(x)))
        for name in self.blocks:
            block: Any = self.get_submodule(name)
            y = F.relu(block.a_bn(block.a(x)))
            y = F.relu(block.b_bn(block.b(y)))
            x = F.relu(block.c_bn(block.c(y)) + (block.bn(block.proj(x)) if hasattr(block, "proj") else x))
        return one.fc(x.mean((2, 3)))


def _residual(case: Case) -> Adapted:
    network = _Bottlenecks(case.state, case.config.get("eps", 1e-5))
    return Adapted(
        lambda inputs: {"dense_y": network(inputs["x"])},
        network,
        extra=lambda inputs: _pruned(case, network, inputs),
        ignore=lambda n: False,
    )


def _table(case: Case, network: nn.Module, x: Tensor) -> list[ChannelGroup]:
    """The groups of the file's tables; what it has no table of is found."""
    config, found = case.config, channel_groups(copy.deepcopy(network), x)
    if "prec" in config and "succ" in config:
        prec, succ = config["prec"], config["succ"]
        groups = [ChannelGroup((norm,), tuple(prec[norm]), tuple(succ[norm])) for norm in prec if norm in succ]
    else:
        groups = [group for group in found if len(group.norms) == 1]
    if "groups" not in config:
        return groups + [group for group in found if len(group.norms) > 1]
    together = config["groups"]
    for norms, before, behind in zip(*(together[k] for k in ("norm", "prec", "succ")), strict=True):
        groups.append(ChannelGroup(tuple(norms), tuple(before), tuple(behind)))
    return groups


def _pruned(case: Case, network: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    config, x = case.config, inputs["x"]
    groups = _table(case, network, x)
    method, value, least = config.get("method", "OT"), config.get("threshold", 1e-4), config.get("min_channels", 1)
    masks, outputs = {}, {}
    for group in groups:
        scales = [network.get_parameter(f"{norm}.weight") for norm in group.norms]
        own = [keep_mask(g, _limit(g, method, value), least) for g in scales]
        masks |= dict.fromkeys(group.norms, vote(own))
        outputs |= {f"own_keep.{norm}": keep for norm, keep in zip(group.norms, own, strict=True)}
    small = prune(network, masks, groups=groups)
    with torch.no_grad():
        outputs["pruned_y"] = small(x)
    outputs |= {f"keep.{norm}": keep for norm, keep in masks.items()}
    return outputs | {f"pruned_state.{name}": tensor for name, tensor in small.state_dict().items()}


def _timm_name(name: str) -> str:
    """A layer of the authors' ResNet by its name in timm's."""
    if name.startswith("stem."):
        return name.removeprefix("stem.").replace("conv", "conv1").replace("bn", "bn1")
    stage, block, *rest = re.fullmatch(r"s(\d+)\.b(\d+)\.(?:f\.)?(\w+)", name).groups()  # type: ignore[union-attr]
    layers = {f"{x}{end}": f"{kind}{i}" for i, x in enumerate("abc", 1) for end, kind in (("", "conv"), ("_bn", "bn"))}
    layers |= {"proj": "downsample.0", "bn": "downsample.1"}
    return f"layer{stage}.{int(block) - 1}.{layers[rest[0]]}"


def _counts(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    import timm

    words = str(case.config.get("arch", ""))
    depth = re.search(r"ResNet-?(\d+)", words)
    side = re.search(r"(\d+)\s*[x×]\s*\d+", words)
    network = timm.create_model(f"resnet{depth[1] if depth else 50}", num_classes=case.config.get("num_classes", 1000))
    image = torch.empty(1, 3, *2 * [int(side[1]) if side else 224], device="meta")
    masks = {_timm_name(n.removeprefix("keep.")): keep for n, keep in inputs.items()}
    small = prune(network, masks, torch.zeros(1, 3, 32, 32))
    outputs = {}
    for name, model in (("dense_macs_params", network), ("macs_params", small)):
        counted = count(model.to("meta"), image)
        outputs[name] = torch.tensor([counted.macs, counted.params])
    return outputs
