"""Every registered operator answers the same questions; registering it is enough to be asked.

Sizes are small (8 channels, 13 × 11 maps). What ``supports`` lists must work; what it does not list must raise a
``ValueError`` that names the argument.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.harness import copies, randomise
from torchconv.catalog import Part, load, operators
from torchconv.ops.roles import as_conv, as_mixer, channel_multiple

SPATIAL = {1: (13,), 2: (13, 11), 3: (7, 6, 5)}
ALL = [(p, n) for p in operators().values() for n in p.dims]
IDS = [f"{p.name}-{n}d" for p, n in ALL]
every = pytest.mark.parametrize(("announced", "ndim"), ALL, ids=IDS)
planar = pytest.mark.parametrize(
    ("announced", "ndim"), [(p, n) for p, n in ALL if n == max((m for m in p.dims if m <= 2), default=3)]
)


def channels_of(announced: Part, ndim: int) -> int:
    multiple = channel_multiple(announced.name, ndim)
    return multiple * math.ceil(8 / multiple)


def build(announced: Part, ndim: int, **options: Any) -> nn.Module:
    channels = channels_of(announced, ndim)
    settings = {"padding": "same", **options}
    torch.manual_seed(0)
    return load(announced, ndim)(channels, settings.pop("out_channels", channels), **settings)


def sample(announced: Part, ndim: int, batch: int = 2, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels_of(announced, ndim), *SPATIAL[ndim], generator=generator, **options)


@contextlib.contextmanager
def refusing(argument: str) -> Iterator[None]:
    """Either it works or the refusal names the argument (small odd sizes are not in every operator's table)."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(argument):
            raise


@every
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_stride(announced: Part, ndim: int, stride: int) -> None:
    if stride > 1 and "stride" not in announced.supports:
        with pytest.raises(ValueError, match="stride"):
            build(announced, ndim, stride=stride)
        return
    x = sample(announced, ndim)
    expected = [math.ceil(n / stride) for n in SPATIAL[ndim]]
    assert list(build(announced, ndim, stride=stride)(x).shape[2:]) == expected


@every
@pytest.mark.parametrize("dilation", [2, 3])
def test_dilation(announced: Part, ndim: int, dilation: int) -> None:
    if "dilation" not in announced.supports:
        with pytest.raises(ValueError, match="dilation"):
            build(announced, ndim, dilation=dilation)
        return
    x = sample(announced, ndim)
    assert build(announced, ndim, dilation=dilation)(x).shape == x.shape


@every
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 7])
def test_kernel_size(announced: Part, ndim: int, kernel_size: int) -> None:
    x = sample(announced, ndim)
    even = kernel_size % 2 == 0
    if even and "even" not in announced.supports:
        with pytest.raises(ValueError, match="kernel_size"):
            build(announced, ndim, kernel_size=kernel_size)
        return
    with contextlib.nullcontext() if even or kernel_size >= 7 else refusing("kernel_size"):
        assert build(announced, ndim, kernel_size=kernel_size)(x).shape == x.shape


@every
@pytest.mark.parametrize("groups", [2, 4])
def test_groups(announced: Part, ndim: int, groups: int) -> None:
    if "groups" not in announced.supports:
        with pytest.raises(ValueError, match="groups"):
            build(announced, ndim, groups=groups)
        return
    x = sample(announced, ndim)
    module = build(announced, ndim, groups=groups)
    assert module(x).shape == x.shape


@every
def test_output_channels(announced: Part, ndim: int) -> None:
    channels = channels_of(announced, ndim)
    if "channels" not in announced.supports:
        with pytest.raises(ValueError, match="out_channels"):
            build(announced, ndim, out_channels=2 * channels)
        return
    assert build(announced, ndim, out_channels=2 * channels)(sample(announced, ndim)).shape[1] == 2 * channels


@every
def test_padding(announced: Part, ndim: int) -> None:
    if "padding" not in announced.supports:
        for padding in ("valid", 0):
            with pytest.raises(ValueError, match="padding"):
                build(announced, ndim, kernel_size=7, padding=padding)
        return
    x = sample(announced, ndim)
    valid = build(announced, ndim, kernel_size=3, dilation=1, padding="valid")(x)
    assert list(valid.shape[2:]) == [n - 2 for n in SPATIAL[ndim]]
    assert torch.equal(valid, build(announced, ndim, kernel_size=3, dilation=1, padding=0)(x))


@every
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kernel_size", 0),
        ("kernel_size", (3,) * 4),
        ("stride", 0),
        ("dilation", -1),
        ("padding", "some"),
        ("groups", 3),
    ],
)
def test_bad_arguments_are_named(announced: Part, ndim: int, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        build(announced, ndim, **{argument: value})


@every
def test_bad_channels_are_named(announced: Part, ndim: int) -> None:
    with pytest.raises(ValueError, match="in_channels"):
        load(announced, ndim)(0, 0)


@every
def test_bad_input_is_refused(announced: Part, ndim: int) -> None:
    module = build(announced, ndim)
    for shape in ((2, channels_of(announced, ndim) + 1, *SPATIAL[ndim]), (4,) * (ndim + 3)):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(str(tuple(shape)).strip("()"))):
            module(torch.zeros(shape))


@every
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(announced: Part, ndim: int, batch: int) -> None:
    module = build(announced, ndim).eval()
    x = sample(announced, ndim, batch=batch)
    assert module(x).shape == x.shape


