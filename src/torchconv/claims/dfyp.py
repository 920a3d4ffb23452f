"""DFYP's claim: channel attention and blended edge operators make yield predictions from histograms better."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, train

BANDS, DATES, BINS = 9, 32, 32
COUNTIES, YEARS = 60, 8
KINDS = ("both", "attention only", "operator only", "neither")


@claim(
    key="dfyp",
    says="Spectral channel attention and adaptive edge operators in front of a convolutional network predict crop "
    "yields better than the network alone.",
    source="arXiv 2507.05849, abstract and ablation",
    experiment="Generated histograms of 9 bands, 32 dates and 32 bins: the yield is the height of a season seen "
    "through 9 noisy bands, plus a yearly trend; 8 years of 60 counties for training, 120 counties of the next year "
    "for testing. Maximum attention and the learned operator blended in (ω learned), three convolution blocks (24, "
    "32, 48), linear; with both, with one of them, with neither. Effect: how much smaller the error of the "
    "network with both is than with neither, in per cent of the latter, paired over seeds.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the four networks on the same counties; ridge regression on the bands' means stands beside them."""
    seeds, steps = (4, 240) if budget == "quick" else (10, 1000)
    errors: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "ridge on band means")}
    spread = []
    for seed in range(seeds):
        data = (*_counties(COUNTIES, range(YEARS), 2 * seed), *_counties(120, [YEARS], 2 * seed + 1))
        spread.append(float(data[3].std()))
        errors["ridge on band means"].append(_ridge(*data))
        for kind in KINDS:
            errors[kind].append(_train(kind, data, seed, steps))
            progress(f"seed {seed}: {kind} error {errors[kind][-1]:.3f}")
    gains = [100 * (1 - a / b) for a, b in zip(errors["both"], errors["neither"], strict=True)]
    effect, low, high = paired_interval(gains, [0.0] * seeds)
    means = {kind: sum(v) / len(v) for kind, v in errors.items()}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="% of the error",
        meaning="positive: attention and operator reduce the error of the network",
        measurements={
            "rmse": means,
            "per_seed": errors,
            "standard_deviation_of_the_target": sum(spread) / len(spread),
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "The interval is Student's over seeds, paired.",
            "The branch with the vision transformer is not part of it. Ridge regression knows that means over bins "
            "suffice, which is how the data were made.",
        ],
    )


def _counties(count: int, years: Any, seed: int) -> tuple[Any, Any]:
    """Histograms (count · years, 9, 32, 32), each with sum 1, and yields."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    bands = torch.Generator().manual_seed(99)  # how a band answers to the canopy is the same everywhere
    gain = 0.1 + 0.5 * torch.rand(BANDS, 1, generator=bands)
    sign = torch.where(torch.rand(BANDS, 1, generator=bands) < 0.5, -1.0, 1.0)
    date, place = torch.arange(DATES).float(), torch.arange(BINS).float() / BINS
    x, y = [], []
    for year in years:
        height = 1 + 0.25 * torch.randn(count, generator=generator)
        peak = 16 + 2 * torch.randn(count, 1, generator=generator)
        season = height[:, None] * torch.exp(-0.5 * ((date - peak) / 5).square())
        middle = 0.5 + sign * gain * 0.5 * (season[:, None] - 0.5)
        middle = middle + 0.03 * torch.randn(middle.shape, generator=generator)
        pixels = torch.exp(-0.5 * ((place - middle[..., None]) / 0.06).square())
        pixels = pixels * (1 + 0.2 * torch.randn(pixels.shape, generator=generator)).clamp(min=0)
        x.append(pixels / pixels.sum(3, keepdim=True).clamp(min=1e-6))
        y.append(40 + 30 * (height - 1) + 0.5 * year + torch.randn(count, generator=generator))
    return torch.cat(x), torch.cat(y)


def _ridge(x: Any, y: Any, x_test: Any, y_test: Any) -> float:
    """Root mean squared error of ridge regression on the mean bin of every band and date."""
    import torch
    from sklearn.linear_model import RidgeCV

    place = torch.arange(BINS).float() / BINS
    means, means_test = ((d * place).sum(3).flatten(1).numpy() for d in (x, x_test))
    model = RidgeCV(alphas=[0.01, 0.1, 1, 10, 100]).fit(means, y.numpy())
    return float(((model.predict(means_test) - y_test.numpy()) ** 2).mean() ** 0.5)


def _network(kind: str) -> Any:
    """Attention, operator, three convolution blocks, mean, linear."""
    from torch import nn

    from torchconv.ops.dfyp import OperatorBlend, ResolutionAttention
    from torchconv.ops.dfyp_yield import ConvBlock

    front: list[nn.Module] = []
    if kind in ("both", "attention only"):
        front.append(ResolutionAttention(BANDS, 4, "max"))
    if kind in ("both", "operator only"):
        front.append(OperatorBlend())
    sizes = ((BANDS, 24), (24, 32), (32, 48))
    blocks = [ConvBlock(a, b, stride=2, dropout=0.0) for a, b in sizes]
    return nn.Sequential(*front, *blocks, nn.Flatten(), nn.Linear(48 * 16, 1))


def _train(kind: str, data: tuple[Any, ...], seed: int, steps: int) -> float:
    """AdamW with a cosine to zero on squared errors of standardised yields; the error on the test year."""
    import torch

    x, y, x_test, y_test = data
    mean, centre, scale = x.mean((0, 2, 3), keepdim=True), y.mean(), y.std()
    spread = x.std()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(kind)
    batch = random_batches((x - mean) / spread, (y - centre) / scale, 32, seed)

    def loss() -> Any:
        counties, yields = batch()
        return (model(counties)[:, 0] - yields).square().mean()

    train(model, loss, steps=steps, lr=3e-3)
    with torch.no_grad():
        prediction = model((x_test - mean) / spread)[:, 0] * scale + centre
    return float((prediction - y_test).square().mean().sqrt())
