"""Stages of a cascade as ONNX files, with the names that the authors' inference plug-in gives them.

A file holds one network: ``input`` (1, 2, 69, 721, 1440) and ``time_embeddings`` (1, 12) give the next state; a folder
holds ``short.onnx``, ``medium.onnx`` and ``long.onnx``. The authors send theirs on request (arXiv 2409.02123).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, require
from torchconv.models.forecast.puyun_rollout import STAGES, Cascade

INPUTS = ("input", "time_embeddings")
_MISSPELT = {"medium": "meidum"}  # in the plug-in's list of files


class OnnxStage(nn.Module):
    """A network in an ONNX file, called like any other.

    Args:
        path: the file.
        providers: of onnxruntime, the best first; by default the CPU.
        threads: for one call; 0 lets onnxruntime decide.

    Shape:
        (N, T, C, H, W), (N or 1, features) → (N, C, H, W), as the file says; on the input's device, without gradient.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not take these two inputs.
        ImportError: the extra ``torchconv[export]`` is missing.

    Reference: the authors' plug-in for ai-models.
    """

    def __init__(self, path: str | os.PathLike[str], providers: Sequence[str] | None = None, threads: int = 0) -> None:
        super().__init__()
        self.path, self.providers, self.threads = Path(path), tuple(providers or ("CPUExecutionProvider",)), threads
        self._open()

    def _open(self) -> None:
        runtime = require("onnxruntime", "export")
        if not self.path.is_file():
            raise FileNotFoundError(f"path={str(self.path)!r}: no such file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # A state is hundreds of megabytes: what a call has used is given back after it.
        options.enable_cpu_mem_arena = False
        self.session = runtime.InferenceSession(self.path, options, providers=list(self.providers))
        names = {i.name for i in self.session.get_inputs()}
        check(names == set(INPUTS), "path", str(self.path), f"takes {sorted(names)}; expected {sorted(INPUTS)}")

    def __getstate__(self) -> dict[str, Any]:
        """Sessions cannot be copied; the file is opened again."""
        return {n: v for n, v in self.__dict__.items() if n != "session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again."""
        super().__setstate__(state)
        self._open()

    @torch.no_grad()
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The state after ``x``."""
        arrays = (t.float().cpu().contiguous().numpy() for t in (x, time))
        (following,) = self.session.run(None, dict(zip(INPUTS, arrays, strict=True)))
        return torch.from_numpy(following).to(x)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return str(self.path)


def load_cascade(folder: str | os.PathLike[str], steps_per_stage: int = 20, **options: Any) -> Cascade:
    """The cascade in a folder of ONNX files: ``short.onnx``, then ``medium.onnx`` and ``long.onnx`` where they are.

    Args:
        folder: with the files; ``meidum.onnx``, as the plug-in's list has it, is read too.
        steps_per_stage: see :class:`~torchconv.models.forecast.puyun_rollout.Cascade`.
        options: of :class:`OnnxStage`.

    Raises:
        FileNotFoundError: there is no ``short.onnx``, or a stage between two others is missing.
    """
    found: dict[str, nn.Module] = {}
    missing: list[str] = []
    for stage in STAGES:
        files = [Path(folder) / f"{name}.onnx" for name in (stage, _MISSPELT.get(stage, stage))]
        path = next((f for f in files if f.is_file()), None)
        if path is None:
            missing.append(f"{stage}.onnx")
        elif missing:
            raise FileNotFoundError(f"folder={str(folder)!r}: has {path.name} but no {missing[0]}")
        else:
            found[stage] = OnnxStage(path, **options)
    if not found:
        raise FileNotFoundError(f"folder={str(folder)!r}: has no {missing[0]}")
    return Cascade(found, steps_per_stage)


def save_stage(model: nn.Module, path: str | os.PathLike[str], rows: int, columns: int) -> None:
    """Write a network as an ONNX file that the authors' plug-in and :class:`OnnxStage` run, for one forecast at a time.

    Args:
        model: a :class:`~torchconv.models.forecast.puyun.PuYun`, or a module with its ``history``, ``channels`` and
            ``time`` that takes (states, time).
        path: the file, moved into place when it is complete; weights of over two gigabytes stand beside it.
        rows, columns: of the grid, which are fixed in the file.

    Raises:
        ImportError: the extra ``torchconv[export]`` is missing.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    network: Any = model
    like = next(model.parameters())
    x = torch.zeros(1, network.history, network.channels, rows, columns, dtype=like.dtype, device=like.device)
    time = torch.zeros(1, network.time.in_features, dtype=like.dtype, device=like.device)
    training = model.training
    try:
        program = torch.onnx.export(
            model.eval(), (x, time), input_names=list(INPUTS), output_names=["output"], dynamo=True, verbose=False
        )
    finally:
        model.train(training)
    assert program is not None
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        program.save(Path(folder) / target.name)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
            os.replace(file, target.parent / file.name)  # what the file refers to goes first
