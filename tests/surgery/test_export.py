"""What is exported runs elsewhere and agrees with PyTorch; what cannot be is refused by name, and leaves nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.harness import randomise
from tests.ops.test_conformance import build, channels_of
from torchconv.catalog import Part, operators
from torchconv.cli import main
from torchconv.kernels import long_conv
from torchconv.kernels._custom import for_onnx
from torchconv.models import create_model
from torchconv.surgery import _onnx
from torchconv.surgery._attempt import Attempt, quiet
from torchconv.surgery.export import ExportError, export

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
timm = pytest.importorskip("timm")

# Operators that no form is exported of, and why; none so far.
REFUSED: dict[str, str] = {}
WALK = {p.name: min(p.dims) for p in operators().values() if p.name not in REFUSED}
TRANSFORMS = ("ffc", "longconv", "res-fft-relu", "sgconv")


class Together(nn.Module):
    """Several operators, each on an input of its own: one export for all of them."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return {name: part(x) for (name, part), x in zip(self.parts.items(), inputs, strict=True)}


def inputs_of(announced: Part, ndim: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = {1: (13,), 2: (3, 4), 3: (4, 5, 3)}[ndim]
    return torch.randn(2, channels_of(announced, ndim), *sizes, generator=generator)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()


def test_the_walk_is_complete() -> None:
    assert {*WALK, *REFUSED} == set(operators())
    assert set(TRANSFORMS) <= set(WALK)


@pytest.mark.parametrize("group", range(4))
def test_every_operator_in_onnx_with_an_open_batch(group: int, tmp_path: Path) -> None:
    chosen = {name: ndim for name, ndim in sorted(WALK.items())[group::4] if name not in TRANSFORMS}
    parts = {name: randomise(build(operators()[name], ndim)).eval() for name, ndim in chosen.items()}
    example = tuple(inputs_of(operators()[name], ndim) for name, ndim in chosen.items())
    together = Together(parts).eval()
    with quiet():
        found = Attempt(together, together, example, "batch", 1e-4).carry_out(
            tmp_path / "group.onnx", "openvino-ready-onnx", 18
        )
    assert all(shape[0] == "batch" for shape in found["inputs"].values())
    assert list(found["outputs"]) == list(chosen)
    assert len(found["checks"]) == 3
    assert max(found["checks"].values()) <= 1e-4


def test_fourier_operators_in_onnx_with_open_sizes(tmp_path: Path) -> None:
    parts = {name: randomise(build(operators()[name], WALK[name])).eval() for name in TRANSFORMS}
    example = tuple(inputs_of(operators()[name], WALK[name]) for name in TRANSFORMS)
    report = export(Together(parts), tmp_path / "group.onnx", "openvino-ready-onnx", example=example, merge=False)
    assert report.fixed == ()
    assert all(shape == ("batch", 8, "length") for shape in (*report.inputs.values(), *report.outputs.values()))
    assert max(report.checks.values()) <= 1e-4


def test_an_operator_made_for_one_size_says_so(tmp_path: Path) -> None:
    module = randomise(build(operators()["terminator-global"], 2)).eval()
    report = export(module, tmp_path / "x.pt2", "torch-export", example=torch.randn(2, 8, 13, 11), merge=False)
    assert report.dynamic == ("batch",)
    assert report.fixed[0].startswith("batch and sizes open: ")
    assert "hold for" in report.fixed[0]


def test_custom_operators_show_ordinary_ones_to_every_exporter(tmp_path: Path) -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return long_conv(x, torch.ones(3, 40, device=x.device) / 40)

    x, length = torch.randn(2, 3, 64), ({2: torch.export.Dim.DYNAMIC},)
    usual = torch.export.export(Long(), (x,), dynamic_shapes=length)
    with for_onnx():
        direct = torch.export.export(Long(), (x,), dynamic_shapes=length)
    for program, fourier in ((usual, True), (direct, False)):
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert any("fft" in name for name in names) == fourier
        assert not any(name.startswith("torchconv") for name in names)
        for n in (10, 64, 91):
            y = torch.randn(2, 3, n)
            assert torch.allclose(program.module()(y), Long()(y), atol=1e-5)
    # PyTorch's own function takes the same form.
    converted = torch.onnx.export(Long().eval(), (x,), dynamo=True, verbose=False)
    assert converted is not None
    assert {"DFT", "Conv"} & {node.op_type for node in converted.model_proto.graph.node} == {"Conv"}


@pytest.mark.parametrize("norm", [None, "ortho", "forward"])
@pytest.mark.parametrize("sizes", [None, (8, 6), (7, 9), (12, 4)])
def test_fourier_transforms_in_defined_operators(norm: str | None, sizes: tuple[int, int] | None) -> None:
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    spectrum = torch.fft.rfft2(x)
    back = torch.fft.irfft2(spectrum, sizes, norm=norm)
    assert torch.allclose(_onnx._irfftn(spectrum, sizes, (-2, -1), norm), back, atol=1e-12)
    ours = _onnx._rfftn(x, sizes, (-2, -1), norm)
    assert torch.allclose(ours, torch.fft.rfft2(x, sizes, norm=norm), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dynamic"), [("test_resnet", True), ("test_convnext", False), ("mobilenetv3_small_050", False)]
)
def test_networks_of_timm(name: str, dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = export(model, tmp_path / "net.onnx", size=(64, 96), dynamic=dynamic)
    if dynamic:
        assert report.inputs == {"input": ("batch", 3, "height", "width")}
        assert report.outputs == {"output": ("batch", 10)}
        assert list(report.checks) == ["2×3×64×96", "1×3×64×96", "3×3×96×160"]
    else:
        assert report.inputs == {"input": (1, 3, 64, 96)}
        assert list(report.checks) == ["1×3×64×96", "1×3×64×96, other noise"]
    assert report.opset == 18
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_networks_of_ours(tmp_path: Path) -> None:
    kernels = ((3,), (13,), (7,), (5,))
    report = export(create_model("espcn_x2"), tmp_path / "up.onnx", size=16)
    (shape,) = report.outputs.values()
    assert shape[2:] == ("2·height", "2·width")
    model = create_model("unireplknet_a", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), kernel_sizes=kernels, num_classes=3)
    report = export(model, tmp_path / "net.onnx", size=64, dynamic=False)
    assert report.merged
    assert report.outputs == {"output": (1, 3)}


def test_formats_are_read_again(tmp_path: Path) -> None:
    model, x = randomise(small()).eval(), torch.randn(5, 3, 22, 30)
    expected = model(x)
    saved = {to: export(model, tmp_path / to, to, size=16) for to in ("torch-export", "torchscript")}
    read = {
        "torch-export": torch.export.load(tmp_path / "torch-export").module(),
        "torchscript": torch.jit.load(tmp_path / "torchscript"),
    }
    for to, report in saved.items():
        assert torch.allclose(read[to](x), expected, atol=1e-5)
        assert report.dynamic == ("batch", "height", "width")
        assert report.opset is None
        assert report.outputs == {"output": ("batch", 4, "height/2", "width/2")}
        assert report.size == (tmp_path / to).stat().st_size


def test_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_onnx, "INLINE", 0)
    model = small()
    report = export(model, tmp_path / "net.onnx", size=16, opset=20, merge=False)
    assert [file.name for file in report.files] == ["net.onnx", "net.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.size == sum(file.stat().st_size for file in report.files)
    x = torch.randn(1, 3, 20, 24)
    (y,) = ort.InferenceSession(report.path).run(None, {"input": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)
    assert [(o.domain, o.version) for o in onnx.load(report.path).opset_import] == [("", 20)]


def test_several_inputs_and_named_outputs(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, image: Tensor, weight: Tensor) -> dict[str, Any]:
            scaled = image * weight[:, :, None, None]
            return {"scaled": scaled, "mean": scaled.mean((2, 3)), "note": None}

    report = export(Pair(), tmp_path / "pair.onnx", example=(torch.randn(1, 3, 9, 8), torch.randn(1, 3)))
    assert report.inputs == {"image": ("batch", 3, "height", "width"), "weight": ("batch", 3)}
    assert report.outputs == {"scaled": ("batch", 3, "height", "width"), "mean": ("batch", 3)}


def test_fixed_sizes_say_why(tmp_path: Path) -> None:
    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] != 8:
                raise ValueError(f"made for 8, got {x.shape[2]}")
            return x + self.position

    report = export(OneSize(), tmp_path / "x.pt2", "torch-export", example=torch.randn(1, 3, 8, 8))
    assert report.dynamic == ("batch",)
    assert "the network itself takes no other sizes: made for 8, got 16" in report.fixed[0]
    report = export(small(), tmp_path / "x.pt2", "torch-export", size=16, batch=3, dynamic=False)
    assert report.inputs == {"input": (3, 3, 16, 16)}
    assert (report.dynamic, report.fixed) == ((), ())
    assert "no axis" in str(report)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else 2 * x


class Spectral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[1]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("head", "to", "messages"),
    [
        (Gate(), "onnx", ["layer 1 (Gate)", "test_export.py:", "x.sum() > 0", "depends on the values of a tensor"]),
        (Gate(), "torchscript", ["layer 1 (Gate)", "depends on the values of a tensor"]),
        (Spectral(), "onnx", ["layer 1 (Spectral)", "aten._linalg_svd has no ONNX form"]),
        (Noisy(), "torch-export", ["differs from PyTorch by", "tolerance 0.0001"]),
    ],
)
def test_refusals_name_layer_and_reason(head: nn.Module, to: str, messages: list[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), head)
    (tmp_path / "net").write_text("what stood there")
    with pytest.raises(ExportError) as refused:
        export(model, tmp_path / "net", to, size=12, merge=False)
    assert all(message in str(refused.value) for message in messages), refused.value
    assert [file.name for file in tmp_path.iterdir()] == ["net"]
    assert (tmp_path / "net").read_text() == "what stood there"


