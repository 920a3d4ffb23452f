"""Terminator: slow nets, gates, local branch, SFNE block, network, slow loss and Kar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.classify.terminator import Terminator, convert_official
from torchconv.models.classify.terminator_block import SFNEBlock
from torchconv.ops._slow_net import LocalSlowNet, SlowNet
from torchconv.ops.terminator_units import GIBS, RGU, HyperChannelInteract, HyperInteract, LocalConv, slow_neural_loss
from torchconv.training.kar import Kar


def adapt(case: Case) -> Adapted:
    """``module`` names the part; an optimiser or the factors of the slow loss stand alone."""
    config = case.config
    if "optimizer" in config:
        return Adapted(lambda inputs: {"trajectory": _trajectory(config, inputs)})
    if "module" not in config:
        return Adapted(lambda inputs: {"loss": _slow_loss(config, inputs)})
    build = {
        "SlowNet_G": _slow_net,
        "SlowNet_L+LocalConv": _local,
        "HyperChannelInteract": _channel,
        "HyperInteract": _interact,
        "RGU": _rgu,
        "G_IBS": _g_ibs,
        "SFNEBlock": _block,
        "Terminator_image": _network,
    }[config["module"]]
    return build(case)


def _adapted(module: nn.Module, forward: Any) -> Adapted:
    return Adapted(forward, module, state=lambda s: convert_official(s))


def _net_of(case: Case, prefix: str) -> tuple[int, int]:
    """Hidden width and layers of a slow net, from its weights."""
    name = f"{prefix}.Kernel.linears."
    layers = sum(n.startswith(name) and n.endswith(".weight") for n in case.state)
    return case.state[f"{name}0.weight"].shape[0], layers


def _slow_net(case: Case) -> Adapted:
    config = case.config
    size = (config["size"],) * config.get("data_dim", 2)
    module = SlowNet(size, config["in_channels"], config["no_hidden"], config["num_layers"])
    return _adapted(module, lambda inputs: {"y": module()})


def _local(case: Case) -> Adapted:
    config = case.config
    channels, size = config["in_channels"], (config["kernel_size"],) * config.get("data_dim", 2)
    slow = LocalSlowNet(channels, size, config["no_hidden"], config["num_layers"])
    conv = LocalConv(channels, len(size))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        kernel = slow(inputs["context"])
        return {"kernel": kernel, "y": conv(kernel, inputs["x"])}

    return _adapted(nn.ModuleDict({"slow_net": slow, "conv": conv}), forward)


def _channel(case: Case) -> Adapted:
    config = case.config
    module = HyperChannelInteract(config["channel"], config["no_hidden"], config["num_layers"])
    return _adapted(module, lambda inputs: {"y": module(inputs["x"])})


def _interact(case: Case) -> Adapted:
    channel, spatial = case.config["channel_kernel"], case.config["spatial_kernel"]
    module = HyperInteract(
        case.config["channel"],
        (spatial["size"],) * 2,
        channel["no_hidden"],
        spatial["no_hidden"],
        channel["num_layers"],
        spatial["num_layers"],
    )
    return _adapted(module, lambda inputs: {"y": module(inputs["y"], inputs["x"])})


def _rgu(case: Case) -> Adapted:
    config = case.config
    module = RGU(config["in_channels"], (config["bias_size"],) * config.get("data_dim", 2))
    return _adapted(module, lambda inputs: {"y": module(inputs["x"])})


def _g_ibs(case: Case) -> Adapted:
    module = GIBS(case.config["channels"], case.config.get("group_num", 12))
    return _adapted(module, lambda inputs: {"y": module(inputs["x"])})


def _block(case: Case) -> Adapted:
    config = case.config
    whole, local = config["global_kernel"], config["local_kernel"]
    branch = "fast_multi_branch"
    channel = _net_of(case, f"{branch}.channel_mixer_hci.slow_net_gc")
    over_channels = _net_of(case, f"{branch}.hyper_interact.slow_net_gc")
    over_positions = _net_of(case, f"{branch}.hyper_interact.slow_net_gs")
    module = SFNEBlock(
        config["in_channels"],
        config["bottleneck_factor"],
        whole["size"],
        config.get("num_concat_pre", 0),
        local["sizes"],
        whole["no_hidden"],
        whole["num_layers"],
        local["no_hidden"],
        local["num_layers"],
        channel[0],
        (over_channels[0], over_positions[0]),
        channel[1],
        dropout=config.get("dropout", 0.0),
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        earlier = [inputs[n] for n in ("x_pre", "x_pre_pre")[: module.earlier]]
        y, kernel = module(inputs["x"], *earlier)
        return {"y": y, "global_kernel": kernel}

    return _adapted(module, forward)


def _network(case: Case) -> Adapted:
    config = case.config
    blocks, hidden = len(config["chs"]), config["no"]
    module = Terminator(
        config["out_channels"],
        config["chs"][0],
        config["size"],
        config["fac"],
        config.get("pre", [0] * blocks),
        config["layers"],
        config["sizes"],
        hidden,
        hidden,
        hidden,
        (hidden, hidden),
        drop_rates=[0.0] * blocks,
    )
    return _adapted(module, lambda inputs: {"y": module(inputs["x"]), "slow_loss": module.slow_loss()})


def _slow_loss(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    kernels = [inputs[f"k{i}"] for i in range(len(inputs))]
    return slow_neural_loss(kernels, config["factors"])


def _trajectory(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    defaults = {"kar2": 0.95, "kar3": (0.5, 0.95)}
    p = nn.Parameter(inputs["p0"].clone())
    optimizer = Kar([p], config["lr"], config.get("betas", defaults[config["optimizer"]]))
    path = []
    for grad in inputs["grads"]:
        p.grad = grad
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)
