"""LoCoCo: a cache of keys and values shrunk to a fixed number of slots by a small convolution over its tokens.

Cai, Tian, Wang, Chen 2024, "LoCoCo: Dropping In Convolutions for Long Context Compression", arXiv 2406.05317.

Of a cache of S tokens the h most looked-at stay as they are. A convolution over the sequence of the others, [K ‖ V] of
one head as channels, says for each of m further slots how to mix them; λ blends the mixture with plain selection:

    s = attention that the last chunk paid to each token                    given
    kept = the last ℓ tokens and the h − ℓ best of the others, rest = all others, both in the order of time
    P = softmax over tokens of act(conv(… act(conv([K_r ‖ V_r]))))          (m, |rest|), rows sum to 1
    R = one-hot rows of the m best of the rest, in the order of time
    K' = [K_kept ; (1 − λ) R K_r + λ P K_r], V' likewise                    M = h + m slots

with m = ⌊M (1 − r)⌋, d features of a head, one layer of w taps: 2·d·w·m + m + 1 parameters, shared by all heads, and
for each head 4·|rest|·d·m·(w + 1) FLOPs a compression. The one-hot matrix is never formed: its product is a gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import wide_dtype


def _same(x: Tensor) -> Tensor:
    return x


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": _same,
}


def heavy_hitters(scores: Tensor, size: int, local: int = 0) -> Tensor:
    """Which tokens stay: the last ``local`` and, of the others, the ``size − local`` with the highest scores.

    Args:
        scores: attention that each token got.
        size: how many stay, at most as many as there are.
        local: how many of the last stay in any case, at most ``size``.

    Shape:
        (…, S) → (…, S) bool, ``size`` times True in each row.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> heavy_hitters(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2, local=1)
        tensor([ True, False, False,  True])
    """
    length = scores.shape[-1]
    check(0 <= size <= length, "size", size, f"must be between 0 and the {length} tokens that there are")
    check(0 <= local <= size, "local", local, f"must be between 0 and size={size}")
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, _best(scores, size, local), True)


def _best(scores: Tensor, size: int, local: int) -> Tensor:
    """Indices of the heavy hitters in any order, then those of the last tokens."""
    length = scores.shape[-1]
    best = scores[..., : length - local].topk(size - local, -1, sorted=False).indices
    last = torch.arange(length - local, length, device=scores.device)
    return torch.cat([best, last.expand(*best.shape[:-1], local)], -1)


def _kept_first(mask: Tensor) -> Tensor:
    """Indices of the tokens, those of ``mask`` before the others, both in the order of time."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(-2, index.unsqueeze(-1).expand(*index.shape, tokens.shape[-1]))


def _check_cache(key: Tensor, value: Tensor, scores: Tensor) -> None:
    if key.dim() != 4 or value.shape != key.shape:
        shapes = f"key of shape {tuple(key.shape)} and value of shape {tuple(value.shape)}"
        raise ValueError(f"{shapes}: both are (B, heads, S, d)")
    if scores.shape != key.shape[:3]:
        raise ValueError(f"scores of shape {tuple(scores.shape)}: expected {tuple(key.shape[:3])}, one for each token")


def evict_cache(key: Tensor, value: Tensor, scores: Tensor, mem_size: int, local_len: int = 0) -> tuple[Tensor, Tensor]:
    """Heavy-hitter eviction, what the convolution is compared with: the best ``mem_size`` tokens in the order of time.

    Args:
        key, value: the cache; returned as it is where it already fits.
        scores: attention that each token got.
        mem_size, local_len: as of :func:`heavy_hitters`.

    Shape:
        (B, heads, S, d) twice and (B, heads, S) → (B, heads, min(S, mem_size), d) twice.

    Raises:
        ValueError: shapes do not fit or a number is out of range.

    Example:
        >>> key, value = evict_cache(torch.arange(3.0).reshape(1, 1, 3, 1), torch.zeros(1, 1, 3, 1),
        ...                          torch.tensor([[[0.5, 0.1, 0.3]]]), 2)
        >>> key.flatten()
        tensor([0., 2.])
    """
    _check_cache(key, value, scores)
    check_positive("mem_size", mem_size)
    check(0 <= local_len <= mem_size, "local_len", local_len, f"must be between 0 and mem_size={mem_size}")
    if key.shape[2] <= mem_size:
        return key, value
    index = _best(scores, mem_size, local_len).sort(-1).values
    return _take(key, index), _take(value, index)


