"""Benchmarks: operators against the obvious PyTorch expression, networks against published ones, paired in one run."""

from torchconv.bench.cases import Case, cases
from torchconv.bench.mixers import bench as bench_mixers
from torchconv.bench.models import bench_models
from torchconv.bench.ops import bench_ops

__all__ = ["Case", "bench_mixers", "bench_models", "bench_ops", "cases"]