@planar
def test_batch_items_are_independent_in_eval(announced: Part, ndim: int) -> None:
    module = randomise(build(announced, ndim)).eval()
    x = sample(announced, ndim, batch=3)
    assert torch.allclose(module(x)[1:2], module(x[1:2]), atol=1e-5)


@planar
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(announced: Part, ndim: int, bias: bool) -> None:
    small = {1: (7,), 2: (5, 4), 3: (3, 4, 3)}[ndim]
    module = randomise(build(announced, ndim, bias=bias)).double().eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    x = torch.randn(1, channels_of(announced, ndim), *small, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = module(x)
        return y

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-6)


@planar
def test_every_parameter_gets_a_gradient(announced: Part, ndim: int) -> None:
    module = randomise(build(announced, ndim)).train()
    module(sample(announced, ndim)).square().sum().backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


@planar
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(announced: Part, ndim: int, dtype: torch.dtype) -> None:
    module = randomise(build(announced, ndim)).eval()
    x = sample(announced, ndim)
    expected = module(x)
    y = module.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    # 8 (11) bits a number; a few roundings in a row.
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.12}[dtype]
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()


@planar
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(announced: Part, ndim: int, dtype: torch.dtype) -> None:
    module = randomise(build(announced, ndim)).train()
    x = sample(announced, ndim)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
    y.float().sum().backward()
    assert torch.isfinite(y).all()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


@pytest.mark.parametrize("announced", [p for p in operators().values() if 2 in p.dims], ids=lambda p: p.name)
def test_channels_last_is_kept(announced: Part) -> None:
    module = randomise(build(announced, 2)).eval()
    x = sample(announced, 2)
    y = module(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, module(x), atol=1e-5)


@planar
def test_non_contiguous_input(announced: Part, ndim: int) -> None:
    module = randomise(build(announced, ndim)).eval()
    x = sample(announced, ndim)
    spread = torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    spread.copy_(x)
    assert torch.allclose(module(spread), module(x), atol=1e-6)


@planar
def test_compile_without_graph_breaks(announced: Part, ndim: int) -> None:
    module = randomise(build(announced, ndim)).train()
    x = sample(announced, ndim)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), module(x)
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()


@planar
def test_export(announced: Part, ndim: int) -> None:
    module = randomise(build(announced, ndim)).eval()
    x = sample(announced, ndim)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    other = sample(announced, ndim, batch=5)
    assert torch.allclose(program.module()(other), module(other), atol=1e-5)


@planar
def test_copies(announced: Part, ndim: int) -> None:
    module = randomise(build(announced, ndim)).eval()
    x = sample(announced, ndim)
    expected = module(x)
    for twin in copies(module, build(announced, ndim)):
        assert torch.equal(twin(x), expected)


@planar
def test_determinism_and_global_state(announced: Part, ndim: int) -> None:
    first, second = build(announced, ndim), build(announced, ndim)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    x = sample(announced, ndim)
    before = torch.get_rng_state()
    assert torch.equal(first.eval()(x), first.eval()(x))
    assert torch.equal(before, torch.get_rng_state()), "forward must not draw random numbers"


@every
@pytest.mark.parametrize("bias", [True, False])
def test_merge_is_exact(announced: Part, ndim: int, bias: bool) -> None:
    module = randomise(build(announced, ndim, bias=bias)).eval()
    if not announced.merges:
        assert not hasattr(module, "merge"), "declare what merge() returns"
        return
    x = sample(announced, ndim)
    expected = module(x)
    merged = module.merge()
    if announced.merges == "conv":
        assert type(merged) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    assert (merged(x) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    owned = {p.data_ptr() for p in module.parameters()}
    assert not any(p.data_ptr() in owned for p in merged.parameters()), "merged weights are copies"


@every
def test_merge_with_stride(announced: Part, ndim: int) -> None:
    if not announced.merges or "stride" not in announced.supports:
        return
    sizes = [3, 4] if "even" in announced.supports else [3]
    for kernel_size in sizes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = randomise(build(announced, ndim, kernel_size=kernel_size, stride=2)).eval()
            x = sample(announced, ndim)
            assert torch.allclose(module.merge()(x), module(x), atol=1e-5)


@every
def test_roles(announced: Part, ndim: int) -> None:
    channels = channels_of(announced, ndim)
    x = sample(announced, ndim)
    assert as_mixer(announced.name, channels, ndim)(x).shape == x.shape
    y = as_conv(announced.name, channels, 2 * channels, 3, stride=2, ndim=ndim)(x)
    assert list(y.shape[1:]) == [2 * channels, *(math.ceil(n / 2) for n in SPATIAL[ndim])]


@every
def test_training_needs_are_well_formed(announced: Part, ndim: int) -> None:
    module = build(announced, ndim)
    for part in module.modules():
        if hasattr(part, "param_options"):
            names = {n for n, _ in part.named_parameters(recurse=False)}
            for name, needs in part.param_options().items():
                assert name in names
                assert set(needs) <= {"lr_mult", "weight_decay"}
        if hasattr(part, "after_step"):
            part.after_step()
    assert torch.isfinite(module(sample(announced, ndim))).all()


def test_documentation_of_every_operator() -> None:
    for announced in operators().values():
        code = load(announced)
        assert announced.summary.endswith(".") or len(announced.summary) > 20, announced.name
        assert code.__doc__, announced.name
