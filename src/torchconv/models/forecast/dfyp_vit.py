"""The vision transformer of DFYP: flattened patches, a class token, learned positions, pre-norm blocks.

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv 2010.11929, as DFYP uses it for both sensors (Zhang et
al. 2025, arXiv 2507.05849).

    tokens = [class; LN(Linear(LN(patch)))] + positions
    x ← x + Attention(LN(x));   x ← x + MLP(LN(x))                 times the depth
    y = Linear(LN(x)[class])

A patch is read row by row with the channels last. Parameter names are those of the authors' checkpoints. Attention has
4·D·heads·head + D parameters, a patch C·p²·D ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import Size, check, check_positive, ntuple
from torchconv.catalog import part
from torchconv.ops._common import check_input


class Attention(nn.Module):
    """Layer norm and softmax attention; queries, keys and values without bias, the projection with one.

    Shape:
        (N, L, dim) → the same.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float,
        project: bool,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(dim, **options)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **options)
        projection = nn.Linear(heads * dim_head, dim, **options) if project else nn.Identity()
        self.to_out = nn.Sequential(projection, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.to_qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        z: Tensor = self.to_out(y.transpose(1, 2).flatten(2))
        return z


class FeedForward(nn.Module):
    """Layer norm, linear, GELU, linear, with dropout after the last two.

    Shape:
        (N, L, dim) → the same.
    """

    def __init__(self, dim: int, hidden: int, dropout: float, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.net = nn.Sequential(
            nn.LayerNorm(dim, **options),
            nn.Linear(dim, hidden, **options),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, **options),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        y: Tensor = self.net(x)
        return y


class Transformer(nn.Module):
    """Blocks of attention and feed-forward part, each added to its input, and a last layer norm."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        dropout: float,
        project: bool,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **options)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(dim, heads, dim_head, dropout, project, **options),
                    FeedForward(dim, mlp_dim, dropout, **options),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, dim) → the same."""
        for layer in self.layers:
            attention, feed_forward = layer.children()
            x = attention(x) + x
            x = feed_forward(x) + x
        y: Tensor = self.norm(x)
        return y


class Patches(nn.Module):
    """Flattened patches, row by row with the channels last: (N, C, H, W) → (N, H/p · W/q, p·q·C)."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Cut ``x``."""
        p, q = self.size
        pieces = x.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # N C h p w q
        return pieces.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@part(
    "dfyp-vit",
    paper="dfyp",
    kind="layer",
    dims=(2,),
    probe={
        "build": {"image_size": [8, 4], "patch_size": 4, "channels": 3, "dim": 8, "depth": 1, "heads": 2, "mlp_dim": 6},
        "inputs": [[2, 3, 8, 4]],
    },
    keywords="vision transformer ViT patches class token attention",
)
class ViT(nn.Module):
    """Vision transformer with a class token; maps smaller than ``image_size`` take the first of the positions.

    Args:
        image_size: height and width for which positions are held, multiples of the patch.
        patch_size: height and width of a patch.
        channels: of the input.
        num_classes: outputs.
        dim: width of a token.
        depth: blocks.
        heads, dim_head: attention heads and the width of one.
        mlp_dim: hidden width of the feed-forward parts.
        dropout: in attention and feed-forward parts.
        emb_dropout: on the tokens before the first block.
        project: project the heads back to ``dim``; without, they must fit.

    Shape:
        (N, channels, H, W) → (N, num_classes).

    Raises:
        ValueError: an argument is out of range, or a map that patches do not tile or positions do not cover.

    Example:
        >>> ViT((32, 32), 4, 9)(torch.zeros(2, 9, 20, 32)).shape
        torch.Size([2, 1])

    Reference: arXiv 2010.11929; arXiv 2507.05849.
    """

    def __init__(
        self,
        image_size: Size = 32,
        patch_size: Size = 4,
        channels: int = 9,
        num_classes: int = 1,
        dim: int = 256,
        depth: int = 4,
        heads: int = 8,
        dim_head: int = 64,
        mlp_dim: int = 512,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        project: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "num_classes": num_classes, "dim": dim, "heads": heads, "dim_head": dim_head}
        for name, value in {**sizes, "mlp_dim": mlp_dim}.items():
            check_positive(name, value)
        check_positive("depth", depth, zero=True)
        for name, rate in (("dropout", dropout), ("emb_dropout", emb_dropout)):
            check(0 <= rate < 1, name, rate, "must be at least 0 and below 1")
        check(project or heads * dim_head == dim, "project", project, f"{heads} heads of {dim_head} are not dim={dim}")
        p, q = patch = ntuple("patch_size", patch_size, 2)
        height, width = ntuple("image_size", image_size, 2)
        fits = height % p == 0 and width % q == 0
        check(fits, "image_size", (height, width), f"must be multiples of patch_size={(p, q)}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.patch_size, self.dim = channels, (p, q), dim
        self.to_patch_embedding = nn.Sequential(
            Patches((patch[0], patch[1])),
            nn.LayerNorm(p * q * channels, **options),
            nn.Linear(p * q * channels, dim, **options),
            nn.LayerNorm(dim, **options),
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, (height // p) * (width // q) + 1, dim, **options))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim, **options))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout, project, **options)
        self.mlp_head = nn.Linear(dim, num_classes, **options)

    def param_options(self) -> dict[str, dict[str, float]]:
        """Class token and positions are not decayed."""
        return {name: {"weight_decay": 0.0} for name in ("pos_embedding", "cls_token")}

    def check(self, x: Tensor) -> None:
        """Refuse a map that patches do not tile or positions do not cover."""
        check_input(x, self.channels, 2)
        (height, width), (p, q) = x.shape[2:], self.patch_size
        if height % p or width % q or not height or not width:
            raise ValueError(f"x of shape {tuple(x.shape)}: patches of {p} × {q} do not tile it; pad it with zeros")
        count, held = (height // p) * (width // q), self.pos_embedding.shape[1] - 1
        if count > held:
            raise ValueError(f"x of shape {tuple(x.shape)}: {count} patches, positions for {held}; crop or resize it")

    def forward_features(self, x: Tensor) -> Tensor:
        """The class token after the last block, (N, dim)."""
        self.check(x)
        tokens = self.to_patch_embedding(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        tokens = tokens + self.pos_embedding[:, : tokens.shape[1]]
        y: Tensor = self.transformer(self.dropout(tokens))[:, 0]
        return y

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        y: Tensor = self.mlp_head(self.forward_features(x))
        return y


def convert_tokens(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The state with a batch axis on class token and positions, which newer checkpoints leave out.

    Example:
        >>> convert_tokens({"cls_token": torch.zeros(1, 8)})["cls_token"].shape
        torch.Size([1, 1, 8])
    """
    flat = (f"{prefix}cls_token", f"{prefix}pos_embedding")
    return {n: t[None] if n in flat and t.dim() == 2 else t for n, t in state.items()}
