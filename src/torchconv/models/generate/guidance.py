"""How predictions of a conditional diffusion model are combined, and attention adapted, at another resolution."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check
from torchconv.models.generate.steps import Argument, as_steps


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


class NoiseDampedGuidance(nn.Module):
    """Stands in the place of the network of a sampler with classifier-free guidance, and damps the noise.

    A sampler calls its network with the batch [without, with] the condition and extrapolates between the halves of the
    result, u + w·(c − u). This one also runs D' on the first half and returns [v, v + c − u], v = ε_{D'}(∅): whatever w
    is, the sampler then finds v + w·(c − u), which is :func:`noise_damped_guidance`. After the first τ steps the
    result of D is left as it is. Everything else that is asked of it (``config``, ``dtype``, …) is answered by D.
    Sampling without guidance, whose batch is not doubled, needs D itself.

    Args:
        network: D, re-dilated in all chosen layers.
        damped: D', re-dilated in its deepest layers only; it may share D's weights.
        steps: (τ, N), the first τ of N steps, or τ where ``timesteps`` lists all. Unset is all.
        timesteps: the number of time steps in training, or the sampler's own, noisiest first.
        argument: of ``network.forward``, the one with the time step; unset is found by its name.

    Shape:
        as ``network``; the batch is even. The result is a tensor, a tuple that begins with one, or an object with one
        as ``sample``.

    Raises:
        ValueError: an argument is out of range, or the batch is not two halves.

    Example:
        >>> from torchconv.models.generate.unet import SmallUNet
        >>> net = SmallUNet(4, (8, 16), context=6)
        >>> guided = NoiseDampedGuidance(net, net, steps=(30, 50))
        >>> x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 6)
        >>> torch.allclose(guided(x, 981, context), net(x, 981, context), atol=1e-5)  # D' = D damps nothing
        True

    Reference: arXiv 2310.07702, section 3.4.
    """

    def __init__(
        self,
        network: nn.Module,
        damped: nn.Module,
        *,
        steps: int | Sequence[int] | None = None,
        timesteps: Any = 1000,
        argument: str | None = None,
    ) -> None:
        super().__init__()
        self.network, self.damped = network, damped
        self._steps = None if steps is None else as_steps(steps, timesteps)
        self._argument = None if steps is None else Argument.timestep(network, argument)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("network", "_modules"):  # not there yet: in the middle of a copy
                raise
            return getattr(self.network, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``network`` gives for the batch [without, with], its first half replaced and its second one moved."""
        result = self.network(*args, **kwargs)
        if self._steps is not None and self._argument is not None:
            step = self._steps.index(self._argument.read(args, kwargs))
            if step >= self._steps.active:
                return result
        x = Argument(next(iter(inspect.signature(self.network.forward).parameters)), 0).read(args, kwargs)
        check(len(x) % 2 == 0, "batch", len(x), "must be two halves, without and with the condition")
        vanilla = _prediction(self.damped(*_first_half(args, len(x)), **_first_half(kwargs, len(x))))
        uncond, text = _prediction(result).chunk(2)
        damped = torch.cat([vanilla, vanilla + (text - uncond)])
        if isinstance(result, Tensor):
            return damped
        if isinstance(result, tuple):
            return (damped, *result[1:])
        result.sample = damped
        return result


def _prediction(result: Any) -> Tensor:
    found = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)
    if not isinstance(found, Tensor):
        raise ValueError(f"result={type(result).__name__}: expected a tensor, a tuple or an object with a sample")
    return found


def _first_half(value: Any, batch: int) -> Any:
    """``value`` with every tensor in it that has the batch cut to the half without the condition."""
    if isinstance(value, Tensor):
        return value[: batch // 2] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {k: _first_half(v, batch) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_first_half(v, batch) for v in value)
    return value


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
