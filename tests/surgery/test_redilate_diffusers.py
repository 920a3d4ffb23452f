"""Networks and pipelines of diffusers, re-dilated by the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchconv.models.generate.guidance import NoiseDampedGuidance, noise_damped_guidance
from torchconv.surgery import redilate
from torchconv.weights import load, save


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def their_unet(diffusers: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def test_a_diffusers_unet(diffusers: Any, tmp_path: Path) -> None:
    unet = their_unet(diffusers)
    wide = redilate(unet, 2, steps=(30, 50), disperse="mid_block.*", disperse_steps=10)
    assert type(wide) is type(unet)
    blocks = {name.split(".")[0] + name.split(".")[1] for name in wide.redilate_report.layers}
    assert blocks == {"down_blocks1", "mid_blockresnets", "up_blocks0"}
    by_hand = redilate(unet, 2)
    x, context = noise(2, 4, 16, 16), noise(2, 3, 16)
    with torch.no_grad():
        expected, plain = by_hand(x, 501, context).sample, unet(x, 1, context).sample
        assert torch.equal(wide(x, torch.tensor(501), encoder_hidden_states=context).sample, expected)
        assert torch.equal(wide(x, 1, context, return_dict=False)[0], plain)
        again = load(save(wide, tmp_path))
        assert type(again) is type(unet)
        for timestep in (981, 501, 1):
            assert torch.equal(again(x, timestep, context).sample, wide(x, timestep, context).sample)
    config = json.loads((tmp_path / "config.json").read_text())
    config["diffusers"] = "DDIMScheduler"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="diffusers='DDIMScheduler': is not a network"):
        load(tmp_path)


def test_a_diffusers_pipeline(diffusers: Any) -> None:
    """One with classifier-free guidance, as all of them do it, against a loop written out."""

    class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, unet: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, latent: torch.Tensor, contexts: torch.Tensor, steps: int) -> torch.Tensor:
            self.scheduler.set_timesteps(steps, device=self.device)
            for t in self.scheduler.timesteps:
                both = self.scheduler.scale_model_input(torch.cat([latent] * 2), t)
                uncond, text = self.unet(both.to(self.unet.dtype), t, encoder_hidden_states=contexts).sample.chunk(2)
                latent = self.scheduler.step(uncond + 7.5 * (text - uncond), t, latent).prev_sample
            return latent

    pipe = Pipeline(their_unet(diffusers), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False))
    latent, contexts = noise(1, 4, 16, 16), noise(2, 3, 16)
    original = pipe(latent, contexts, 5)
    many = redilate(pipe, 2, steps=(3, 5))
    assert many is not pipe
    assert many.unet is not pipe.unet
    assert many.scheduler is pipe.scheduler
    few = redilate(pipe, 2, layers="mid_block.*", steps=(2, 5), share=True)
    plain = many(latent, contexts, 5)
    wide, deep = many.unet, few.unet
    many.unet = NoiseDampedGuidance(wide, deep, steps=(2, 5))
    damped = many(latent, contexts, 5)
    assert torch.equal(pipe(latent, contexts, 5), original), "the pipeline that was given stays as it is"

    all_layers, deep_layers = redilate(pipe.unet, 2), redilate(pipe.unet, 2, layers="mid_block.*")
    for taus, found in (((3, 0), plain), ((3, 2), damped)):
        y = latent
        for i, t in enumerate(pipe.scheduler.timesteps):
            with torch.no_grad():
                net = all_layers if i < taus[0] else pipe.unet
                uncond, text = (net(y, t, c[None]).sample for c in contexts)
                vanilla = deep_layers(y, t, contexts[:1]).sample if i < taus[1] else uncond
            y = pipe.scheduler.step(noise_damped_guidance(vanilla, uncond, text, 7.5), t, y).prev_sample
        torch.testing.assert_close(found, y, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, original, rtol=1e-2)
    assert not torch.allclose(plain, damped, rtol=1e-2)