def test_what_openvino_would_not_read() -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    x = helper.make_tensor_value_info("x", kind.FLOAT, ["n", 8, 2])

    def objections(*nodes: Any, opset: int = 18, output: Any = None) -> list[str]:
        graph = helper.make_graph(
            list(nodes), "g", [x], [output or helper.make_tensor_value_info("y", kind.FLOAT, [1])]
        )
        return _onnx.openvino_objections(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))

    def node(name: str, **options: Any) -> Any:
        return helper.make_node(name, ["x"], ["y"], name=f"n_{name}", **options)

    assert objections(node("Relu")) == []
    assert objections(node("DFT", axis=1)) == []
    inside = helper.make_graph([node("LpPool", kernel_shape=[2])], "then", [], [])
    for found, message in (
        (objections(node("DFT"), opset=20), "operator set 17"),
        (objections(node("DFT", axis=1, onesided=1)), "another rank"),
        (objections(node("Relu"), opset=24), "newer than 23"),
        (objections(node("Gelu", domain="com.microsoft")), "is not ai.onnx"),
        (objections(node("LpPool", kernel_shape=[2])), "not in OpenVINO's table"),
        (objections(helper.make_node("If", ["x"], ["y"], then_branch=inside, else_branch=inside)), "LpPool"),
        (objections(node("SequenceConstruct")), "certain patterns"),
        (objections(node("Cast", to=kind.DOUBLE)), "float64"),
        (objections(node("Resize", antialias=1)), "antialias"),
        (objections(helper.make_node("Pad", ["x", "p", "", "axes"], ["y"])), "without axes"),
        (objections(node("Relu"), output=helper.make_tensor_value_info("y", kind.FLOAT, None)), "number of axes"),
    ):
        assert len(found) == 1
        assert message in found[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "to='tflite': choose one of"),
        ({"opset": 5}, "opset=5: must be 9 to"),
        ({"to": "openvino-ready-onnx", "opset": 24}, "opset=24: must be 9 to 23"),
        ({"to": "torch-export", "opset": 18}, "leave it out"),
        ({"size": (8, 8, 8)}, "size"),
        ({"batch": 0}, "batch=0"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(small(), tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


def test_networks_without_convolutions_need_an_example(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could be made up, give one"):
        export(nn.PReLU(), tmp_path / "x")
    for example in (None, torch.randn(1, 3)):
        report = export(nn.Linear(3, 3), tmp_path / "x", "torch-export", example=example, merge=False)
        assert report.inputs == {"input": ("batch", 3)}


def test_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"torchconv\[export\]"):
        export(small(), tmp_path / "x.onnx", size=16)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "torchconv:espcn_x3", "--to", "openvino-ready-onnx", "--size", "12x16", "--no-merge")
    assert code == 0
    assert "openvino-ready-onnx, operator set 18" in out
    assert "open     batch, height, width" in out
    assert "(tolerance 0.0001)" in out
    assert out.endswith("saved: espcn_x3.onnx\n")
    assert [file.name for file in tmp_path.iterdir()] == ["espcn_x3.onnx"]
    model = onnx.load("espcn_x3.onnx")
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][2:] == [
        "height",
        "width",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("torchconv:espcn_x2", "--to", "onx"), "did you mean onnx"),
        (("torchconv:espcn_x2", "--size", "big"), "give 224, 224x320 or 16x112x112"),
        (("torchconv:espcn_x2", "--size", "0"), "give 224"),
        (("torchconv:espcn_x2", "--size", "8x8x8"), "size"),
        (("torchconv:espcn_x2", "--opset", "99"), "opset=99"),
        (("nowhere/at/all",), "give timm:NAME"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []
