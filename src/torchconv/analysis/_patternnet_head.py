"""The head that says which filters speak for a class (PatternNet, arXiv 1703.06339, section 3).

Global max pooling over positions, a soft threshold a filter, a linear layer: (C + 2) N + C parameters for N filters and
C classes, and one comparison a response.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.analysis._patternnet_maps import respond
from torchconv.catalog.parts import part


@part(
    "pattern-head",
    paper="patternnet",
    kind="layer",
    dims=(1, 2, 3),
    mixes="space+channels",
    probe={"build": {"n_filters": 8, "n_classes": 5}, "inputs": [[2, 8, 7, 9]]},
    keywords="global max pooling sigmoid threshold part detectors classifier interpretable",
)
class PatternNetHead(nn.Module):
    """Global max pooling, a soft threshold a filter, a linear layer: its weights say which filters speak for a class.

    Args:
        n_filters: channels N of the maps.
        n_classes: logits C.
        scale: β of every filter at first; learned.
        threshold: t of every filter at first; learned.

    Shape:
        (B, N, \\*spatial), any number of axes, after a ReLU → (B, C)

    Example:
        >>> PatternNetHead(16, 10)(torch.rand(2, 16, 7, 7)).shape
        torch.Size([2, 10])

    Reference: arXiv 1703.06339, section 3.
    """

    def __init__(
        self,
        n_filters: int,
        n_classes: int,
        scale: float = 1.0,
        threshold: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("n_filters", n_filters)
        check_positive("n_classes", n_classes)
        self.sigmoid_scale = nn.Parameter(torch.full((n_filters,), float(scale), device=device, dtype=dtype))
        self.sigmoid_threshold = nn.Parameter(torch.full((n_filters,), float(threshold), device=device, dtype=dtype))
        self.fc = nn.Linear(n_filters, n_classes, device=device, dtype=dtype)

    def gate(self, response: Tensor) -> Tensor:
        """Largest responses (B, N) → how much each filter has fired, in 0..1."""
        return torch.sigmoid(self.sigmoid_scale * (response - self.sigmoid_threshold))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, N, \\*spatial) → logits (B, C)."""
        check(maps.dim() >= 3, "maps", tuple(maps.shape), "must be (B, N, spatial axes)")
        count = self.fc.in_features
        check(maps.shape[1] == count, "maps", tuple(maps.shape), f"must have {count} channels, one a filter")
        logits: Tensor = self.fc(self.gate(respond(maps)[0]))
        return logits


def class_filters(weight: Tensor, k: int = 5, positive_only: bool = True) -> list[tuple[int, ...]]:
    """For every class the k filters of largest weight, in descending order, the lower index first among equals.

    Args:
        weight: (C, N), of the head's linear layer.
        k: how many; fewer where there are fewer.
        positive_only: leave out weights that are not above zero: they speak against the class.

    Example:
        >>> class_filters(torch.tensor([[0.5, -1.0, 2.0], [-1.0, -2.0, -3.0]]), 2)
        [(2, 0), ()]
    """
    check_positive("k", k)
    order = weight.detach().sort(dim=1, descending=True, stable=True)
    rows = zip(order.values[:, :k].tolist(), order.indices[:, :k].tolist(), strict=True)
    return [tuple(n for v, n in zip(*row, strict=True) if v > 0 or not positive_only) for row in rows]


def fit_head(
    responses: Tensor, labels: Tensor, n_classes: int, *, steps: int = 300, lr: float = 0.05, l1: float = 1e-3
) -> PatternNetHead:
    """A head for a network that stays as it is, fitted to the largest responses of its filters.

    To train the network along with it, put a :class:`PatternNetHead` behind its last ReLU and train as usual.

    Args:
        responses: (B, N), of :func:`respond`.
        labels: (B,), 0..n_classes − 1.
        n_classes: logits.
        steps: of Adam on all images, cosine to zero.
        lr: its rate at first.
        l1: penalty on the linear layer's weights: few filters speak for a class.

    Returns:
        The head in eval mode; thresholds begin at the filters' means and scales at one over their deviations.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = PatternNetHead(responses.shape[1], n_classes, device=responses.device)
    responses = responses.detach().float()
    deviation = responses.std(0, correction=0)
    with torch.no_grad():
        head.sigmoid_threshold.copy_(responses.mean(0))
        head.sigmoid_scale.copy_(torch.where(deviation > 0, 1 / deviation.clamp_min(1e-12), 1.0))
        head.fc.weight.zero_()
        head.fc.bias.zero_()
    optimizer = torch.optim.Adam(head.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            logits = head.fc(head.gate(responses))
            (nn.functional.cross_entropy(logits, labels) + l1 * head.fc.weight.abs().sum()).backward()
            optimizer.step()
            schedule.step()
    return head.eval()
