"""Run by ``test_depthwise_triton.py`` in a process of its own with ``TRITON_INTERPRET=1``: kernels against PyTorch."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from torchconv.kernels import depthwise_conv1d, depthwise_conv2d, depthwise_conv3d, inception_conv

CONV = (None, F.conv1d, F.conv2d, F.conv3d)
OURS = (None, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}
# x without batch and channels, kernel, stride, padding, dilation
CASES = [
    ((40,), (31,), (1,), (15,), (1,)),
    ((23,), (4,), (3,), (2,), (2,)),
    ((16, 16), (13, 13), (1, 1), (6, 6), (1, 1)),
    ((9, 35), (3, 30), (1, 1), (1, 15), (1, 1)),
    ((7, 11), (2, 5), (2, 3), (0, 4), (3, 1)),
    ((6, 5), (6, 5), (1, 1), (0, 0), (1, 1)),
    ((3, 4, 9), (2, 3, 4), (1, 2, 1), (1, 1, 3), (2, 1, 2)),
]
LAYERS = [
    ((5, 6), ((3, 3), (1, 5), (5, 1)), 1, False),
    ((5, 4), ((2, 4), (1, 3)), 2, True),
    ((12,), ((3,), (8,)), 1, False),
    ((2, 3, 4), ((3, 1, 2), (1, 1, 3)), 1, True),
]


def compare(got, expected, dtype, label):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape, label
        assert a.dtype == dtype, label
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1.0, b.abs().max().item()), label


def gradients(function, inputs):
    out = function(*inputs)
    g = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, g)


def made(shapes, dtype, last=False):
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if last:
        tensors[0] = tensors[0].contiguous(memory_format=FORMAT[tensors[0].dim()])
    return tensors, [t.double().requires_grad_() for t in tensors], [t.requires_grad_() for t in tensors]


def depthwise():
    rng = random.Random(0)
    for number, (size, kernel, stride, padding, dilation) in enumerate(CASES):
        dtype = list(TOLERANCE)[number % 3]
        ndim, c = len(size), rng.randint(1, 3)
        shapes = ((rng.randint(1, 2), c, *size), (c, 1, *kernel), (c,))
        _, exact, inputs = made(shapes, dtype, last=ndim > 1 and number % 2 == 1)
        sizes = (stride, padding, dilation)
        got = gradients(lambda *a: OURS[ndim](*a, *sizes, backend="triton"), inputs)  # noqa: B023
        compare(got, gradients(lambda *a: CONV[ndim](*a, *sizes, c), exact), dtype, (size, kernel, dtype))  # noqa: B023
        assert got[0].is_contiguous(memory_format=FORMAT[ndim + 2]) if inputs[0].stride(1) == 1 and c > 1 else True


def blocks_of_channels():
    """More matrices than are made at one time."""
    from torchconv.kernels import _depthwise_triton

    before, _depthwise_triton._BANDS = _depthwise_triton._BANDS, 3000
    _, exact, inputs = made(((1, 3, 4, 6), (3, 1, 3, 3)), torch.float32)
    got = gradients(lambda *a: depthwise_conv2d(*a, padding=1, backend="triton"), inputs)
    compare(got, gradients(lambda *a: F.conv2d(*a, padding=1, groups=3), exact), torch.float32, "blocks")
    _depthwise_triton._BANDS = before


def no_wrong_layout():
    """Views of any strides, an empty batch, the same bits twice, one channel of channels-last."""
    x = torch.randn(5, 6, 2, 2).permute(2, 3, 1, 0)[:, :, ::2]
    w = torch.randn(2, 1, 3, 3).transpose(2, 3)
    runs = [depthwise_conv2d(x, w, padding=1, backend="triton") for _ in range(2)]
    compare(runs[:1], [F.conv2d(x.double(), w.double(), padding=1, groups=2)], torch.float32, "views")
    assert torch.equal(*runs)
    assert depthwise_conv2d(x[:0], w, padding=1, backend="triton").shape == (0, 2, 3, 5)


def inception():
    for number, (size, kernels, dilation, last) in enumerate(LAYERS):
        dtype = list(TOLERANCE)[number % 3]
        shapes = [(2, 1 + len(kernels), *size), *((1, 1, *k) for k in kernels), *((1,) for _ in kernels)]
        _, exact, inputs = made(shapes, dtype, last)
        count = len(kernels)

        def layer(x, *rest, backend):
            return inception_conv(x, rest[:count], rest[count:], dilation, backend=backend)  # noqa: B023

        got = gradients(lambda *a: layer(*a, backend="triton"), inputs)
        expected = gradients(lambda *a: layer(*a, backend="native"), exact)
        compare(got, expected, dtype, (size, kernels, dtype))
        assert torch.equal(got[0][:, 0], inputs[0][:, 0])
        assert got[0].stride() == inputs[0].stride()


def inception_operators():
    """What PyTorch asks of an operator, and gradients of gradients."""
    from torchconv.kernels import inception as module

    x, taps, bias = torch.randn(1, 2, 3, 2), torch.randn(3), torch.randn(1)
    inputs = [t.requires_grad_() for t in (x, taps, bias)]
    sizes = [1], [1, 3], [1, 1]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._LAYER, (*inputs, *sizes), test_utils=checks)

    def penalty(backend, x, w):
        (dx,) = torch.autograd.grad(inception_conv(x, [w], backend=backend).square().sum(), x, create_graph=True)
        (dw,) = torch.autograd.grad(inception_conv(x, [w], backend=backend).square().sum(), w, create_graph=True)
        return torch.autograd.grad(dx.square().sum() + (dw * dw.sin()).sum(), (x, w))

    w = taps.detach().reshape(1, 1, 1, 3).requires_grad_()
    got = penalty("triton", x, w)
    compare(got, penalty("native", x.detach().double().requires_grad_(), w.detach().double().requires_grad_()), torch.float32, "twice")  # fmt: skip # noqa: E501


if __name__ == "__main__":
    torch.set_num_threads(1)
    for test in (depthwise, blocks_of_channels, no_wrong_layout, inception, inception_operators):
        torch.manual_seed(0)
        test()
        print(test.__name__)
