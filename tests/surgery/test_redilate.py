"""Networks re-dilated by the step: against the authors' numbers, samplers, what is kept, what is refused, saving."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torchconv.models import create_model
from torchconv.models.generate.guidance import NoiseDampedGuidance, noise_damped_guidance
from torchconv.models.generate.steps import Argument, Steps
from torchconv.models.generate.unet import SmallUNet
from torchconv.ops.scalecrafter import redilate_conv
from torchconv.ops.scalecrafter_dispersed import disperse_conv, dispersion_matrix
from torchconv.surgery import redilate, swap
from torchconv.weights import load, save

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "scalecrafter"
INNER = [
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv2",
    "mid_block.resnets.0.conv1",
    "mid_block.resnets.0.conv2",
    "up_blocks.0.resnets.0.conv1",
    "up_blocks.0.resnets.0.conv2",
    "up_blocks.0.upsamplers.0.conv",
]


def network(**options: Any) -> SmallUNet:
    torch.manual_seed(0)
    return SmallUNet(4, (8, 12), context=5, **options)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def call(net: nn.Module, timestep: Any, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = net(noise(batch, 4, 12, 16), timestep, noise(batch, 5))
    return y


@pytest.mark.parametrize("name", ["toy_unet_step_early", "toy_unet_step_dispersed"])
def test_a_guided_step_equals_the_authors(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("state.")}
    full, channels = state["conv_in.weight"].shape[:2]
    half = state["mid_block.resnets.0.conv1.weight"].shape[0]
    net = SmallUNet(channels, (full, half), state["mid_block.resnets.0.emb.weight"].shape[1] - 1)
    net.load_state_dict(state)
    times = [1000.0 - 20 * i for i in range(50)]
    times[config["step_index"]] = config["timestep"]
    shared: dict[str, Any] = {
        "timesteps": times,
        "progressive": config["progressive"],
        "disperse": config.get("disperse") or None,
        "disperse_steps": config.get("inflate_tau", 0),
        "share": True,
    }
    many = redilate(net, layers=config["dilate_settings"], steps=(config["dilate_tau"], 50), **shared)
    tau = (config["ndcfg_tau"], 50)
    few = redilate(net, layers=config["ndcfg_dilate_settings"], steps=tau, **shared)
    guided = NoiseDampedGuidance(many, few, steps=tau, timesteps=times)
    latent = tensors["input.latent"].repeat(2, 1, 1, 1)
    with torch.no_grad():
        uncond, text = many(latent, config["timestep"], tensors["input.context"]).chunk(2)
        first, second = guided(latent, torch.tensor(config["timestep"]), tensors["input.context"]).chunk(2)
    torch.testing.assert_close(uncond, tensors["output.uncond"])
    torch.testing.assert_close(text, tensors["output.text"])
    torch.testing.assert_close(first, tensors["output.vanilla_uncond"])
    found = first + config["guidance"] * (second - first)
    torch.testing.assert_close(found, tensors["output.noise_pred"], rtol=1e-4, atol=1e-4)


def test_it_is_the_network_with_those_convolutions_until_tau() -> None:
    net = network()
    wide = redilate(net, 2.5, steps=(30, 50))
    by_hand = copy.deepcopy(net)
    for name in INNER:
        conv: Any = by_hand.get_submodule(name)
        conv.forward = lambda x, c=conv: redilate_conv(x, c.weight, c.bias, 2.5, c.stride)
    assert wide.redilate_report.layers == dict.fromkeys(INNER, 2.5)
    assert wide.redilate_report.kept == {}
    for timestep in (981, torch.tensor(401), torch.full((2,), 401.0)):
        assert torch.equal(call(wide, timestep), call(by_hand, timestep))
    for timestep in (381, 1):
        assert torch.equal(call(wide, timestep), call(net, timestep))
    assert torch.equal(call(wide, 981), call(by_hand, 981)), "and back, for the next picture"
    assert "7 layers re-dilated" in str(wide.redilate_report)
    with torch.no_grad():  # keywords, in any order
        assert torch.equal(wide(timestep=981, context=noise(2, 5), x=noise(2, 4, 12, 16)), call(wide, 981))
    always = redilate(net, 2.5)
    assert torch.equal(call(always, 1), call(by_hand, 1))


def factors(net: nn.Module, timestep: float) -> dict[str, float | None]:
    call(net, timestep)
    names = [*net.redilate_report.layers]  # type: ignore[union-attr, arg-type]
    return {name: net.get_submodule(name).factor for name in names}  # type: ignore[misc]


def test_schedule_of_each_layer() -> None:
    table = {"mid_block.*": 4, "up_blocks.0.*": 3, "*_blocks.*.conv2": 2.5}
    wide = redilate(
        network(), layers=table, steps=(35, 50), progressive=True, disperse="mid_block.*", disperse_steps=10
    )
    assert wide.redilate_report.layers["up_blocks.0.resnets.0.conv2"] == 3, "the first that fits"
    seen = [factors(wide, 1000 - 20 * i - 19) for i in range(50)]
    mid = [row["mid_block.resnets.0.conv1"] for row in seen]
    assert mid == [2] * 9 + [1.5] + [3] * 8 + [2] * 17 + [None] * 15
    up = [row["up_blocks.0.upsamplers.0.conv"] for row in seen]
    assert up == [3] * 12 + [2] * 23 + [None] * 15
    assert {row["down_blocks.0.resnets.0.conv2"] for row in seen} == {3, 2, None}


@pytest.mark.parametrize("total", [1, 10, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "offset", "trailing", "linspace"])
def test_steps_are_told_from_time_steps(total: int, spacing: str) -> None:
    ratio = 1000 // total
    times = {
        "leading": [float((total - 1 - i) * ratio) for i in range(total)],
        "offset": [float((total - 1 - i) * ratio + (ratio > 1)) for i in range(total)],
        "trailing": [float(1000 - i * ratio - 1) for i in range(total)],
        "linspace": torch.linspace(999, 0, total).tolist(),
    }[spacing]
    steps = Steps(total, total)
    assert [steps.index(t) for t in times] == list(range(total))
    listed = Steps(total, total, tuple(times))
    assert [listed.index(torch.tensor([t, t])) for t in times] == list(range(total))


def test_dispersed_layers() -> None:
    net = network()
    options = {"size": 5, "preserve_sum": True}
    wide = redilate(net, layers={}, disperse="mid_block.*", dispersion=options, steps=(3, 10), disperse_steps=2)
    by_hand = copy.deepcopy(net)
    block = by_hand.mid_block.resnets[0]
    for name in ("conv1", "conv2"):
        setattr(block, name, disperse_conv(getattr(block, name), dispersion_matrix(**options)))  # type: ignore[arg-type]
    assert torch.equal(call(wide, 801), call(by_hand, 801))
    assert torch.equal(call(wide, 701), call(net, 701))
    both = redilate(net, 2, layers="mid_block.*", disperse="mid_block.*")
    dispersed = redilate(net, layers={}, disperse="mid_block.*")
    assert torch.allclose(call(both, 1), call(dispersed, 1)), "a dispersed kernel halves the factor: 2 becomes 1"
    assert both.redilate_report.dispersed == ["mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"]


def test_the_original_stays_and_what_hangs_on_layers_is_kept() -> None:
    net = network(dtype=torch.float64).train()
    seen: list[str] = []
    net.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: seen.append("hook"))
    net.mid_block.resnets[0].conv2.eval().weight.requires_grad_(False)
    state, printed = copy.deepcopy(net.state_dict()), repr(net)
    wide = redilate(net, 2, steps=(5, 10))
    assert repr(net) == printed
    assert not net._forward_pre_hooks
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert list(wide.state_dict()) == list(state)
    layer: Any = wide.mid_block.resnets[0].conv2
    assert isinstance(layer, nn.Conv2d)
    assert (layer.dilation, layer.padding) == ((1, 1), (1, 1))
    assert (layer.training, layer.weight.requires_grad, layer.weight.dtype) == (False, False, torch.float64)
    assert wide.training
    wide(noise(2, 4, 8, 8).double(), 901, noise(2, 5).double()).sum().backward()
    assert seen == ["hook"]
    assert wide.mid_block.resnets[0].conv1.weight.grad is not None
    assert net.mid_block.resnets[0].conv1.weight.grad is None
    shared = redilate(net, 2, share=True)
    assert all(a is b for a, b in zip(shared.parameters(), net.parameters(), strict=True))
    assert torch.equal(
        wide.to(torch.bfloat16)(noise(1, 4, 8, 8).bfloat16(), 1, noise(1, 5).bfloat16()).isnan().any(),
        torch.tensor(False),
    )
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(redilate(network(), 2, steps=(5, 10))))):
        assert twin.mid_block.resnets[0].conv1.scale == 2
    twin = pickle.loads(pickle.dumps(redilate(network(), 2, steps=(5, 10))))
    assert torch.equal(call(twin, 901), call(redilate(network(), 2), 901))
    assert torch.equal(call(twin, 1), call(network(), 1))


def test_shared_parametrised_and_unbatched_layers() -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding="same", groups=2)
    model = nn.Sequential(shared, nn.Conv2d(4, 4, 5, stride=2, padding=2), nn.ReLU(), shared).eval()
    parametrizations.weight_norm(model[1])
    parametrizations.spectral_norm(shared)
    wide = redilate(model, 3, layers=["1", "3"])
    assert wide.redilate_report.layers == {"1": 3, "3": 3}
    assert wide[0] is wide[3]
    assert list(wide.state_dict()) == list(model.state_dict())
    x = noise(2, 4, 16, 14)
    y = F.conv2d(x, shared.weight, shared.bias, padding=3, dilation=3, groups=2)
    y = F.conv2d(y, model[1].weight, model[1].bias, 2, padding=6, dilation=3)
    y = F.conv2d(y.relu(), shared.weight, shared.bias, padding=3, dilation=3, groups=2)
    torch.testing.assert_close(wide(x), y)
    torch.testing.assert_close(copy.deepcopy(wide)(x[0]), y[0])
    with torch.no_grad():
        wide[1].parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(wide(x), y), "the kernel is still computed"
    assert type(model[1]).__name__ == "ParametrizedConv2d"
    parametrize.remove_parametrizations(wide[1], "weight")
    assert "weight" in dict(wide[1].named_parameters())
    assert wide[1].scale == 3
    assert parametrize.is_parametrized(model[1], "weight")
    volumes = redilate(nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1)), 1.5, layers="?")
    assert [type(m).__name__ for m in volumes] == ["ScheduledConv3d", "ScheduledConv1d"]
    assert volumes[0](noise(1, 2, 5, 6, 7)).shape == (1, 2, 5, 6, 7)


def test_inner_layers_of_any_network() -> None:
    model = create_model("eca_resnet18", num_classes=3).eval()
    with pytest.raises(ValueError, match="give patterns, or an example"):
        redilate(model, 2)
    wide = redilate(model, 2, example=noise(1, 3, 64, 64))
    chosen = list(wide.redilate_report.layers)
    assert chosen
    assert all(not name.startswith("stem.0") for name in chosen)
    few = redilate(network(), 2, example={"x": noise(1, 4, 8, 8), "timestep": 3, "context": noise(1, 5)})
    measured = {*INNER, "down_blocks.0.downsamplers.0.conv"} - {"up_blocks.0.upsamplers.0.conv"}
    assert set(few.redilate_report.layers) == measured
    by_rule = redilate(network(), 2, layers=lambda name, conv: conv.stride == (2, 2))
    assert list(by_rule.redilate_report.layers) == ["down_blocks.0.downsamplers.0.conv"]


def test_refusals() -> None:
    net = network()

    class Scaled(nn.Conv2d):
        pass

    odd = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        Scaled(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 4),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
        nn.Conv2d(4, 4, 1),
    )
    wide = redilate(odd, 2, layers="*")
    assert list(wide.redilate_report.layers) == ["4"]
    why = wide.redilate_report.kept
    assert [word in why[str(i)] for i, word in enumerate(("padding_mode", "Scaled", "odd", "padding=(0, 0)"))] == [
        True
    ] * 4
    assert "3: kept, padding=(0, 0)" in str(wide.redilate_report)
    with pytest.raises(ValueError, match=r"no layer can be re-dilated .*Scaled computes in its own way"):
        redilate(odd, 2, layers="1")
    with pytest.raises(ValueError, match="same size on every axis"):
        redilate(odd, layers={}, disperse="4")
    with pytest.raises(ValueError, match=r"scale=1\.5: dispersion halves it"):
        redilate(net, 1.5, disperse="mid_block.*", layers="mid_block.*")
    with pytest.raises(ValueError, match=r"layers='midblock\.\*': matches no convolution"):
        redilate(net, layers={"mid_block.*": 2, "midblock.*": 3})
    with pytest.raises(ValueError, match=r"layers='5'"):
        redilate(odd, 2, layers="5")
    with pytest.raises(ValueError, match="re-dilated already"):
        redilate(redilate(net, 2), 2)
    for name, options in (
        ("scale", {}),
        ("scale", {"scale": 2, "layers": {"*": 2}}),
        ("factor", {"scale": 0.5}),
        ("steps", {"scale": 2, "steps": (51, 50)}),
        ("steps", {"scale": 2, "steps": (5,)}),
        ("steps", {"scale": 2, "steps": 5}),
        ("timesteps", {"scale": 2, "steps": (5, 10), "timesteps": [3.0, 2.0]}),
        ("timesteps", {"scale": 2, "steps": (5, 10), "timesteps": 0}),
        ("progressive", {"scale": 2, "progressive": True}),
        ("disperse_steps", {"scale": 2, "disperse": "mid_block.*", "disperse_steps": 3}),
        ("dispersion", {"scale": 2, "disperse": "mid_block.*", "dispersion": {"sizes": 3}}),
        ("argument", {"scale": 2, "steps": (5, 10), "argument": "sigma"}),
    ):
        with pytest.raises(ValueError, match=f"^{name}="):
            redilate(net, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forward of Sequential takes input; name the one"):
        redilate(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), 2, layers="0", steps=(5, 10))
    with pytest.raises(ValueError, match="model='object'"):
        redilate(object(), 2)
    staged = redilate(net, 2, steps=(5, 10))
    with pytest.raises(ValueError, match="whole batch must be at one step"):
        call(staged, torch.tensor([981, 1]))
    with pytest.raises(ValueError, match="timestep=None: the network was called without it"):
        staged(noise(1, 4, 8, 8))
    with pytest.raises(ValueError, match="own way"):
        swap(redilate(net, 2), "dcls", where="mid_block.*")


def test_arguments_are_found_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor, *rest: Any, sigma: float = 0, **more: Any) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y

    net = Net()
    x = noise(1, 1, 9)
    for argument in ("sigma", "level"):
        wide = redilate(net, 2, layers="conv", steps=(1, 2), timesteps=(0.9, 0.1), argument=argument)
        assert torch.equal(wide(x, **{argument: 0.1}), net(x))
        assert not torch.equal(wide(x, **{argument: 0.8}), net(x))
    assert Argument.timestep(network()) == Argument("timestep", 1)


def test_guidance_in_the_place_of_the_network() -> None:
    net = network()
    many, few = redilate(net, 2, share=True), redilate(net, 2, layers="mid_block.*", share=True)
    guided = NoiseDampedGuidance(many, few, steps=(5, 10))
    for timestep, damped in ((901, True), (1, False)):
        vanilla, _ = call(few, timestep).chunk(2)
        uncond, text = call(many, timestep).chunk(2)
        first, second = call(guided, timestep).chunk(2)
        expected = noise_damped_guidance(vanilla if damped else uncond, uncond, text, 7.5)
        torch.testing.assert_close(first + 7.5 * (second - first), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call(NoiseDampedGuidance(many, many), 901), call(many, 901))
    assert guided.context == 6 - 1, "what else is asked of it, the network answers"
    with pytest.raises(AttributeError, match="nothing"):
        _ = guided.nothing
    assert torch.equal(call(copy.deepcopy(guided), 901), call(guided, 901))
    with pytest.raises(ValueError, match="batch=3"):
        call(guided, 901, batch=3)

    class Wrapped(nn.Module):
        """Extra inputs in a dictionary and in a list, and a tuple as the result."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, timestep: Any, more: dict[str, Any]) -> tuple[torch.Tensor, str]:
            return self.inner(x, timestep, more["context"][0]), "rest"

    pair = NoiseDampedGuidance(Wrapped(many), Wrapped(few))
    with torch.no_grad():
        y, rest = pair(noise(2, 4, 12, 16), timestep=901, more={"context": [noise(2, 5)], "scale": torch.tensor(1.0)})
    assert torch.equal(y, call(guided, 901))
    assert rest == "rest"
    with pytest.raises(ValueError, match="result=str"):
        NoiseDampedGuidance(nn.Identity(), Words())(noise(2, 1))


