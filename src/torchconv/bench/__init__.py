"""Benchmarks: operators and networks against the obvious PyTorch expression and against published packages, paired in one run."""

from torchconv.bench.cases import Case, cases
from torchconv.bench.mixers import bench as bench_mixers
from torchconv.bench.models import bench_models
from torchconv.bench.ops import bench_ops

__all__ = ["Case", "bench_mixers", "bench_models", "bench_ops", "cases"]
