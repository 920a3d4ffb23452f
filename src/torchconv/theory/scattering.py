"""Scattering: fixed convolutional feature extractors over semi-discrete frames, with bounds that can be computed.

Wiatowski, Bölcskei 2015, "A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction",
arXiv 1512.06293. Layer n filters with a frame Ψ_n, applies a Lipschitz non-linearity M_n, pools by S_n:

    U_n[λ]f = S_n^{d/2} · P_n( M_n(f ∗ g_λ) )(S_n ·),    Φ^n(f) = { U[q]f ∗ χ_n : q a path of n atoms }

χ_n, an atom of the next frame, gives the output. With Littlewood–Paley bounds A ≤ Σ_λ |ĝ_λ|² + |χ̂|² ≤ B, Lipschitz
constants L of M and R of P, and max(B_n, B_n·R_n²·L_n²) ≤ 1 in all layers (admissible), Φ is non-expansive and its
energy is at most that of f, for any filters. No parameters; all maps of a layer in one product of spectra, ΠK_n FFTs.

Here signals are periodic on a grid (Z_N)^d, where subsampling by S can multiply the energy by up to S^d if the factor
S^{d/2} is applied; ``norm="none"``, the default, leaves it out and keeps the bounds.

The wavelet special case, with Morlet wavelets and the modulus, is :func:`scattering_1d` and :func:`scattering_2d`.
"""

from __future__ import annotations

from torchconv.theory._scattering_audit import LayerBounds, audit, conv_bounds, lipschitz
from torchconv.theory._scattering_deform import (
    decay_constant,
    deform,
    deformation_bound,
    deformation_gap,
    translation_bound,
)
from torchconv.theory._scattering_frames import (
    curvelet_wedges,
    daubechies,
    directional_frame,
    frame,
    ridgelet_wedges,
    undecimated_frame,
    wavelet_frame,
    weyl_heisenberg_frame,
)
from torchconv.theory._scattering_network import (
    FrameLayer,
    FrameNetwork,
    energy,
    frame_bounds,
    frame_network,
    make_admissible,
)
from torchconv.theory._scattering_transform import scattering_1d, scattering_2d
from torchconv.theory._scattering_wavelets import MorletBank1d, MorletBank2d, morlet_bank_1d, morlet_bank_2d

__all__ = [
    "FrameLayer",
    "FrameNetwork",
    "LayerBounds",
    "MorletBank1d",
    "MorletBank2d",
    "audit",
    "conv_bounds",
    "curvelet_wedges",
    "daubechies",
    "decay_constant",
    "deform",
    "deformation_bound",
    "deformation_gap",
    "directional_frame",
    "energy",
    "frame",
    "frame_bounds",
    "frame_network",
    "lipschitz",
    "make_admissible",
    "morlet_bank_1d",
    "morlet_bank_2d",
    "ridgelet_wedges",
    "scattering_1d",
    "scattering_2d",
    "translation_bound",
    "undecimated_frame",
    "wavelet_frame",
    "weyl_heisenberg_frame",
]
