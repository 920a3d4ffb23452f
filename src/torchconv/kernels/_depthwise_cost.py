"""Which form computes a depthwise convolution fastest: closed-form estimates fitted on measurements.

An estimate is a sum of terms, nanoseconds per call and per unit of work on one thread, with the work shared among
threads at the form's own efficiency. The numbers were fitted (non-negative least squares on relative errors) to a few
hundred random problems in one to three dimensions on a server processor with 512-bit vectors. Only their ratios
matter, so they carry over to machines of the kind.
"""

from __future__ import annotations

import math

from torchconv.kernels._depthwise_forms import Geometry, fft_blocks, fft_sizes, matmul_blocks, refused

# Nanoseconds by kind of number, form ("y" the output, "x" and "w" their gradients) and unit of work: a call, a number
# moved in or out, a product of a direct convolution by its class, a point of a transform and of its log N passes, ...
TABLE: dict[str, dict[str, dict[str, float]]] = {
    "float32": {
        "y:native": {
            "call": 42800,
            "dilated": 0.0166,
            "long": 0.021,
            "middle": 0.0187,
            "moved": 0.291,
            "moved_last": 0.0528,
            "refused": 0.45,
            "short": 0.0151,
            "upper": 0.02,
            "volume": 0.453,
        },
        "y:padded": {
            "call": 60400,
            "dilated": 0.034,
            "long": 0.032,
            "middle": 0.0449,
            "moved": 0.376,
            "rows": 2.12,
            "short": 0.0312,
            "upper": 0.0425,
            "volume": 1,
        },
        "y:channels_last": {
            "call": 36300,
            "dilated": 0.0165,
            "long": 0.0206,
            "middle": 0.0193,
            "moved": 0.702,
            "moved_last": 0.082,
            "refused": 0.307,
            "short": 0.0133,
            "upper": 0.0251,
            "volume": 0.444,
        },
        "y:fft": {"block": 98600, "kernels": 3.11, "moved_last": 1.96, "passes": 0.33, "points": 1.56},
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
            "dilated": 0.378,
            "long": 0.0377,
            "middle": 0.0326,
            "moved": 0.245,
            "rows": 1.13,
            "short": 0.0294,
            "upper": 0.0344,
            "volume": 0.322,
        },
        "x:flipped": {
            "call": 72800,
            "dilated": 0.0338,
            "long": 0.0343,
            "middle": 0.0226,
            "moved": 0.322,
            "moved_last": 0.0657,
            "short": 0.0154,
            "upper": 0.0202,
            "volume": 0.507,
        },
        "x:channels_last": {
            "call": 61300,
            "long": 0.0224,
            "middle": 0.023,
            "moved": 0.728,
            "moved_last": 0.0951,
            "refused": 0.0431,
            "short": 0.0137,
            "upper": 0.0236,
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
            "call": 91900,
            "dilated": 0.0406,
            "long": 0.034,
            "maps": 10.1,
            "middle": 0.0482,
            "moved": 0.374,
            "moved_last": 1.09,
            "short": 0.0685,
            "upper": 0.0388,
            "volume": 0.834,
        },
        "w:correlate_last": {
            "call": 102000,
            "dilated": 0.0701,
            "long": 0.0445,
            "middle": 0.103,
            "moved": 0.448,
            "moved_last": 2,
            "short": 0.211,
            "upper": 0.113,
            "volume": 0.805,
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
        "y:native": {"call": 232000, "direct": 0.554, "moved_last": 41.2, "rows": 54.3},
        "y:padded": {"call": 260000, "direct": 0.484, "moved": 0.169, "moved_last": 46.4, "rows": 43.4},
        "y:channels_last": {"call": 67000, "direct": 4.55, "moved": 3.41, "moved_last": 10.6},
        "y:fft": {"block": 53600, "kernels": 6.24, "moved_last": 3.08, "passes": 0.428, "points": 3.36},
        "y:matmul": {"call": 69500, "matrix": 0.74, "moved": 0.18, "moved_last": 1.31, "multiplied": 0.056},
        "x:native": {"call": 222000, "direct": 0.469, "moved": 0.88, "moved_last": 24.6, "rows": 48.8},
        "x:flipped": {"call": 247000, "direct": 0.536, "moved_last": 13.5, "rows": 60.8},
        "x:channels_last": {"direct": 4.59, "moved": 5.56, "moved_last": 7.4},
        "x:fft": {"block": 58200, "kernels": 3.44, "moved_last": 4.52, "passes": 0.615, "points": 1.18},
        "x:matmul": {"call": 64600, "matrix": 0.714, "moved": 0.172, "moved_last": 1.18, "multiplied": 0.0502},
        "w:native": {"call": 258000, "direct": 0.696, "moved": 0.909, "moved_last": 40.4},
        "w:correlate": {"call": 141000, "direct": 0.534, "maps": 2550, "moved": 4.69, "moved_last": 13.2},
        "w:correlate_last": {"call": 169000, "direct": 0.547, "maps": 2740, "moved": 6.07, "moved_last": 16.7},
        "w:fft": {"block": 98900, "kernels": 5.06, "maps": 142, "moved_last": 3.21, "passes": 0.684},
        "w:matmul": {"call": 67500, "channel": 733, "matrix": 1.1, "moved_last": 0.558, "multiplied": 0.0639},
    },
    "float16": {
        "y:native": {
            "call": 115000,
            "long": 3.01,
            "moved": 0.973,
            "moved_last": 26,
            "refused": 0.742,
            "rows": 38.2,
            "short": 1.41,
        },
        "x:native": {
            "call": 128000,
            "long": 1.02,
            "middle": 1.98,
            "moved": 0.236,
            "moved_last": 17.7,
            "rows": 74.6,
            "short": 1.52,
            "volume": 5.48,
        },
        "w:native": {"call": 300000, "moved": 1.45, "volume": 0.886, "wide": 0.148},
    },
    "bfloat16": {
        "y:native": {
            "call": 37200,
            "long": 0.0102,
            "middle": 0.0976,
            "moved": 0.253,
            "refused": 0.467,
            "short": 0.0299,
            "upper": 0.0305,
            "volume": 0.428,
        },
        "x:native": {
            "call": 54100,
            "long": 0.0136,
            "middle": 0.0232,
            "moved": 0.308,
            "short": 0.0256,
            "upper": 0.0253,
            "volume": 0.308,
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

_DIRECT = ("short", "middle", "upper", "long", "dilated", "refused", "volume", "tiny", "wide")
_MATRIX = 1 << 22  # the most entries of one channel's banded matrix
_MARGIN = 0.9  # another form than PyTorch's must promise to be this much cheaper
_SHARED_SPECTRUM = 0.8  # both gradients by Fourier transform need the spectrum of the output's gradient once
_CONVERT = 0.4  # nanoseconds for a number to and from float32
_FUNCTION = 25e3  # nanoseconds a Python autograd function adds to a call


def _reach(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    """The class of a direct convolution: PyTorch's kernels change where the last axis has 8, 11 and 15 taps."""
    if max(dilation) > 1:
        return "dilated" if len(kernel) < 3 else "volume"
    taps = kernel[-1]
    return "short" if taps < 8 else "middle" if taps < 11 else "upper" if taps < 15 else "long"


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
    products = float(maps * math.prod(geo.kernel) * (inputs if kind == "x" and name != "native" else outputs))
    if kind == "w" and name == "native":
        return terms | {"volume" if geo.ndim == 3 else "tiny" if max(geo.kernel) <= 3 else "wide": products}
    if kind == "w":
        return terms | {"maps": float(maps), _reach(geo.out, geo.stride): products}
    if kind == "x" and name == "native":
        reach = "volume" if geo.ndim == 3 else _reach(geo.kernel, geo.dilation)
        return terms | {"rows": float(maps * math.prod(geo.out[:-1])), reach: products}
    terms["rows"] = float(maps * math.prod(geo.out[:-1]))
    slow = refused(geo, last or name == "channels_last") and name in ("native", "channels_last")
    if kind == "x":
        slow = name == "channels_last" and max(geo.dilation) > 1
    return terms | {"refused" if slow else _reach(geo.kernel, geo.dilation): products}


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
    """Names of the forms of the output and of the gradients of x and w; all "native" where little is to be won."""
    prices = estimate(geo, last, kind, threads)
    wanted = ["y", *(k for k, need in zip("xw", needs, strict=True) if need)]
    best = dict.fromkeys("yxw", "native")
    for k in wanted:
        options = {form[2:]: price for form, price in prices.items() if form[0] == k}
        cheapest = min(options, key=lambda name: options[name])
        if options[cheapest] < _MARGIN * options["native"]:
            best[k] = cheapest
    if all(needs):
        both = (prices["x:fft"] + prices["w:fft"]) * _SHARED_SPECTRUM
        if both < prices[f"x:{best['x']}"] + prices[f"w:{best['w']}"]:
            best["x"] = best["w"] = "fft"
    ours = sum(prices[f"{k}:{best[k]}"] for k in wanted) + (_FUNCTION if any(needs) else 0.0)
    if ours > _MARGIN * sum(prices[f"{k}:native"] for k in wanted):
        return "native", "native", "native"
    return best["y"], best["x"], best["w"]
