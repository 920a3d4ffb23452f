"""One thread a worker: workers that share the cores with several threads each mostly wait for one another."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch reads it; fresh processes inherit it
