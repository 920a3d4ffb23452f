"""Named networks: ``@register_model``, ``create_model``, ``list_models``, and their entries in timm."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from torchconv import catalog
from torchconv.models._backbone import Backbone, Features

Build = Callable[..., nn.Module]
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args")


def register_model(paper: str) -> Callable[[Build], Build]:
    """Announce a function ``name(**options) -> module`` as a named network of a method.

    The function then also takes timm's ``pretrained`` (False: no weights are shipped, see
    :func:`torchconv.weights.load_official`), ``features_only`` with ``out_indices``, and notes its name and options on
    the network, which is how saved networks are built again.
    """

    def decorate(build: Build) -> Build:
        name = build.__name__

        signature = inspect.signature(build)

        @functools.wraps(build)
        def entry(
            *arguments: Any,
            pretrained: bool = False,
            features_only: bool = False,
            out_indices: int | Sequence[int] | None = None,
            **options: Any,
        ) -> nn.Module:
            if pretrained:
                remedy = f"get the authors' file and call torchconv.weights.load_official({name!r}, path)"
                raise ValueError(f"pretrained=True: no weights are shipped; {remedy}")
            options = {k: v for k, v in options.items() if k not in _TIMM_ONLY}
            options = {**signature.bind_partial(*arguments).arguments, **options}
            model: Any = build(**options)
            recorded = {**options, **({"features_only": True} if features_only else {})}
            if features_only:
                if not isinstance(model, Backbone):
                    raise ValueError(f"features_only=True: {name} has no stages to take features from")
                model = Features(model, out_indices)
                recorded["out_indices"] = model.out_indices
            model.torchconv_config = {"model": name, "options": recorded}
            return model

        entry.paper = paper  # type: ignore[attr-defined]
        return entry

    return decorate


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a named network.

    Args:
        name: one of :func:`list_models`.
        options: of its function; ``features_only=True`` and ``out_indices`` give the maps of the stages.

    Raises:
        ValueError: an unknown name (the nearest are given) or option value.

    Example:
        >>> create_model("unireplknet_a", num_classes=10).num_classes
        10
    """
    announced = catalog.variant(name)
    model: nn.Module = getattr(importlib.import_module(announced.module), name)(**options)
    return model


def list_models(pattern: str = "", *, paper: str | None = None, task: str | None = None) -> list[str]:
    """Names of networks, by shell pattern (``"unireplknet*"``), method or task."""
    return catalog.matching(pattern, paper, task)


def tell_timm() -> None:
    """Enter every network for images in timm's registry, so that ``timm.create_model`` builds them by name.

    A name that timm has already stays timm's.
    """
    if importlib.util.find_spec("timm") is None:
        return
    from timm.models import is_model
    from timm.models import register_model as register

    for announced in catalog.variants().values():
        if announced.task == "classify" and not is_model(announced.name):
            register(_stub(announced))


def _stub(announced: catalog.Variant) -> Build:
    """An entry that imports its network when it is called."""

    def entry(**options: Any) -> nn.Module:
        return create_model(announced.name, **options)

    entry.__name__ = entry.__qualname__ = announced.name
    entry.__doc__ = announced.summary
    entry.__module__ = "torchconv.models"
    return entry
