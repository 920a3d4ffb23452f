"""LightWaveS' claim: a few hundred selected features classify about as well as thousands of random ones."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim

MARGIN = 5.0
GENERATED = "generated"


@claim(
    key="lightwaves",
    says="With 500 selected wavelet-scattering features, 2.5 % of ROCKET's, LightWaveS classifies multivariate time "
    "series about as accurately as ROCKET, and reads fewer channels.",
    source="arXiv 2204.01379, abstract and the comparison of accuracies",
    experiment="Problems of the UCR and UEA archives that the data folder holds, with their own split (without the "
    "folder: generated ones); LightWaveS with its defaults against ROCKET with 2 000 kernels (4 000 features; 10 000 "
    "kernels at the full budget) and with as many features as LightWaveS, all with the same kind of ridge classifier. "
    f"Effect: difference of test accuracies, paired by problem. About as accurate: not {MARGIN:.0f} points worse.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Fit all of them on every problem."""
    from torchconv.claims._support import paired_interval
    from torchconv.models.sequence.lightwaves import LightWaveS

    kernels, seeds = (2000, 1) if budget == "quick" else (10_000, 3)
    rows: dict[str, dict[str, Any]] = {}
    for name, (x, y, x_test, y_test) in _problems(budget):
        model = LightWaveS().fit(x, y)
        rows[name] = {
            "LightWaveS": 100 * float(model.score(x_test, y_test)),
            "ROCKET": _rocket(x, y, x_test, y_test, kernels, seeds),
            "ROCKET, as many features": _rocket(x, y, x_test, y_test, max(1, model.mask_.sum() // 2), seeds),
            "train": len(x),
            "features": int(model.mask_.sum()),
            "kernel applications": len(model.rows_),
            "channels": f"{len(set(model.rows_[:, 0]))} of {x.shape[1]}",
        }
        shown = ", ".join(f"{k} {v:.1f} %" for k, v in rows[name].items() if isinstance(v, float))
        progress(f"{name}: {shown}")
    ours, rocket, equal = ([row[k] for row in rows.values()] for k in list(next(iter(rows.values())))[:3])
    effect, low, high = paired_interval(ours, rocket)
    gain, gain_low, gain_high = paired_interval(ours, equal)
    applications = sorted(row["kernel applications"] for row in rows.values())
    archive = GENERATED not in next(iter(rows))
    kind = "of the archives" if archive else "generated here, because no data folder was named with $TORCHCONV_DATA"
    notes = [_tally(rows, ours, rocket, f"{len(rows)} problems {kind}", kernels)]
    if archive:
        notes.append(
            "Most problems here have one channel; the paper's have up to 1345, where the number of channels read "
            "matters most."
        )
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of accuracy",
        meaning=f"LightWaveS less ROCKET; above −{MARGIN:.0f} is about as accurate",
        threshold=-MARGIN,
        measurements={"problems": rows, "rocket_kernels": kernels, "over_rocket_of_as_many_features": gain},
        notes=[
            *notes,
            f"In use: {applications[0]} to {applications[-1]} kernel applications (each of two layers, 1.5 times the "
            f"work of one) against {kernels}, and at most 500 features against {2 * kernels}.",
            f"Against ROCKET with as many features as LightWaveS, which nothing selects: {gain:+.1f} points "
            f"({gain_low:+.1f} to {gain_high:+.1f}).",
            "The interval is over problems. Nothing was timed.",
        ],
    )


def _tally(rows: Any, ours: list[float], rocket: list[float], what: str, kernels: int) -> str:
    """Wins, ties and losses, and the largest loss."""
    losses = {name: theirs - a for name, a, theirs in zip(rows, ours, rocket, strict=True)}
    worst = max(losses, key=lambda name: losses[name])
    ties, lost = sum(v == 0 for v in losses.values()), sum(v > 0 for v in losses.values())
    text = f"{what}: {len(losses) - ties - lost} won, {ties} tied, {lost} lost against ROCKET of {kernels} kernels"
    return f"{text}, {losses[worst]:.1f} points at most ({worst})." if lost else f"{text}."


def _problems(budget: str) -> Any:
    """Name, and training and test data."""
    import torch

    from torchconv.data import load
    from torchconv.data.named import places
    from torchconv.data.ts import problems

    found = sorted(problems(places(None)))
    for name in found:
        try:
            data = load(name)
        except ValueError:  # a regression problem
            continue
        x, y = torch.cat([data.train.x, data.val.x]), torch.cat([data.train.y, data.val.y])
        yield name, (x.numpy(), y.numpy(), data.test.x.numpy(), data.test.y.numpy())
    if not found:
        for seed in range(4 if budget == "quick" else 12):
            yield f"{GENERATED} {seed}", (*_generated(120, seed), *_generated(200, seed + 1000))


def _generated(count: int, seed: int) -> tuple[Any, Any]:
    """Six channels of random walks; four classes, by the rate of a weak wave in channel 1 and a bump in channel 4."""
    import numpy as np

    rng = np.random.default_rng(seed)
    y = np.arange(count) % 4
    t = np.arange(128)
    x = rng.normal(size=(count, 6, 128)).cumsum(-1) * 0.3
    x[:, 1] += 0.8 * np.sin(t * (0.25 + 0.12 * y[:, None]) + rng.uniform(0, 6, (count, 1)))
    x[:, 4] += (y % 2)[:, None] * np.exp(-(((t - rng.uniform(30, 98, (count, 1))) / 4) ** 2)) * 3
    return x.astype(np.float32), y


def _rocket(x: Any, y: Any, x_test: Any, y_test: Any, kernels: int, seeds: int) -> float:
    """Accuracy in percent with a ridge classifier on ROCKET's features, the mean over seeds."""
    import numpy as np
    import torch
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from torchconv.models.sequence.lightwaves_rocket import Rocket

    scores = []
    for seed in range(seeds):
        layer = Rocket.draw(int(kernels), x.shape[1], x.shape[2], seed=seed)
        with torch.no_grad():
            parts = [[layer(b) for b in torch.from_numpy(v).split(32)] for v in (x, x_test)]
        train, test = (torch.cat(p).numpy() for p in parts)
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-3, 3, 10))).fit(train, y)
        scores.append(100 * float(model.score(test, y_test)))
    return sum(scores) / len(scores)
