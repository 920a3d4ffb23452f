"""A classifier of sequences made of stand-alone long convolutions (Fu et al. 2023, arXiv 2302.06646).

Linear encoder; in each block a long convolution, dropout of features, the residual and a layer norm, before
(``prenorm``) or after; mean over time; linear decoder. Parameter names are the authors'. 2·c·H·L + c·H·(2·H + 1) + 4·H
parameters a block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchconv._common import check_positive
from torchconv.catalog import part
from torchconv.ops.longconv_layers import StandaloneLongConv


@part(
    "longconv-net",
    paper="longconv",
    kind="model",
    dims=(1,),
    keywords="long convolution sequence classifier long range arena sequential CIFAR",
)
class LongConvModel(nn.Module):
    """Blocks of :class:`~torchconv.ops.longconv_layers.StandaloneLongConv` between a linear encoder and decoder.

    Args:
        d_input, d_output: features of a sample, classes.
        d_model: width H.
        n_layers: blocks.
        dropout: in and after every convolution.
        prenorm: normalise before the convolution instead of after the residual.
        length: half of the taps of every kernel; the authors' 1024 serves sequences of up to 1024 samples to both
            sides. Longer ones are seen in part.
        conv_options: of the convolutions: ``channels``, ``kernel_lam``, ``kernel_dropout``, ``causal``, ``init_std``.

    Shape:
        (B, L, d_input) → (B, d_output).

    Example:
        >>> import torch
        >>> LongConvModel(1, 10, d_model=8, n_layers=2)(torch.zeros(2, 64, 1)).shape
        torch.Size([2, 10])

    Reference: Fu et al., arXiv 2302.06646.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int = 10,
        d_model: int = 512,
        n_layers: int = 6,
        dropout: float = 0.1,
        prenorm: bool = False,
        length: int = 1024,
        *,
        device: Any = None,
        dtype: Any = None,
        **conv_options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("d_input", d_input), ("d_output", d_output), ("n_layers", n_layers)):
            check_positive(name, value)
        options = {"device": device, "dtype": dtype}
        self.prenorm = prenorm
        self.encoder = nn.Linear(d_input, d_model, **options)
        self.conv_layers = nn.ModuleList(
            StandaloneLongConv(d_model, length, dropout=dropout, **conv_options, **options) for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d_model, **options) for _ in range(n_layers))
        self.dropouts = nn.ModuleList(nn.Dropout1d(dropout) for _ in range(n_layers))
        self.decoder = nn.Linear(d_model, d_output, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.encoder(x)
        for layer, norm, dropout in zip(self.conv_layers, self.norms, self.dropouts, strict=True):
            z = norm(x) if self.prenorm else x
            x = x + dropout(layer(z.transpose(1, 2))).transpose(1, 2)
            x = x if self.prenorm else norm(x)
        y: Tensor = self.decoder(x.mean(1))
        return y
