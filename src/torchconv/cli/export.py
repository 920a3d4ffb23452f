"""``torchconv export``: a network as a file that runs without its Python code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from torchconv.cli._network import Model, place


def export(
    model: Model,
    to: Annotated[str, typer.Option(help="onnx, torch-export, torchscript or openvino-ready-onnx.")] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=place,
            metavar="FILE",
            help="The file; by default the model's name with .onnx, .pt2 or .pt.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of the input: 224, 224x320 or 16x112x112; by default what the network says.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in the example; kept where the batch is not open.")] = 1,
    opset: Annotated[int | None, typer.Option(help="Operator set of ONNX; 18 by default.")] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--static", help="Leave batch and sizes open as far as that goes.")
    ] = True,
    merge: Annotated[bool, typer.Option("--merge/--no-merge", help="Write the inference form.")] = True,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference from PyTorch, relative to the largest output; 1e-4.")
    ] = None,
) -> None:
    """Write a network as ONNX, torch.export or TorchScript, checked against PyTorch.

    The file is read again and run on random inputs, of other batch and image sizes too where these are open; it is
    moved into place when it agrees. A network that cannot be exported says at which operator, and why.

    [bold]Examples[/bold]

      torchconv export timm:resnet18 --to onnx

      torchconv export torchconv:unireplknet_t --to openvino-ready-onnx --size 256x320 -o model.onnx

      torchconv export resnet18-dcls/ --to torch-export --static --batch 8
    """
    from torchconv._common import check_choice, check_writable
    from torchconv.surgery.export import FORMATS
    from torchconv.surgery.export import export as carry_out
    from torchconv.weights import open_model

    check_choice("to", to, FORMATS)
    sizes = _sizes(size)
    if out is None:
        name = model.rpartition(":")[2] if model.startswith(("timm:", "torchconv:")) else Path(model).resolve().stem
        out = Path(name.replace("/", "_") + FORMATS[to])
    check_writable("out", out)
    network = open_model(model)
    with Console(file=sys.stderr).status(f"exporting to {to} …"):
        report = carry_out(
            network,
            out,
            to,
            size=sizes,
            batch=batch,
            opset=opset,
            dynamic=dynamic,
            merge=merge,
            tolerance=tolerance,
        )
    typer.echo(str(report))


def _sizes(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--size={text!r}: give 224, 224x320 or 16x112x112")
    numbers = tuple(int(part) for part in parts)
    return numbers[0] if len(numbers) == 1 else numbers


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)
