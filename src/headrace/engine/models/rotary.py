"""Rotary position embedding (arXiv:2104.09864): angles for positions, with linear and Llama 3 scaling.

Must not know layers or heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.engine.model_files.metadata import RopeScaling


class RotaryTable:
    """The rotary frequencies of one kind of layer."""

    def __init__(
        self, head_dim: int, theta: float, scaling: RopeScaling | None = None, divisors: Tensor | None = None
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = scale_frequencies(theta**-exponents, scaling)
        self._frequencies = frequencies if divisors is None else frequencies / divisors  # [head_dim / 2]

    def angles(self, positions_T: Tensor) -> Tensor:
        """Return the angles at `positions_T`, [T, head_dim / 2].

        In float32: bfloat16 cannot tell position 256 from 257.
        """
        return positions_T.to(torch.float32)[:, None] * self._frequencies

    def at(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [T, 1, head_dim] each; the first half of sin is negated (`Primitives`)."""
        angles = self.angles(positions_T)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Stretch rotary frequencies for contexts longer than those of pre-training."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3: how many times a frequency turns within the original context decides how much it is stretched.
    turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
    span = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-6)
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)
