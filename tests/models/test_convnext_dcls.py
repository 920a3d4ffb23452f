"""ConvNeXt-DCLS: sizes of the published variants, shared positions, merging."""

from __future__ import annotations

import pytest
import torch

from torchconv.models import create_model
from torchconv.models.classify.dcls import Block, ConvNeXtDCLS

PUBLISHED = {
    "convnext_dcls_tiny": (28_587_688, 97_920),
    "convnext_dcls_small": (50_217_064, 115_200),
    "convnext_dcls_base": (88_582_632, 153_600),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_parameter_counts(variant: str) -> None:
    with torch.device("meta"):
        model = create_model(variant)
    total, positions = PUBLISHED[variant]
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith(".P")) == positions


@pytest.mark.parametrize("version", ["v0", "gauss"])
def test_merge_is_exact(version: str) -> None:
    torch.manual_seed(0)
    model = ConvNeXtDCLS(
        num_classes=7,
        depths=(2, 1),
        dims=(6, 8),
        layer_scale_init_value=0.5,
        dcls_kernel_size=9,
        dcls_kernel_count=5,
        version=version,
    ).eval()
    x = torch.randn(2, 3, 32, 24)
    merged = model.merge()
    assert not any(n.endswith((".P", ".SIG")) for n in merged.state_dict())
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-6)
    assert isinstance(model.stages[0][0].dwconv, torch.nn.Module)
    assert "stages.0.1.dwconv.P" in model.state_dict()


def test_positions_are_shared_within_a_stage_only() -> None:
    model = ConvNeXtDCLS(depths=(2, 2), dims=(8, 8), dcls_kernel_size=5, dcls_kernel_count=4, version="gauss")
    blocks = [b for b in model.modules() if isinstance(b, Block)]
    assert blocks[0].dwconv.P is blocks[1].dwconv.P
    assert blocks[2].dwconv.SIG is blocks[3].dwconv.SIG
    assert blocks[0].dwconv.P is not blocks[2].dwconv.P


def test_drop_path_and_head() -> None:
    torch.manual_seed(1)
    model = ConvNeXtDCLS(depths=(1, 3), dims=(4, 8), drop_path_rate=0.5, dcls_kernel_size=3, dcls_kernel_count=2)
    assert [b.drop_path for b in model.modules() if isinstance(b, Block)] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    x = torch.randn(3, 3, 16, 16)
    assert model(x).isfinite().all()
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (3, 8)
    assert torch.equal(model.eval()(x), model(x))


def test_errors() -> None:
    with pytest.raises(ValueError, match="dcls_kernel_size"):
        ConvNeXtDCLS(dcls_kernel_size=16)
    with pytest.raises(ValueError, match="depths"):
        ConvNeXtDCLS(depths=(1, 1))
    with pytest.raises(ValueError, match="did you mean convnext_dcls"):
        create_model("convnext_dcls_huge")
