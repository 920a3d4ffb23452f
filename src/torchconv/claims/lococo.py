"""LoCoCo's claim: slots that a convolution mixes keep more of a long cache than the tokens that eviction would keep."""

from __future__ import annotations

import copy
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, train

HEADS, LENGTH, DIM, SLOTS, QUERIES, RHO, NOISE = 2, 256, 16, 32, 64, 0.9, 0.5


@claim(
    key="lococo",
    says="At an equal number of cache slots, convolutions that fuse tokens into slots keep more of what attention "
    "needs than evicting all but the heavy hitters.",
    source="arXiv 2406.05317, abstract and sections 3 and 4 (compression at a fixed cache size)",
    experiment="Keys and values of 256 tokens from an AR(1) process (correlation 0.9, 16 features, 2 heads), queries "
    "noisy copies of random keys; one set of queries scores the tokens, another is answered. 32 slots, kept by "
    "heavy-hitter eviction or filled by LoCoCo, trained to match the attention to the full cache on fresh draws. "
    "Effect: the share of eviction's squared error on held-out draws that LoCoCo removes.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train compressors on fresh draws; compare them, untrained ones and plain means with eviction on one test set."""
    import torch

    from torchconv.ops.lococo import LoCoCo, evict_cache

    seeds, steps = (3, 300) if budget == "quick" else (6, 1500)
    test = _draw(64, torch.Generator().manual_seed(12345))
    names = ("eviction", "LoCoCo", "untrained", "means of the rest", "means of neighbours")
    errors: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LoCoCo(DIM, SLOTS, kernel_size=21)
        means = copy.deepcopy(model)
        with torch.no_grad():
            means.normalizer.fill_(1.0)
            for parameter in means.layers.parameters():
                parameter.zero_()

        with torch.no_grad():
            untrained = _error(model, test)

        def loss(model: Any = model, generator: Any = generator) -> Any:
            return _error(model, _draw(4, generator))

        train(model, loss, steps=steps, lr=1e-2, weight_decay=0.0)
        with torch.no_grad():
            found = {
                "eviction": _error(lambda k, v, s: evict_cache(k, v, s, SLOTS), test),
                "LoCoCo": _error(model, test),
                "untrained": untrained,
                "means of the rest": _error(means, test),
                "means of neighbours": _error(_pool, test),
            }
        for name, error in found.items():
            errors[name].append(float(error))
        rates.append(float(model.normalizer.detach()))
        progress(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in errors.items()))
    with torch.no_grad():
        independent = _draw(64, torch.Generator().manual_seed(12345), rho=0.0)
        controls = {
            "eviction": float(_error(lambda k, v, s: evict_cache(k, v, s, SLOTS), independent)),
            "means of neighbours": float(_error(_pool, independent)),
        }
    shares = [ours / theirs for ours, theirs in zip(errors["LoCoCo"], errors["eviction"], strict=True)]
    effect, low, high = paired_interval([1.0] * seeds, shares)
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="share of the squared error",
        meaning="positive: fused slots answer more exactly than evicted caches of the same size",
        measurements={
            "relative_squared_error": {name: sum(values) / seeds for name, values in errors.items()},
            "per_seed": errors,
            "independent_keys": controls,
            "lambda": rates,
            "parameters": sum(p.numel() for p in LoCoCo(DIM, SLOTS, kernel_size=21).parameters()),
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "Synthetic keys and values; no language model is trained.",
            f"Averaging {LENGTH // SLOTS} neighbours into each slot, without training, leaves an error of "
            f"{errors['means of neighbours'][0]:.2f} (eviction {errors['eviction'][0]:.2f}); of independent keys "
            f"{controls['means of neighbours']:.2f} (eviction {controls['eviction']:.2f}).",
            "The interval is over initialisations and training draws; the 64 test sequences are the same for all.",
        ],
    )


def _draw(batch: int, generator: Any, rho: float = RHO) -> tuple[Any, Any, Any, Any]:
    """Keys, values, scores by one set of queries, and another set of queries."""
    import torch

    noise = torch.randn(2, batch, HEADS, LENGTH, DIM, generator=generator)
    steps = torch.arange(LENGTH)
    # AR(1) in closed form: a lower triangular matrix of powers, the first token at full variance.
    mix = torch.tril(rho ** (steps[:, None] - steps).clamp(min=0).float())
    mix[:, 1:] *= (1 - rho**2) ** 0.5
    key, value = mix @ noise
    index = torch.randint(LENGTH, (batch, HEADS, 2 * QUERIES), generator=generator)
    queries = key.gather(2, index[..., None].expand(-1, -1, -1, DIM))
    queries = queries + NOISE * torch.randn(queries.shape, generator=generator)
    scoring, asking = queries.chunk(2, 2)
    scores = (scoring @ key.transpose(2, 3) / DIM**0.5).softmax(-1).sum(2)
    return key, value, scores, asking


def _pool(key: Any, value: Any, scores: Any) -> tuple[Any, Any]:
    """A control: runs of consecutive tokens averaged, whatever their scores."""
    shape = (SLOTS, key.shape[2] // SLOTS)
    return key.unflatten(2, shape).mean(3), value.unflatten(2, shape).mean(3)


def _error(compress: Any, draw: tuple[Any, Any, Any, Any]) -> Any:
    """Squared error of the answers from the compressed cache, relative to those from the full one."""
    import torch.nn.functional as F

    key, value, scores, asking = draw
    full = F.scaled_dot_product_attention(asking, key, value)
    answer = F.scaled_dot_product_attention(asking, *compress(key, value, scores))
    return (answer - full).square().sum() / full.square().sum()
