"""Which form computes a depthwise convolution fastest: closed-form estimates fitted on measurements.

An estimate is a sum of terms, nanoseconds per call and per unit of work on one thread, with the work shared among
threads at the form's own efficiency. The numbers were fitted (non-negative least squares on relative errors) to a few
hundred random problems in one to three dimensions on a server processor with 512-bit vectors. Only their ratios
matter, so they carry over to machines of the kind.
"""

from __future__ import annotations

import math

from torchconv.kernels._depthwise_forms import Geometry, fft_blocks, fft_sizes, refused
from torchconv.kernels._depthwise_matrix import matmul_blocks

# Nanoseconds by kind of number, form ("y" the output, "x" and "w" their gradients) and unit of work: a call, a number
# moved in or out, a product of a direct convolution by its class, a point of a transform and of its log N passes, ...
TABLE: dict[str, dict[str, dict[str, float]]] = {
    "float32": {
        "y:native": {
            "call": 43500,
            "dilated": 0.0193,
            "long": 0.0317,
            "middle": 0.035,
            "moved": 0.242,
            "refused": 0.451,
            "rows": 0.272,
            "short": 0.0259,
            "upper": 0.0277,
            "upper_last": 0.0766,
            "volume": 0.455,
        },
        "y:padded": {
            "call": 60400,
            "dilated": 0.034,
            "long": 0.032,
            "middle": 0.0456,
            "moved": 0.378,
            "rows": 2.09,
            "short": 0.0312,
            "upper": 0.0388,
            "upper_last": 0.0766,
            "volume": 1,
        },
        "y:channels_last": {
            "call": 36900,
            "dilated": 0.0204,
            "long": 0.0337,
            "middle": 0.0395,
            "moved": 0.613,
            "moved_last": 0.011,
            "refused": 0.31,
            "short": 0.0272,
            "upper_last": 0.0766,
            "volume": 0.448,
        },
        "y:fft": {"block": 98600, "kernels": 3.11, "moved_last": 0.9, "passes": 0.33, "points": 1.56},
        "y:matmul": {
            "block": 53800,
            "channel": 360,
            "matrix": 0.378,
            "moved": 0.43,
            "moved_last": 1.3,
            "multiplied": 0.015,
        },
        "x:native": {
            "call": 62900,
            "dilated": 0.377,
            "long": 0.0378,
            "middle": 0.034,
            "moved": 0.3,
            "rows": 0.982,
            "short": 0.0312,
            "upper": 0.0391,
            "upper_last": 0.032,
            "volume": 0.383,
        },
        "x:flipped": {
            "call": 75500,
            "dilated": 0.0352,
            "long": 0.04,
            "middle": 0.0421,
            "moved": 0.253,
            "rows": 0.0503,
            "short": 0.0289,
            "upper": 0.0311,
            "upper_last": 0.0887,
            "volume": 0.51,
        },
        "x:channels_last": {
            "call": 63100,
            "long": 0.0351,
            "middle": 0.0447,
            "moved": 0.621,
            "moved_last": 0.00658,
            "refused": 0.047,
            "short": 0.0304,
            "upper_last": 0.0887,
        },
        "x:fft": {"block": 72400, "kernels": 3.08, "moved_last": 2.47, "passes": 0.282, "points": 1.89},
        "x:matmul": {
            "block": 46200,
            "call": 194,
            "channel": 523,
            "matrix": 0.369,
            "moved": 0.466,
            "moved_last": 1.3,
            "multiplied": 0.017,
        },
        "w:native": {"call": 58800, "moved": 0.31, "moved_last": 0.164, "volume": 0.334, "wide": 0.621},
        "w:correlate": {
            "call": 92000,
            "dilated": 0.0406,
            "long": 0.034,
            "maps": 10,
            "middle": 0.0497,
            "moved": 0.372,
            "moved_last": 1.09,
            "short": 0.0685,
            "upper": 0.0341,
            "volume": 0.834,
        },
        "w:correlate_last": {
            "call": 101000,
            "dilated": 0.0703,
            "long": 0.0447,
            "middle": 0.118,
            "moved": 0.448,
            "moved_last": 1.97,
            "short": 0.211,
            "upper": 0.0801,
            "volume": 0.806,
        },
        "w:fft": {"block": 107000, "kernels": 3.71, "moved_last": 2.21, "passes": 0.29, "points": 1.96},
        "w:matmul": {
            "block": 37300,
            "channel": 545,
            "matrix": 0.485,
            "moved": 0.322,
            "moved_last": 1.42,
            "multiplied": 0.0173,
        },
    },
    "float64": {
        "y:native": {"call": 305000, "direct": 0.523, "moved_last": 40.3, "rows": 57.9},
        "y:padded": {"call": 260000, "direct": 0.484, "moved": 0.169, "moved_last": 46.4, "rows": 43.4},
        "y:channels_last": {"direct": 5.73, "moved": 0.677, "moved_last": 6.87, "rows": 26.3},
        "y:fft": {"block": 53600, "kernels": 6.24, "moved_last": 3.08, "passes": 0.428, "points": 3.36},
        "y:matmul": {"call": 69500, "matrix": 0.74, "moved": 0.18, "moved_last": 1.31, "multiplied": 0.056},
        "x:native": {"call": 222000, "direct": 0.469, "moved": 0.88, "moved_last": 24.6, "rows": 48.8},
        "x:flipped": {"call": 317000, "direct": 0.495, "moved_last": 37.4, "rows": 69.4},
        "x:channels_last": {"direct": 5.66, "moved": 3.68, "moved_last": 6.09, "rows": 4.41},
        "x:fft": {"block": 58200, "kernels": 3.44, "moved_last": 4.52, "passes": 0.615, "points": 1.18},
        "x:matmul": {"call": 64600, "matrix": 0.714, "moved": 0.172, "moved_last": 1.18, "multiplied": 0.0502},
        "w:native": {"call": 258000, "direct": 0.696, "moved": 0.909, "moved_last": 40.4},
        "w:correlate": {"call": 141000, "direct": 0.534, "maps": 2550, "moved": 4.69, "moved_last": 13.2},
        "w:correlate_last": {"call": 169000, "direct": 0.547, "maps": 2740, "moved": 6.07, "moved_last": 16.7},
        "w:fft": {"block": 98900, "kernels": 5.06, "maps": 142, "moved_last": 3.21, "passes": 0.684},
        "w:matmul": {"call": 67500, "channel": 733, "matrix": 1.1, "moved_last": 0.558, "multiplied": 0.0639},
    },
    "float16": {
        "y:native": {"call": 127000, "long": 5.96, "moved_last": 23.5, "refused": 0.751, "rows": 50.3, "short": 1.76},
        "x:native": {"call": 102000, "long": 1.06, "middle": 2.09, "moved_last": 24.9, "rows": 52.3, "short": 1.8},
        "w:native": {"call": 300000, "moved": 1.45, "volume": 0.886, "wide": 0.148},
    },
    "bfloat16": {
        "y:native": {
            "call": 40300,
            "long": 0.0314,
            "middle": 0.0178,
            "moved": 0.285,
            "refused": 0.46,
            "short": 0.034,
            "upper": 0.0684,
            "upper_last": 0.0537,
            "volume": 0.412,
        },
        "x:native": {
            "call": 54100,
            "long": 0.0137,
            "middle": 0.0251,
            "moved": 0.299,
            "short": 0.0274,
            "upper": 0.0205,
            "upper_last": 0.0258,
            "volume": 0.368,
        },
        "w:native": {"call": 64100, "moved": 0.256, "volume": 0.801, "wide": 0.545},
    },
}
# How much faster t threads do the work of a form: t to this power (a guess within what a busy machine let be measured).
SHARING = {
    "native": 0.95,
    "padded": 0.9,
    "flipped": 0.95,
    "correlate": 0.95,
    "channels_last": 0.9,
    "correlate_last": 0.9,
    "fft": 0.8,
    "matmul": 0.8,
}

