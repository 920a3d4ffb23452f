"""Roll-outs: what a network is told about the time, which stage makes a step, memory, training on several steps."""

from __future__ import annotations

import copy
import weakref
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.models.forecast.puyun import PuYun
from torchconv.models.forecast.puyun_onnx import OnnxStage, load_cascade, save_stage
from torchconv.models.forecast.puyun_rollout import Cascade, rollout, rollout_loss, time_encoding
from torchconv.training.weather import latitude_weights, weighted_l1


class Linear(nn.Module):
    """The next state from the two before and the time."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.5 * torch.randn(2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.weight[0] * x[:, 0] + self.weight[1] * x[:, 1] + time.mean(1)[:, None, None, None])


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestTime:
    @settings(max_examples=25, deadline=None)
    @given(
        st.datetimes(datetime(1950, 1, 1), datetime(2060, 1, 1)),
        st.integers(1, 5),
        st.sampled_from([0.5, 1, 3, 6, 12, 24, 72]),
        st.integers(1, 3),
        st.booleans(),
    )
    def test_is_the_definition(self, start: datetime, steps: int, hours: float, history: int, periodic: bool) -> None:
        y = time_encoding(start, steps, hours, history, periodic)
        factor = 2 * np.pi if periodic else 1
        for step in range(steps):
            expected = []
            for offset in range(step + 1 - history, step + 2):
                when = start + offset * timedelta(hours=hours)
                a, b = factor * when.timetuple().tm_yday / 366, factor * when.hour / 24
                expected += [np.sin(a), np.sin(b), np.cos(a), np.cos(b)]
            torch.testing.assert_close(y[step, 0], torch.tensor(np.array(expected)).float(), rtol=0, atol=2e-6)
        assert y.shape == (steps, 1, 4 * (history + 1))

    def test_several_forecasts_and_other_clocks(self) -> None:
        texts = ["2020-02-28T12:00", "2019-12-31T18:00"]
        both = time_encoding(texts, 6)
        assert both.shape == (6, 2, 12)
        assert torch.equal(both, torch.cat([time_encoding(t, 6) for t in texts], 1))
        assert torch.equal(both, time_encoding([np.datetime64(t) for t in texts], 6))
        east = datetime(2020, 2, 28, 14, tzinfo=timezone(timedelta(hours=2)))
        assert torch.equal(time_encoding(east, 6), both[:, :1])
        assert torch.equal(time_encoding("2020-02-28T12:00Z", 6), both[:, :1])

    def test_periodic_days_close(self) -> None:
        y = time_encoding("2021-01-01", 4, periodic=True)
        for hour in (1, 3):
            torch.testing.assert_close(y[0, 0, 4 + hour], y[3, 0, 8 + hour])
        assert (time_encoding("2021-01-01T18:00", 1) - time_encoding("2021-01-02T00:00", 1)).abs().max() > 0.2

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("yesterday", 2), "start='yesterday'"),
            ((np.datetime64("NaT"), 2), "is no time"),
            (("2020-01-01", 0), "steps=0"),
            (("2020-01-01", 2, 0), "hours=0"),
            (("2020-01-01", 2, 6, 0), "history=0"),
        ],
    )
    def test_bad_arguments(self, arguments: Any, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            time_encoding(*arguments)


class TestCascade:
    def test_stages_take_over_at_20_and_40(self) -> None:
        cascade = Cascade([Linear(i) for i in range(3)])
        assert list(cascade.stages) == ["short", "medium", "long"]
        assert [cascade.stage_index(s) for s in range(45)] == [min(2, s // 20) for s in range(45)]
        two = Cascade({"a": Linear(0), "b": Linear(1)}, 3)
        assert [two.stage_index(s) for s in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]

    def test_a_step_is_made_by_its_stage(self) -> None:
        cascade = Cascade({"a": Linear(0), "b": Linear(1)}, 3)
        x, times = states(1, 2, 3, 4, 5), states(5, 1, 12, seed=1)
        expected, history = [], list(x.unbind(1))
        for step in range(5):
            following = cascade.stages["a" if step < 3 else "b"](torch.stack(history[-2:], 1), times[step])
            assert torch.equal(cascade(torch.stack(history[-2:], 1), times[step], step), following)
            history.append(following)
            expected.append(following)
        assert all(torch.equal(a, b) for a, b in zip(rollout(cascade, x, times), expected, strict=True))

    def test_in_two_halves(self) -> None:
        cascade = Cascade([Linear(i) for i in range(3)], 2)
        x, times = states(2, 2, 3, 4, 5), states(8, 1, 12, seed=1)
        whole = list(rollout(cascade, x, times))
        half = list(rollout(cascade, x, times[:4]))
        rest = list(rollout(cascade, torch.stack(half[-2:], 1), times[4:], first=4))
        assert all(torch.equal(a, b) for a, b in zip(whole, half + rest, strict=True))

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Cascade([])
        with pytest.raises(ValueError, match="steps_per_stage=0"):
            Cascade([Linear()], 0)
        with pytest.raises(ValueError, match="mapping"):
            Cascade([Linear()] * 4)
        with pytest.raises(ValueError, match="step=-1"):
            Cascade([Linear()]).stage(-1)


class TestRollout:
    def test_holds_no_more_than_the_history(self) -> None:
        alive: list[weakref.ref[Tensor]] = []
        most = 0
        with torch.inference_mode():
            for state in rollout(Linear(), states(1, 2, 3, 4, 5), states(40, 1, 12)):
                alive.append(weakref.ref(state))
                del state
                most = max(most, sum(r() is not None for r in alive))
        assert len(alive) == 40
        assert most <= 3

    @pytest.mark.parametrize("history", [1, 2, 3])
    def test_any_history(self, history: int) -> None:
        x = states(2, history, 3, 4, 6)
        net = PuYun(3, dim=4, depth=1, patch=2, history=history, kernel_size=3, decomposition=1).double()
        torch.nn.init.normal_(net.head.weight)
        times = time_encoding("2020-05-05", 3, history=history).double()
        known = list(x.unbind(1))
        for state in rollout(net, x, times):
            known.append(net(torch.stack(known[-history:], 1), times[len(known) - history]))
            assert torch.equal(state, known[-1])

    def test_persistence_stays(self) -> None:
        x = states(1, 2, 3, 4, 6)
        net = PuYun(3, dim=4, depth=1, patch=2).double()
        assert all(torch.equal(s, x[:, 1]) for s in rollout(net, x, time_encoding("2020-05-05", 3).double()))

    def test_bad_arguments_are_refused_at_once(self) -> None:
        x, times = states(2, 2, 3, 4, 5), states(4, 1, 12)
        with pytest.raises(ValueError, match=r"x=\(2, 3, 4, 5\)"):
            rollout(Linear(), x[:, 0], times)
        with pytest.raises(ValueError, match=r"times=\(4, 3, 12\)"):
            rollout(Linear(), x, states(4, 3, 12))
        with pytest.raises(ValueError, match="first=-1"):
            rollout(Linear(), x, times, first=-1)
        with pytest.raises(ValueError, match="next state"):
            next(rollout(lambda x, time: x, x, times))


class TestLoss:
    @pytest.mark.parametrize("checkpoint", [False, True])
    @pytest.mark.parametrize("start", [0, 2])
    def test_equals_the_loop(self, checkpoint: bool, start: int) -> None:
        model, other = Linear(0), Linear(1)
        x, targets, times = states(2, 2, 3, 4, 5), states(2, 4, 3, 4, 5, seed=1), states(start + 4, 2, 12, seed=2)
        loss = partial(weighted_l1, weights=latitude_weights([-60, -20, 20, 60]))
        options: dict[str, Any] = {"start_model": other if start else None, "start_steps": start}
        y = rollout_loss(model, x, targets, times, checkpoint=checkpoint, loss=loss, **options)
        history = list(x.unbind(1))
        for step in range(start):
            history.append(other(torch.stack(history[-2:], 1), times[step]).detach())
        terms = []
        for step in range(4):
            history.append(model(torch.stack(history[-2:], 1), times[start + step]))
            terms.append(loss(history[-1], targets[:, step]))
        expected = sum(terms) / 4
        torch.testing.assert_close(y, expected)
        (ours,), (theirs,) = (torch.autograd.grad(v, [model.weight]) for v in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert other.weight.grad is None

    def test_growing_steps(self) -> None:
        model, x, targets, times = Linear(), states(2, 2, 3, 4, 5), states(2, 4, 3, 4, 5), states(4, 1, 12)
        first = rollout_loss(model, x, targets, times, 1)
        torch.testing.assert_close(first, F.l1_loss(model(x, times[0]), targets[:, 0]))
        assert not torch.equal(first, rollout_loss(model, x, targets, times))

    def test_a_later_stage_learns_from_what_it_will_see(self) -> None:
        """The cascade's step numbers go on after the start, and only the later stage gets gradients."""
        cascade = Cascade([Linear(0), Linear(1)], 2)
        x, targets, times = states(1, 2, 3, 4, 5), states(1, 2, 3, 4, 5, seed=1), states(4, 1, 12)
        rollout_loss(cascade, x, targets, times, start_model=cascade, start_steps=2).backward()
        assert cascade.stages["short"].weight.grad is None
        assert cascade.stages["medium"].weight.grad is not None

    def test_bad_arguments(self) -> None:
        model, x, targets, times = Linear(), states(2, 2, 3, 4, 5), states(2, 4, 3, 4, 5), states(4, 1, 12)
        with pytest.raises(ValueError, match="start_steps=2: give the start_model"):
            rollout_loss(model, x, targets, times, start_steps=2)
        with pytest.raises(ValueError, match=r"targets=\(2, 4, 3, 4\)"):
            rollout_loss(model, x, targets[..., 0], times)
        with pytest.raises(ValueError, match="steps=5"):
            rollout_loss(model, x, targets, times, 5)
        with pytest.raises(ValueError, match="steps=0"):
            rollout_loss(model, x, targets, times, 0)
        with pytest.raises(ValueError, match="has 4 steps, 5 are made"):
            rollout_loss(model, x, targets, times, start_model=model, start_steps=1)


