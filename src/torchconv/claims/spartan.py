"""The size that SpaRTAN's abstract gives, counted."""

from __future__ import annotations

from torchconv.claims import Evidence, Progress, claim

_PARAMETERS, _GIGA = 3.8e6, 1.0


@claim(
    key="spartan",
    says="The network has 3.8 M parameters and needs about 1.0 GFLOPs.",
    source="arXiv 2507.10999, abstract",
    experiment="Parameters and multiplications of spartan_s counted by PyTorch's counter at 224 and 256 pixels; the "
    "larger of the two relative deviations at 256. The count is exact, so the interval has no width.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Minus the largest deviation from the published size, supported where it is within 5 percent."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from torchconv.models.classify.spartan import spartan_s

    with torch.device("meta"):
        model = spartan_s().eval()
    parameters = sum(p.numel() for p in model.parameters())
    counted = {}
    for side in (224, 256):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side, device="meta"))
        counted[str(side)] = counter.get_total_flops() / 2e9
    effect = -100 * max(abs(parameters / _PARAMETERS - 1), abs(counted["256"] / _GIGA - 1))
    return Evidence(
        effect=effect,
        low=effect,
        high=effect,
        unit="percent",
        meaning="minus the larger deviation of parameters and giga-multiplications at 256 pixels from 3.8 M and 1.0",
        threshold=-5.0,
        measurements={"parameters": parameters, "giga_multiplications": counted},
    )
