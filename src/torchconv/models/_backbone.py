"""What every network of stages can do: features, a head that can be exchanged, feature maps, recomputation.

The method names are timm's, so that code written for its networks takes these too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchconv._common import check, check_choice, check_positive

POOLS = ("avg", "max", "avgmax", "")


def global_pool(x: Tensor, kind: str) -> Tensor:
    """(N, C, \\*spatial) → (N, C): the mean, the maximum, the half of their sum, or ("") the map as it is."""
    axes = tuple(range(2, x.dim()))
    if kind == "avg":
        return x.mean(axes)
    if kind == "max":
        return x.amax(axes)
    if kind == "avgmax":
        return (x.mean(axes) + x.amax(axes)) / 2
    return x


class Backbone(nn.Module):
    """A chain of stages, pooling, and a linear classifier that can be exchanged.

    A network derives from this, sets the attributes below in its constructor, and says what one :meth:`stage` does.

    Attributes:
        in_chans, num_classes, num_features: input channels, classes (0: none), channels of the last map.
        feature_info: for each stage ``{"num_chs", "reduction", "module"}``: channels, stride, name of the module.
        global_pool: "avg", "max", "avgmax", or "" (the head then gets the map).
        head_name: attribute (a dotted path) that holds the classifier.
    """

    head_name: ClassVar[str] = "head"
    in_chans: int
    num_classes: int
    num_features: int
    feature_info: list[dict[str, Any]]
    global_pool: str = "avg"
    grad_checkpointing: bool = False

    def stage(self, index: int, x: Tensor) -> Tensor:
        """The output of stage ``index`` from that of the one before (from the image for the first)."""
        raise NotImplementedError

    def final(self, x: Tensor) -> Tensor:
        """What follows the last stage before the pooling; nothing by default."""
        return x

    def neck(self, x: Tensor) -> Tensor:
        """What stands between the pooled features and the classifier; nothing by default."""
        return x

    @property
    def recomputes(self) -> bool:
        """Whether blocks keep only their inputs now."""
        return self.grad_checkpointing and self.training

    def run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Blocks in a row; with recomputation on and in training, only their inputs are kept."""
        if isinstance(blocks, nn.Sequential) and not self.recomputes:
            y: Tensor = blocks(x)  # the container itself is called, so that hooks on it see the stage
            return y
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, \\*spatial)."""
        for index in range(len(self.feature_info)):
            x = self.stage(index, x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and the classifier; ``pre_logits`` stops before the classifier."""
        x = self.neck(global_pool(x, self.global_pool))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Any:
        """Logits, or pooled features where there is no classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the stages ``indices`` on the way, and the final one.

        Args:
            x: images.
            indices: stages; an integer means that many last ones, None all. Negative ones count from the end.
            norm: apply :meth:`final` to the last stage's map too.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NCHW", or "NHWC" for maps with the channels last.
            intermediates_only: return the list alone.

        Returns:
            The list of maps, or (what :meth:`forward_features` returns, the list).

        Raises:
            ValueError: an index out of range, or another format.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        wanted = resolve_indices(indices, len(self.feature_info))
        last = max(wanted) if stop_early and intermediates_only else len(self.feature_info) - 1
        maps = []
        for index in range(last + 1):
            x = self.stage(index, x)
            if index in wanted:
                y = self.final(x) if norm and index == len(self.feature_info) - 1 else x
                maps.append(y.movedim(1, -1) if output_fmt == "NHWC" else y)
        return maps if intermediates_only else (self.final(x), maps)

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.get_submodule(self.head_name)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """A new classifier: linear, or nothing for 0 classes."""
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier with the library's default start; 0 removes it.

        Args:
            num_classes: ≥ 0.
            global_pool: another pooling; None keeps it.
        """
        check_positive("num_classes", num_classes, zero=True)
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        outer, _, leaf = self.head_name.rpartition(".")
        setattr(self.get_submodule(outer), leaf, self.make_classifier(num_classes).to(like.device, like.dtype))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and recompute the rest: less memory, a third slower."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay spares: what the parts say in ``param_options()``."""
        spared = set()
        for name, module in self.named_modules():
            options = getattr(module, "param_options", None)
            for parameter, needs in options().items() if options is not None else ():
                if needs.get("weight_decay") == 0.0:
                    spared.add(f"{name}.{parameter}".lstrip("."))
        return spared

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise learning rates: the modules of the stages, everything before the first."""
        stages = [info["module"].replace(".", r"\.") for info in self.feature_info]
        return {
            "stem": rf"^(?!{'|'.join(stages)}|{self.head_name})",
            "blocks": [(rf"^{s}", (i,)) for i, s in enumerate(stages)],
        }


def resolve_indices(indices: int | Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """Stage numbers from what a caller gave; see :meth:`Backbone.forward_intermediates`."""
    if indices is None:
        return tuple(range(stages))
    items = tuple(range(stages - indices, stages)) if isinstance(indices, int) else tuple(indices)
    ok = bool(items) and all(-stages <= i < stages for i in items)
    check(ok, "out_indices", indices, f"the network has {stages} stages, 0 to {stages - 1}")
    return tuple(sorted({i % stages for i in items}))


class FeatureInfo:
    """Channels, strides and modules of the maps that a feature extractor returns."""

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = list(info), tuple(out_indices)

    def _get(self, key: str, index: int | None) -> Any:
        return self.info[index][key] if index is not None else [self.info[i][key] for i in self.out_indices]

    def channels(self, index: int | None = None) -> Any:
        """Channels of the maps, or of stage ``index``."""
        return self._get("num_chs", index)

    def reduction(self, index: int | None = None) -> Any:
        """Strides of the maps, or of stage ``index``."""
        return self._get("reduction", index)

    def module_name(self, index: int | None = None) -> Any:
        """Modules that make the maps, or that of stage ``index``."""
        return self._get("module", index)

    def get_dicts(self) -> list[dict[str, Any]]:
        """All three for each map."""
        return [dict(self.info[i]) for i in self.out_indices]

    def __len__(self) -> int:
        return len(self.info)


class Features(nn.Module):
    """A backbone without its head that returns the maps of some stages.

    Args:
        model: the network; its classifier is removed.
        out_indices: stages, see :meth:`Backbone.forward_intermediates`.

    Shape:
        (N, in_chans, \\*spatial) → a list of maps.
    """

    def __init__(self, model: Backbone, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        model.reset_classifier(0)
        self.model = model
        self.out_indices = resolve_indices(out_indices, len(model.feature_info))
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`Backbone.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, from the finest to the coarsest."""
        maps: list[Tensor] = self.model.forward_intermediates(
            x, self.out_indices, stop_early=True, intermediates_only=True
        )
        return maps