class TestOnnx:
    def test_files_make_a_cascade(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        torch.manual_seed(0)
        net = PuYun(3, dim=4, depth=1, patch=2, kernel_size=6, decomposition=2, padding_mode="sphere", winds=[1])
        torch.nn.init.normal_(net.head.weight, std=0.1)
        save_stage(net.train(), tmp_path / "short.onnx", 9, 8)
        assert net.training
        assert [f.name for f in tmp_path.iterdir()] == ["short.onnx"]
        (tmp_path / "meidum.onnx").write_bytes((tmp_path / "short.onnx").read_bytes())
        cascade = copy.deepcopy(load_cascade(tmp_path, 2, threads=1))
        assert list(cascade.stages) == ["short", "medium"]
        x, times = torch.randn(1, 2, 3, 9, 8), time_encoding("2020-01-01", 3)
        with torch.no_grad():
            expected = list(rollout(net.eval(), x, times))
        for ours, theirs in zip(rollout(cascade, x, times), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_missing_and_foreign_files(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        with pytest.raises(FileNotFoundError, match=r"has no short\.onnx"):
            load_cascade(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such file"):
            OnnxStage(tmp_path / "short.onnx")
        value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[1])
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [value("x")], [value("y")])
        opset = onnx.helper.make_opsetid("", 18)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "medium.onnx")
        with pytest.raises(FileNotFoundError, match=r"has medium\.onnx but no short\.onnx"):
            load_cascade(tmp_path)
        with pytest.raises(ValueError, match=r"takes \['x'\]"):
            OnnxStage(tmp_path / "medium.onnx")
