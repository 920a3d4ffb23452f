"""Noise and blur against scipy and against what they must do to a known classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, special

from torchconv.analysis.robustness import accuracy_under_blur, accuracy_under_noise, add_noise, blur, robustness


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 17, 12), (1, 2, 6, 7, 8)])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3])
def test_blur_equals_scipy(shape, sigma):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = int(np.ceil(3 * sigma))
    expected = x.numpy()
    for axis in range(2, x.dim()):
        expected = ndimage.gaussian_filter1d(expected, sigma, axis=axis, mode="nearest", radius=radius)
    torch.testing.assert_close(blur(x, sigma), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_blur_keeps_constants_and_channels_apart():
    assert blur(torch.full((1, 1, 4, 4), 3.0), 5.0).allclose(torch.tensor(3.0))
    x = torch.zeros(1, 2, 9, 9)
    x[0, 0, 4, 4] = 1
    y = blur(x, 1.0)
    assert y[0, 1].abs().max() == 0
    assert y[0, 0].sum() == pytest.approx(1, abs=1e-6)
    assert blur(x, 0.0) is x


def test_noise_has_the_stated_size_per_channel():
    x = torch.zeros(2000, 2, 50)
    noise = add_noise(x, 0.5, [1.0, 4.0], generator=torch.Generator().manual_seed(0))
    assert noise[:, 0].std() == pytest.approx(0.5, rel=0.02)
    assert noise[:, 1].std() == pytest.approx(2.0, rel=0.02)


def test_noise_curve_of_a_threshold_is_the_normal_one():
    # x = ±1 is told by its sign; noise of s standard deviations (std is 1) flips it with probability Phi(-1/s).
    y = torch.arange(20000) % 2
    x = (2.0 * y - 1).reshape(-1, 1, 1)
    levels = [0.0, 0.5, 1.0, 2.0]
    got = accuracy_under_noise(lambda x: (x[:, 0, 0] > 0).long(), x, y, levels=levels, seed=1)
    assert got[0] == 1.0
    for level, accuracy in zip(levels[1:], got[1:], strict=True):
        assert accuracy == pytest.approx(float(special.ndtr(1 / level)), abs=0.01)


def test_seeded_and_independent_of_the_global_generator():
    x, y = torch.rand(1500, 1, 8, 8), torch.randint(0, 2, (1500,))
    seen: list[torch.Tensor] = []

    def predict(part):
        seen.append(part)
        return torch.stack([part.mean((1, 2, 3)), torch.full((len(part),), 0.5)], 1)

    state = torch.random.get_rng_state()
    first = robustness(predict, x, y, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    earlier, seen = seen, []
    assert robustness(predict, x, y, seed=3) == first
    assert all(torch.equal(a, b) for a, b in zip(earlier, seen, strict=True))
    seen = []
    robustness(predict, x, y, seed=4, noise_levels=[0.4], blur_levels=[])
    assert not torch.equal(seen[0], earlier[2 * 3])  # two pieces a level; 0.4 is the fourth level
    assert first["noise"]["levels"][0] == 0.0
    assert len(first["blur"]["accuracy"]) == len(first["blur"]["levels"])


def test_levels_share_one_draw():
    x, y, seen = torch.zeros(5, 1, 6), torch.zeros(5, dtype=torch.long), []
    accuracy_under_noise(lambda p: seen.append(p) or torch.zeros(len(p)), x, y, levels=[1.0, 2.0], std=1.0)
    torch.testing.assert_close(seen[1], 2 * seen[0])


def test_bytes_are_scaled_and_levels_are_in_units_of_their_std():
    x = torch.randint(0, 256, (64, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y, seen = torch.zeros(64, dtype=torch.long), []
    accuracy_under_noise(lambda p: seen.append(p) or torch.zeros(len(p)), x, y, levels=[0.0, 1.0])
    torch.testing.assert_close(seen[0], x.float() / 255)
    added = (seen[1] - seen[0]).std((0, 2, 3)) / (x.float() / 255).std((0, 2, 3))
    assert added.tolist() == pytest.approx([1, 1, 1], rel=0.1)


def test_blur_takes_away_fine_detail_only():
    fine = torch.tensor([1.0, -1.0]).repeat(16)  # alternating against constant
    x = torch.stack([fine, torch.ones(32)])[:, None]
    y = torch.tensor([0, 1])
    predict = lambda p: (p.std(2)[:, 0] < 0.5).long()  # noqa: E731
    assert accuracy_under_blur(predict, x, y, levels=[0.0, 2.0]) == [1.0, 0.5]


def test_bad_arguments():
    x, y = torch.zeros(4, 1, 5), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="sigma"):
        blur(x, -1.0)
    with pytest.raises(ValueError, match="x="):
        blur(torch.zeros(4, 5), 1.0)
    with pytest.raises(ValueError, match="y="):
        accuracy_under_noise(lambda p: p, x, y[:3])
    with pytest.raises(ValueError, match="levels"):
        accuracy_under_noise(lambda p: p, x, y, levels=[0.1, -0.1])
    with pytest.raises(ValueError, match="std"):
        accuracy_under_noise(lambda p: p, x, y, std=[1.0, 2.0])
    with pytest.raises(ValueError, match="predict"):
        accuracy_under_blur(lambda p: p, x, y)
    with pytest.raises(ValueError, match="at least one item"):
        accuracy_under_blur(lambda p: p, x[:0], y[:0])
