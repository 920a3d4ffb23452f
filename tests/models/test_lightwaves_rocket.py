"""ROCKET and MiniROCKET against loops over kernels, and what they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchconv.models.sequence.lightwaves_rocket import MINIROCKET, ROCKET, MiniRocket, Rocket, _dilations


def series(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(layer: torch.nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_buffers())


@pytest.mark.parametrize("normalise", [False, True])
def test_rocket_equals_loops(normalise: bool) -> None:
    x, layer = series(3, 4, 40), Rocket.draw(25, 4, 40, seed=1, normalise=normalise).double()
    found = layer(x)
    p = {name: value.numpy() for name, value in parameters(layer).items()}
    data = x.numpy()
    if normalise:
        data = (data - data.mean(-1, keepdims=True)) / (data.std(-1, keepdims=True) + 1e-8)
    a = b = 0
    for n in range(25):
        length, dilation, padding, count = (
            int(p[k][n]) for k in ("lengths", "dilations", "paddings", "num_channel_indices")
        )
        weights = p["weights"][a : a + count * length].reshape(count, length)
        padded = np.pad(data, ((0, 0), (0, 0), (padding, padding)))
        steps = padded.shape[2] - (length - 1) * dilation
        z = np.full((3, steps), p["biases"][n])
        for row, channel in enumerate(p["channel_indices"][b : b + count]):
            for i in range(length):
                z += weights[row, i] * padded[:, channel, i * dilation : i * dilation + steps]
        np.testing.assert_allclose(found[:, 2 * n], (z > 0).mean(1))
        np.testing.assert_allclose(found[:, 2 * n + 1], z.max(1))
        a, b = a + count * length, b + count
    assert (a, b) == (len(p["weights"]), len(p["channel_indices"]))


def test_rocket_draws_what_it_should() -> None:
    layer = Rocket.draw(300, 5, 60, seed=0)
    p = parameters(layer)
    assert set(p) == set(ROCKET)
    assert set(p["lengths"].tolist()) == {7, 9, 11}
    assert int(p["num_channel_indices"].min()) == 1
    assert int(p["num_channel_indices"].max()) <= 5
    assert bool((p["biases"].abs() <= 1).all())
    reach = (p["lengths"] - 1) * p["dilations"]
    assert bool((reach <= 59).all())
    padded = p["paddings"] > 0
    assert torch.equal(p["paddings"][padded], (reach // 2)[padded])
    assert 100 < int(padded.sum()) < 200
    first = p["weights"][: int(p["num_channel_indices"][0] * p["lengths"][0])].view(-1, int(p["lengths"][0]))
    assert first.mean(1).abs().max() < 1e-6
    again, other = Rocket.draw(300, 5, 60, seed=0), Rocket.draw(300, 5, 60, seed=1)
    assert torch.equal(parameters(again)["weights"], p["weights"])
    assert not torch.equal(parameters(other)["lengths"], p["lengths"])
    short = Rocket.draw(20, 1, 4)
    assert torch.isfinite(short(torch.randn(2, 1, 4))).all()


@pytest.mark.parametrize("channels", [1, 12])
def test_minirocket_equals_loops(channels: int) -> None:
    x = series(4, channels, 50)
    layer = MiniRocket.draw(x, 84 * 5, seed=2)
    found = layer(x)
    p = {name: value.numpy() for name, value in parameters(layer).items()}
    twos = [(a, b, c) for a in range(9) for b in range(a + 1, 9) for c in range(b + 1, 9)]
    at = place = 0
    for n, dilation in enumerate(p["dilations"]):
        number = int(p["num_features_per_dilation"][n])
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (4 * dilation, 4 * dilation)))
        for kernel, members in enumerate(twos):
            count = int(p["num_channels_per_combination"][84 * n + kernel])
            chosen = p["channel_indices"][at : at + count]
            assert len(set(chosen)) == count <= min(channels, 9)
            z = sum(
                (2 if i in members else -1) * padded[:, chosen, i * dilation : i * dilation + 50].sum(1)
                for i in range(9)
            )
            if (n + kernel) % 2:
                z = z[:, 4 * dilation : 50 - 4 * dilation]
            for _ in range(number):
                np.testing.assert_allclose(found[:, place], (z > p["biases"][place]).mean(1))
                place += 1
            at += count
    assert (at, place) == (len(p["channel_indices"]), found.shape[1])


def test_minirocket_biases_are_quantiles() -> None:
    x = series(1, 1, 64)
    layer = MiniRocket.draw(x, 84 * 40)
    shares = layer(x)
    assert 0.4 < float(shares.mean()) < 0.6
    low = {name: value.clone() for name, value in parameters(layer).items()}
    low["biases"].fill_(-1e9)
    assert torch.equal(MiniRocket(low)(x), torch.ones_like(shares))


def test_minirocket_dilations_share_the_features() -> None:
    assert _dilations(1000, 119, 32)[0][0] == 1
    for length, features in ((9, 3), (50, 4), (1000, 119)):
        steps = _dilations(length, features, 32)
        assert sum(n for _, n in steps) == features
        assert max(d for d, _ in steps) <= (length - 1) / 8
        assert len({d for d, _ in steps}) == len(steps) <= 32


def test_refusals() -> None:
    rocket, mini = Rocket.draw(5, 3, 30), MiniRocket.draw(series(2, 3, 30), 84)
    for layer in (rocket, mini):
        with pytest.raises(ValueError, match="C >= "):
            layer(torch.zeros(2, 0, 30))
    with pytest.raises(ValueError, match="too short"):
        Rocket({**parameters(rocket), "paddings": [0] * 5}, normalise=False)(torch.zeros(1, 3, 6))
    with pytest.raises(ValueError, match="need more than"):
        mini(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="T >= 9"):
        MiniRocket.draw(series(2, 3, 8))
    with pytest.raises(ValueError, match="lacks weights"):
        Rocket({n: v for n, v in parameters(rocket).items() if n != "weights"})
    with pytest.raises(ValueError, match="not as many"):
        Rocket({**parameters(rocket), "weights": torch.zeros(3)})
    with pytest.raises(ValueError, match="not as many"):
        MiniRocket({**parameters(mini), "biases": torch.zeros(3)})
    assert set(parameters(mini)) == set(MINIROCKET)
