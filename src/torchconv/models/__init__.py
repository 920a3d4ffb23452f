"""Whole networks, by task. Importing this enters the image classifiers in timm's registry, where timm is installed."""

from torchconv.models._registry import create_model, list_models, tell_timm

__all__ = ["create_model", "list_models"]

tell_timm()
