"""What compressed convolutional attention does to queries, keys and values before they meet; see :mod:`.cca`.

Tensors are (B, S, heads, head_dim) or (B, S, features) throughout, with time on the second axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check
from torchconv.kernels import causal_conv1d
from torchconv.kernels.precision import wide_dtype, widen


def causal_pair(
    z: Tensor,
    depthwise: Tensor | None,
    grouped: Tensor,
    depthwise_bias: Tensor | None = None,
    grouped_bias: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """A depthwise and a grouped causal convolution, one after the other, padded once in front of both.

    Padding once is not the same as padding twice: before the sequence the depthwise one gives its bias, which the
    grouped one sees.

    Args:
        z: the sequence.
        depthwise: (C, 1, t0), or None to leave it out (t0 = 1 below), with ``depthwise_bias`` (C,) or None.
        grouped: (C, C / groups, t1), with ``grouped_bias`` (C,) or None.
        state: (B, t0 + t1 − 2, C) what came before, oldest first; zeros when None.

    Shape:
        z (B, S, C) → (B, S, C).

    Example:
        >>> ones = torch.ones(1, 1, 2)
        >>> causal_pair(torch.tensor([[[1.0], [0.0], [0.0]]]), ones, ones).flatten()
        tensor([1., 2., 1.])
    """
    channels, per_group, taps = grouped.shape
    u = F.pad(z, (0, 0, taps - 1, 0)) if state is None else torch.cat([state.to(z.dtype), z], 1)
    if depthwise is not None:
        # Without a state the convolution itself supplies the zeros in front of those that the next one needs.
        u = causal_conv1d(u, depthwise, depthwise_bias, layout="BLC")
        u = u if state is None else u[:, depthwise.shape[2] - 1 :]
    groups = channels // per_group
    # As an image of one row whose memory is channels-last: no transposed copies, unlike a convolution of sequences.
    y = F.conv2d(u.transpose(1, 2).unsqueeze(2), grouped.unsqueeze(2), grouped_bias, groups=groups)
    return y.squeeze(2).transpose(1, 2)


def merge_pair(
    depthwise: Tensor, grouped: Tensor, depthwise_bias: Tensor | None = None, grouped_bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The one grouped convolution of t0 + t1 − 1 taps that equals :func:`causal_pair` at every position.

    W[o, i, τ] = Σ grouped[o, i, τ1] · depthwise[i, τ0] over τ0 + τ1 = τ, and the bias of the first, seen through the
    second's taps, is added to that of the second.

    Shape:
        (C, 1, t0), (C, C / groups, t1) → (C, C / groups, t0 + t1 − 1), (C,).
    """
    channels, per_group, taps = grouped.shape
    groups, before = channels // per_group, depthwise.shape[2]
    by_group = grouped.unflatten(0, (groups, per_group))  # groups, out, in, t1
    first = depthwise.reshape(groups, 1, per_group, before)
    weight = grouped.new_zeros(groups, per_group, per_group, before + taps - 1)
    for t in range(before):
        weight[..., t : t + taps] += by_group * first[..., t : t + 1]
    bias = grouped_bias
    if depthwise_bias is not None:
        seen = (by_group.sum(3) @ depthwise_bias.reshape(groups, per_group, 1)).flatten()
        bias = seen if bias is None else bias + seen
    return weight.flatten(0, 1), bias


def mean_residual(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Half-way between each query head and the key head that it uses, and the average of that over the sharers.

    M_q[i] = (q[i] + k[i // g]) / 2, M_k[j] = mean of M_q over the g query heads of key head j.

    Shape:
        q (B, S, n_q, d), k (B, S, n_k, d), n_k divides n_q → the same.

    Example:
        >>> q, k = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1), torch.tensor([5.0]).reshape(1, 1, 1, 1)
        >>> [m.flatten().tolist() for m in mean_residual(q, k)]
        [[3.0, 4.0], [3.5]]
    """
    shared = q.unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
    mean = (shared + k.unsqueeze(3)) * 0.5
    return mean.flatten(2, 3), mean.mean(3)


def shifted_value(current: Tensor, delayed: Tensor, before: Tensor) -> Tensor:
    """Features of a token, then other features of the token before it.

    Args:
        current: (B, S, F).
        delayed: (B, S, F), moved on by one token.
        before: (B, 1, F), what stands at the first token.

    Shape:
        → (B, S, 2·F).

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> shifted_value(x, 10 * x, torch.zeros(1, 1, 1))
        tensor([[[ 1.,  0.],
                 [ 2., 10.],
                 [ 3., 20.]]])
    """
    return torch.cat([current, torch.cat([before.to(delayed.dtype), delayed[:, :-1]], 1)], 2)


def head_norm(x: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Every head at length √d, times its temperature; lengths below the type's ε count as ε.

    Shape:
        x (B, S, heads, d), temperature (heads,) → the same as x.

    Example:
        >>> head_norm(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([10.0])).flatten()
        tensor([ 8.4853, 11.3137])
    """
    wide = widen(x)
    scale = x.shape[-1] ** 0.5 / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(
        torch.finfo(x.dtype).eps
    )
    if temperature is not None:
        scale = scale * temperature[:, None]
    return (wide * scale).to(x.dtype)


def rotary_width(head_dim: int, share: float) -> int:
    """How many features of a head turn: ``int(head_dim · share)``, the next even number if that is odd."""
    return 2 * ((int(head_dim * share) + 1) // 2)


def rotary_table(
    start: int, length: int, head_dim: int, share: float, theta: float, like: Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``start`` to ``start + length − 1``.

    Feature i and i + r/2 turn together by position / factor · θ^(−2i / int(head_dim · share)).

    Shape:
        → two of (length, r), r from :func:`rotary_width`, of ``like``'s device in float32 or float64.
    """
    dtype, turning = wide_dtype(like.dtype), int(head_dim * share)
    rates = theta ** -(torch.arange(0, turning, 2, device=like.device, dtype=dtype) / max(turning, 1))
    positions = torch.arange(start, start + length, device=like.device, dtype=dtype)
    angles = torch.outer(positions / factor, rates)
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first features of every head; the others stay.

    Args:
        x: (B, S, heads, d).
        cos, sin: (S, r) or (B, S, r), r even and at most d.

    Shape:
        → the same as x.

    Raises:
        ValueError: the tables do not fit.

    Example:
        >>> x = torch.tensor([1.0, 0.0, 7.0]).reshape(1, 1, 1, 3)
        >>> rotate(x, torch.zeros(1, 2), torch.ones(1, 2)).flatten()
        tensor([0., 1., 7.])
    """
    width = cos.shape[-1]
    fits = cos.shape == sin.shape and width % 2 == 0 and width <= x.shape[-1] and cos.shape[-2] == x.shape[1]
    remedy = f"two tables of ({x.shape[1]}, r) or (B, {x.shape[1]}, r), r even and at most {x.shape[-1]}"
    check(fits, "rotary", [tuple(cos.shape), tuple(sin.shape)], f"expected {remedy}")
    if width == 0:
        return x
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turning = x[..., :width]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)