_DIRECT = ("short", "middle", "upper", "upper_last", "long", "dilated", "refused", "volume", "tiny", "wide")
_MATRIX = 1 << 22  # the most entries of one channel's banded matrix
_MARGIN = 0.9  # another form than PyTorch's must promise to be this much cheaper
_SHARED_SPECTRUM = 0.8  # both gradients by Fourier transform need the spectrum of the output's gradient once
_CONVERT = 0.4  # nanoseconds for a number to and from float32
_SECOND_CALL = 60e3  # nanoseconds that PyTorch saves where it computes both gradients in one call
_FUNCTION = 25e3  # nanoseconds a Python autograd function adds to a call
_COLD = 150e3  # nanoseconds more for gradients of our own: inside a network their code is not in the cache


def _reach(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    """The class of a direct convolution: PyTorch's kernels change where the last axis has 8, 12 and 15 taps."""
    if max(dilation) > 1:
        return "dilated" if len(kernel) < 3 else "volume"
    taps = kernel[-1]
    return "short" if taps < 8 else "middle" if taps < 12 else "upper" if taps < 15 else "long"


def _thin(geo: Geometry) -> bool:
    """Whether PyTorch's gradient of the weight has a fast kernel for these sizes."""
    tall = max(geo.stride) == 1 and all(k <= n for k, n in zip(geo.kernel, geo.size, strict=True))
    return geo.kernel[-1] <= 3 and max(geo.dilation) == 1 and (tall or max(geo.kernel) <= 3)


def _inside(geo: Geometry) -> int:
    """Products per channel without those of padding, which PyTorch's kernels skip."""
    total = 1
    for n, k, o, s, p, d in zip(*geo[2:], strict=True):
        first = ((max(0, -(-(p - i * s) // d)), min(k, (n - 1 + p - i * s) // d + 1)) for i in range(min(o, 4096)))
        taps = sum(max(0, high - low) for low, high in first)
        total *= taps if o <= 4096 else taps * o // 4096
    return total


def features(form: str, geo: Geometry, last: bool) -> dict[str, float]:
    """The amounts of work of ``form`` ("y:", "x:" or "w:" and its name), by the names of the table's terms."""
    inputs, outputs = math.prod(geo.size), math.prod(geo.out)
    maps = geo.batch * geo.channels
    terms = {"call": 1.0, "moved_last" if last else "moved": float(maps * (inputs + outputs))}
    kind, name = form.split(":")
    if name == "fft":
        lengths, tiles = fft_sizes(geo)
        points = math.prod(lengths)
        numbers = float(maps * points * math.prod(tiles))
        terms |= {"block": float(len(fft_blocks(geo))), "points": numbers, "passes": numbers * math.log2(points)}
        return terms | {"kernels": float(geo.channels * points), "maps": float(maps)}
    if name == "matmul":
        entries = float(geo.channels * inputs * outputs)
        terms |= {"multiplied": entries * geo.batch, "matrix": entries * (1 + 2 * geo.padding[0] / geo.size[0])}
        return terms | {"channel": float(geo.channels), "block": float(len(matmul_blocks(geo)))}
    by_rows = last or name in ("channels_last", "correlate_last")
    reach = _reach(geo.kernel, geo.dilation)
    slow = {"y": name != "padded" and refused(geo, by_rows), "x": name == "channels_last" and max(geo.dilation) > 1}
    skips = f"{kind}:{name}" in ("y:native", "y:channels_last", "x:flipped", "x:channels_last")
    skips = skips and not refused(geo, by_rows) and max(geo.stride) == 1 and reach not in ("dilated", "volume")
    stuffed = kind == "x" and name != "native"  # a strided gradient gets zeros between its numbers
    products = float(maps * (_inside(geo) if skips else math.prod(geo.kernel) * (inputs if stuffed else outputs)))
    if kind == "w" and name == "native":
        return terms | {"volume" if geo.ndim == 3 else "tiny" if _thin(geo) else "wide": products}
    if kind == "w":
        return terms | {"maps": float(maps), _reach(geo.out, geo.stride): products}
    terms["rows"] = float(maps * math.prod(geo.out[:-1]))
    if reach == "upper" and by_rows:
        reach = "upper_last"
    return terms | {"refused" if slow[kind] else reach: products}


def _price(form: str, geo: Geometry, last: bool, kind: str, threads: int) -> float:
    own = TABLE[kind].get(form)  # half precision is computed in float32 but by PyTorch's own form
    prices = TABLE["float32"][form] if own is None else own
    work = 0.0
    for term, amount in features(form, geo, last).items():
        price = prices.get("direct" if "direct" in prices and term in _DIRECT else term, 0.0)
        convert = _CONVERT if own is None and term.startswith("moved") else 0.0
        work += (price + convert) * amount
    call = prices.get("call", 0.0)
    shared: float = (work - call) / threads ** SHARING[form.split(":")[1]]
    return call + shared


def estimate(geo: Geometry, last: bool, kind: str = "float32", threads: int = 1) -> dict[str, float]:
    """Nanoseconds of every form that applies, by "y:", "x:" or "w:" (output, gradients of x and w) and its name."""
    fits = math.prod(geo.size) * math.prod(geo.out) <= _MATRIX
    return {form: _price(form, geo, last, kind, threads) for form in TABLE["float32"] if fits or "matmul" not in form}


def choose(geo: Geometry, kind: str, last: bool, needs: tuple[bool, bool], threads: int) -> tuple[str, str, str]:
    """Names of the forms of the output and of the gradients of x and w; "native" where little is to be won."""
    prices = estimate(geo, last, kind, threads)
    wanted = ["y", *(k for k, need in zip("xw", needs, strict=True) if need)]
    best = dict.fromkeys("yxw", "native")
    for k in wanted:
        options = {form[2:]: price for form, price in prices.items() if form[0] == k}
        cheapest = min(options, key=lambda name: options[name])
        if options[cheapest] + (_FUNCTION if k == "y" else 0.0) < _MARGIN * options["native"]:
            best[k] = cheapest
    if all(needs):
        both = (prices["x:fft"] + prices["w:fft"]) * _SHARED_SPECTRUM
        if both < prices[f"x:{best['x']}"] + prices[f"w:{best['w']}"]:
            best["x"] = best["w"] = "fft"
    # The output's form never depends on whether gradients are recorded: the same numbers come out either way.
    grads = wanted[1:]
    ours = sum(prices[f"{k}:{best[k]}"] for k in grads) + _COLD
    if all(needs) and (best["x"] == "native") != (best["w"] == "native"):
        ours += _SECOND_CALL
    if ours > _MARGIN * sum(prices[f"{k}:native"] for k in grads):
        best["x"] = best["w"] = "native"
    return best["y"], best["x"], best["w"]
