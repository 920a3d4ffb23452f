"""P3D: the port's blocks and network, and the authors' Caffe graph up to a layer."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv._common import ntuple
from torchconv.models.video.p3d import P3D, P3DBottleneck


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config."""
    if "last" in case.config or any(n.startswith("res2a_") for n in case.state):
        return _caffe(case)
    return _network(case) if "layers" in case.config else _block(case.config)


def _block(config: dict[str, Any]) -> Adapted:
    forms, number, depth = config.get("ST_struc", "ABC"), config.get("n_s", 0), config.get("depth_3d", 47)
    form = forms[number % len(forms)] if number < depth else "2d"
    downsample = bool(config.get("downsample", False))
    # The port's rule, whatever strides it is given; the shortcut can only follow.
    strided = downsample and (number == depth or 0 < number < depth)
    module = P3DBottleneck(config["inplanes"], config["planes"], 1 + strided, form, "port", downsample)
    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module)


def _network(case: Case) -> Adapted:
    config = case.config
    pool = config.get("avgpool", "global")
    window = None if pool == "global" else ntuple("avgpool", pool, 2)
    net = P3D(
        config["layers"],
        config.get("num_classes", 400),
        3 if config.get("modality", "RGB") == "RGB" else 2,
        config.get("width", 64),
        config.get("ST_struc", "ABC"),
        "port",
        config.get("dropout", 0.0),
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        for index in range(3):
            x = net.stage(index, x)
        x = net.pool(x)
        # The port folds time away by a plain view, which is right for one frame only.
        y = net.layer4(x.reshape(-1, *(x.shape[i] for i in (1, 3, 4))))
        if window not in (None, tuple(y.shape[2:])):
            raise ParityError(f"avgpool {pool!r}: the network averages over all of the last map, {tuple(y.shape[2:])}")
        return {"y": net.fc(net.neck(y.mean((2, 3))))}

    return Adapted(forward, net)


def _blocks(names: list[str]) -> dict[int, list[str]]:
    """Caffe's blocks of each stage, in the order of the graph: 2a 2b 2c, 3a 3b1 3b2 …."""
    found = {m[1] for n in names if (m := re.match(r"res(\d[a-z]\d*)_branch", n))}
    ordered = sorted(found, key=lambda b: (b[:2], int(b[2:] or 0)))
    return {stage: [b for b in ordered if b[0] == str(stage)] for stage in (2, 3, 4, 5)}


def _caffe(case: Case) -> Adapted:
    config, blocks = case.config, _blocks(list(case.state))
    heads = [n.removesuffix(".weight") for n in case.state if n.startswith("fc") and n.endswith(".weight")]
    classes = len(case.state[f"{heads[0]}.weight"]) if heads else 0
    last = config.get("last") or (heads[0] if heads else f"res{[b for s in blocks.values() for b in s][-1]}_relu")
    net = P3D(
        [max(len(b), 1) for b in blocks.values()],
        classes,
        case.state["conv1.weight"].shape[1],
        64 // config.get("width_divisor", 1),
        drop_rate=config.get("dropout", 0.5),
    )
    places = {b: f"layer{stage - 1}.{i}" for stage, names in blocks.items() for i, b in enumerate(names)}

    def name(official: str) -> str:
        stem = {"conv1": "conv1_custom", "bn_conv1": "bn1", **dict.fromkeys(heads, "fc")}
        layer, _, leaf = official.rpartition(".")
        if layer in stem:
            return f"{stem[layer]}.{leaf}"
        found = re.fullmatch(r"(res|bn)(\d[a-z]\d*)_branch(1|2a|2b|2b_t|2c)", layer)
        if found is None or found[2] not in places:
            raise ParityError(f"unknown Caffe layer {layer!r}")
        kind, block, branch = found.groups()
        if branch == "1":
            return f"{places[block]}.downsample.{int(kind == 'bn')}.{leaf}"
        middle = "_normal" if block[0] == "5" else "2"
        number = {"2a": "1", "2b": middle, "2b_t": "3", "2c": "4"}[branch]
        return f"{places[block]}.{'conv' if kind == 'res' else 'bn'}{number}.{leaf}"

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = net.stem(inputs["x"])
        found = {"pool1": x}
        if last == "pool1":
            return found
        for stage, names in blocks.items():
            pool = "res5a_pool" if stage == 5 else f"{stage}a_pool"
            if stage > 2 and (names or last == pool):
                x = found[pool] = net.pool(x)
                if last == pool:
                    return _latest_first(found)
                x = x.transpose(1, 2).flatten(0, 1) if stage == 5 else x
            for block in names:
                module: Any = net.get_submodule(places[block])
                if last == f"res{block}":  # the sum before the ReLU, which Caffe applies in place
                    return _latest_first({**found, last: module.sum(x)})
                x = found[f"res{block}"] = module(x)
                if last == f"res{block}_relu":
                    return _latest_first(found)
        if blocks[5]:
            found["pool5"] = x.mean((2, 3), keepdim=True)
            if heads:
                found[heads[0]] = net.fc(net.neck(x.mean((2, 3))))
                if "prob" in case.outputs:
                    found["prob"] = found[heads[0]].softmax(1)
        return _latest_first(found)

    return Adapted(
        forward,
        net,
        state=lambda state: {name(n): t for n, t in state.items()},
        names=lambda n: name(n) if "." in n else n,
        # Layers behind the last one asked for are not in the file.
        fresh=lambda n: n.endswith("num_batches_tracked") or not n.startswith(tuple(places.values())),
    )


def _latest_first(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cotangent belongs to the last of the outputs that have its shape."""
    return dict(reversed(found.items()))