def compress_cache(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    convolutions: Sequence[tuple[Tensor, Tensor | None]],
    normalizer: Tensor,
    mem_size: int,
    local_len: int = 0,
    hidden_act: str = "relu",
) -> tuple[Tensor, Tensor]:
    """A cache of ``mem_size`` slots: heavy hitters as they are, then mixtures of the others.

    Args:
        key, value: the cache.
        scores: attention that each token got; only their order counts, so that no gradient reaches them.
        convolutions: weight (out, in, w) and bias of each layer, w odd, the first from 2·d channels, the last to the
            m mixtures.
        normalizer: λ, how much of a mixture is the softmax's; the rest is a selected token. Not bound to [0, 1].
        mem_size: slots M ≥ m.
        local_len: how many of the last tokens stay in any case, at most M − m.
        hidden_act: after every convolution, also the last.

    Shape:
        (B, heads, S, d) twice and (B, heads, S), S ≥ M → (B, heads, M, d) twice.

    Raises:
        ValueError: shapes do not fit, the cache is shorter than M, or a number is out of range.

    Reference: arXiv 2406.05317.
    """
    _check_cache(key, value, scores)
    check_choice("hidden_act", hidden_act, ACTIVATIONS)
    batch, heads, length, dim = key.shape
    fused = convolutions[-1][0].shape[0]
    kept = mem_size - fused
    check(kept >= 0, "mem_size", mem_size, f"holds fewer slots than the last convolution makes, {fused}")
    check(local_len <= kept, "local_len", local_len, f"must be at most the {kept} slots that are kept")
    if length < mem_size:
        raise ValueError(f"key of {length} tokens: fits into mem_size={mem_size} slots as it is; leave it alone")
    order = _kept_first(heavy_hitters(scores, kept, local_len))
    tokens = _take(torch.cat([key, value], -1), order)
    rest = tokens[:, :, kept:]

    x = rest.flatten(0, 1).transpose(1, 2)
    for weight, bias in convolutions:
        x = ACTIVATIONS[hidden_act](F.conv1d(x, weight, bias, padding=(weight.shape[2] - 1) // 2))
    share = x.softmax(-1, dtype=wide_dtype(x.dtype)).to(rest.dtype).unflatten(0, (batch, heads))

    rest_scores = scores.gather(-1, order[..., kept:])
    selected = rest_scores.topk(fused, -1, sorted=False).indices.sort(-1).values
    mixed = (1 - normalizer) * _take(rest, selected) + normalizer * (share @ rest)
    slots = torch.cat([tokens[:, :, :kept], mixed.to(tokens.dtype)], 2)
    return slots[..., :dim], slots[..., dim:]


@part(
    "lococo",
    paper="lococo",
    kind="layer",
    dims=(1,),
    mixes="space+channels",
    probe={
        "build": {"head_dim": 4, "mem_size": 8, "kernel_size": 3, "local_len": 2, "detach": False},
        "inputs": [[2, 2, 15, 4], [2, 2, 15, 4], [2, 2, 15]],
    },
    keywords="KV cache compression long context language model transformer attention memory heavy hitters H2O tokens",
)
class LoCoCo(nn.Module):
    """Compress keys and values to a fixed number of slots; one module serves all heads of a layer.

    Args:
        head_dim: features d of a head.
        mem_size: slots M; fixed, since the convolution makes m = int(M · (1 − hh_keep_rate)) of them.
        hh_keep_rate: the share r of slots that heavy hitters keep, 0 ≤ r < 1.
        local_len: how many of the last tokens stay in any case; they take the place of heavy hitters.
        n_convlayer: convolutions, those before the last with m · ``expand`` channels.
        kernel_size: taps w, odd.
        hidden_act: after every convolution, also the last: a name in ``ACTIVATIONS``.
        expand: see ``n_convlayer``.
        normalizer_init: λ at the start.
        init_std: of the convolutions' weights at the start. The published 1 makes the first softmax nearly one-hot.
        detach: take the cache as constant, as published: gradients reach the convolutions and λ only. With False they
            also pass through the cache.

    Shape:
        key and value (B, heads, S, d), scores (B, heads, S), S ≥ M → key and value (B, heads, M, d).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> compress = LoCoCo(16, mem_size=32, kernel_size=5)
        >>> key, value = compress(torch.zeros(1, 2, 100, 16), torch.zeros(1, 2, 100, 16), torch.rand(1, 2, 100))
        >>> key.shape, value.shape
        (torch.Size([1, 2, 32, 16]), torch.Size([1, 2, 32, 16]))

    Reference: Cai et al., arXiv 2406.05317; parameters are named as in the authors' checkpoints.
    """

    def __init__(
        self,
        head_dim: int,
        mem_size: int = 128,
        *,
        hh_keep_rate: float = 0.5,
        local_len: int = 0,
        n_convlayer: int = 1,
        kernel_size: int = 21,
        hidden_act: str = "relu",
        expand: int = 1,
        normalizer_init: float = 0.5,
        init_std: float = 1.0,
        detach: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("head_dim", head_dim)
        check_positive("mem_size", mem_size)
        check(0 <= hh_keep_rate < 1, "hh_keep_rate", hh_keep_rate, "must be at least 0 and less than 1")
        fused = int(mem_size * (1 - hh_keep_rate))  # truncates rounding errors too, as the published sizes do
        remedy = f"leaves no slot of mem_size={mem_size} to the convolution; take less, or evict_cache for none at all"
        check(fused > 0, "hh_keep_rate", hh_keep_rate, remedy)
        kept = mem_size - fused
        check(0 <= local_len <= kept, "local_len", local_len, f"must be between 0 and the {kept} slots that are kept")
        check_positive("n_convlayer", n_convlayer)
        check_positive("kernel_size", kernel_size)
        check(kernel_size % 2 == 1, "kernel_size", kernel_size, "must be odd, so that each token keeps its place")
        check_choice("hidden_act", hidden_act, ACTIVATIONS)
        check_positive("expand", expand)
        check(init_std >= 0, "init_std", init_std, "must not be negative")
        self.head_dim, self.mem_size, self.fused, self.local_len = head_dim, mem_size, fused, local_len
        self.hidden_act, self.normalizer_init = hidden_act, normalizer_init
        self.init_std, self.detach = init_std, detach
        widths = [2 * head_dim, *[fused * expand] * (n_convlayer - 1), fused]
        options: dict[str, Any] = {"padding": (kernel_size - 1) // 2, "device": device, "dtype": dtype}
        # Even numbers only: in checkpoints the activations stand between.
        self.layers = nn.ModuleDict(
            {str(2 * i): nn.Conv1d(widths[i], widths[i + 1], kernel_size, **options) for i in range(n_convlayer)}
        )
        self.normalizer = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, PyTorch's biases, λ at its start."""
        for conv in self.layers.values():
            conv.reset_parameters()  # type: ignore[operator]
            nn.init.normal_(conv.weight, std=self.init_std)  # type: ignore[arg-type]
        nn.init.constant_(self.normalizer, self.normalizer_init)

    def param_options(self) -> dict[str, dict[str, float]]:
        """λ is not decayed."""
        return {"normalizer": {"weight_decay": 0.0}}

    def forward(self, key: Tensor, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Compress; ``scores`` is the attention that each token got, of which only the order counts."""
        if key.dim() != 4 or key.shape[3] != self.head_dim:
            raise ValueError(f"key of shape {tuple(key.shape)}: expected (B, heads, S, {self.head_dim})")
        if self.detach:
            key, value = key.detach(), value.detach()
        convolutions: list[tuple[Any, Any]] = [(conv.weight, conv.bias) for conv in self.layers.values()]
        return compress_cache(
            key,
            value,
            scores,
            convolutions,
            self.normalizer,
            self.mem_size,
            self.local_len,
            self.hidden_act,
        )

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.head_dim}, mem_size={self.mem_size}, fused={self.fused}, local_len={self.local_len}, "
            f"hidden_act={self.hidden_act!r}, detach={self.detach}"
        )
