"""Two processes train the model that one would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from tests.training.common import make_data, make_net
from torchconv.training import FitConfig, fit

CONFIG = FitConfig(
    epochs=4, batch_size=8, lr=0.02, grad_accum=2, ema=0.9, clip_grad=1.0, augment="flip", early_stop=3, device="cpu"
)
# DistributedDataParallel keeps gloo's threads past destroy_process_group, and an interpreter that ends while one of
# them waits for its lock is aborted ("terminate called without an active exception"): the workers leave without it.
WORKER = """
import os
import sys
import torch
from tests.training.common import make_data, make_net
from tests.training.test_processes import CONFIG
from torchconv.training import fit

def note(record):
    open(sys.argv[1] + "/seen", "a").write(f"{record.epoch}\\n")

result = fit(make_net(norm=False, dropout=0.0), make_data(), CONFIG, run_dir=sys.argv[1], on_epoch=note)
rank = torch.distributed.get_rank()
found = [result.model.state_dict(), [r.val_loss for r in result.history], result.best_epoch]
torch.save(found, f"{sys.argv[1]}/{rank}.out")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of PyTorch has no gloo")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]),
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        }
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], env=environment, cwd=root))
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    one = fit(make_net(norm=False, dropout=0.0), make_data(), CONFIG)
    outputs = [torch.load(tmp_path / f"{rank}.out", weights_only=True) for rank in range(2)]
    assert outputs[0][1:] == outputs[1][1:]
    assert outputs[0][1] == pytest.approx([r.val_loss for r in one.history], rel=1e-4)
    assert outputs[0][2] == one.best_epoch
    for name, value in one.model.state_dict().items():
        assert torch.equal(outputs[0][0][name], outputs[1][0][name])
        torch.testing.assert_close(outputs[0][0][name], value, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "seen").read_text().split() == [str(r.epoch) for r in one.history]  # the main process alone
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["rng"]) == 2