class Words(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "no tensor"


def test_compiled() -> None:
    wide = redilate(network(), 2.5, steps=(3, 5), progressive=True)
    compiled: Any = torch.compile(wide, backend="eager")
    for timestep in (800, 600, 400, 200, 0):
        torch.testing.assert_close(call(compiled, torch.tensor(timestep)), call(wide, timestep))
    exported = torch.export.export(redilate(network(), 2), (noise(2, 4, 12, 16), 9, noise(2, 5)))
    torch.testing.assert_close(call(exported.module(), 9), call(redilate(network(), 2), 9))


def test_of_a_compiled_network_the_one_inside_is_changed() -> None:
    net = network()
    wide = redilate(torch.compile(net, backend="eager"), 2, steps=(3, 5))
    assert type(wide) is SmallUNet
    assert torch.equal(call(wide, 800), call(redilate(net, 2), 800))
    assert torch.equal(call(wide, 0), call(net, 0))


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = create_model("small_unet", in_channels=4, channels=(8, 12), context=5)
    times = [999.0, 700.0, 300.0, 5.0]
    wide: Any = redilate(
        base,
        layers={"mid_block.*": 4, "up_blocks.0.*": 2.5},
        steps=2,
        timesteps=torch.tensor(times),
        progressive=True,
        disperse="mid_block.*",
        disperse_steps=1,
        dispersion={"size": 5},
    )
    again = load(save(wide, tmp_path / "net"))
    for timestep in times:
        assert torch.equal(call(again, timestep), call(wide, timestep))
    assert again.mid_block.resnets[0].conv1.matrix.dtype == torch.float64
    assert repr(again.mid_block.resnets[0].conv1).startswith("ScheduledConv2d(12, 12, kernel_size=(3, 3)")
