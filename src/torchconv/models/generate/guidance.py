"""How predictions of a conditional diffusion model are combined, and attention adapted, at another resolution."""

from __future__ import annotations

import math

from torch import Tensor

from torchconv._common import check


def classifier_free_guidance(uncond: Tensor, text: Tensor, guidance: float) -> Tensor:
    """ε(∅) + w·(ε(c) − ε(∅)): predictions without and with the condition, w the strength (Ho & Salimans 2022).

    Example:
        >>> import torch
        >>> classifier_free_guidance(torch.zeros(1), torch.ones(1), 7.5)
        tensor([7.5000])

    Reference: arXiv 2207.12598.
    """
    return uncond + guidance * (text - uncond)


def noise_damped_guidance(vanilla: Tensor, uncond: Tensor, text: Tensor, guidance: float) -> Tensor:
    """ε_{D'}(∅) + w·(ε_D(c) − ε_D(∅)): clean texture from a network with few re-dilated layers, structure from one
    with many.

    Args:
        vanilla: prediction without condition by the network D', re-dilated in its deepest layers only.
        uncond, text: predictions without and with the condition by the network D, re-dilated in all chosen layers.
        guidance: w, the strength of the condition.

    With D' = D it is :func:`classifier_free_guidance`. D' need not be run with the condition.

    Example:
        >>> import torch
        >>> noise_damped_guidance(torch.ones(1), torch.zeros(1), torch.ones(1), 2.0)
        tensor([3.])

    Reference: arXiv 2310.07702, section 3.4.
    """
    return vanilla + guidance * (text - uncond)


def attention_scale(trained_tokens: int, tokens: int) -> float:
    """√(log n / log n_train): multiply the softmax scale of self-attention by it over n instead of n_train tokens.

    It keeps the entropy of the attention about constant (Z. Jin et al. 2023, arXiv 2306.08645).

    Example:
        >>> round(attention_scale(4096, 16384), 4)
        1.0801
    """
    check(trained_tokens > 1, "trained_tokens", trained_tokens, "must be at least 2")
    check(tokens > 1, "tokens", tokens, "must be at least 2")
    return math.sqrt(math.log(tokens, trained_tokens))
