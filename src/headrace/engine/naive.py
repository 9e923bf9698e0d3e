"""The oracle: one request, no KV cache, every token recomputed from scratch in float32.

Shares with the paged engine only the weights' names and readers: its own forward pass, written from the
papers with plain torch. Slow on purpose. Must not know blocks, batches or operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from headrace.engine.model_files.metadata import RopeScaling, read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.weights.names import expected_shapes
from headrace.engine.weights.source import open_weights


class NaiveModel:
    """A decoder as a function from all tokens so far to the next token's logits."""

    def __init__(self, files: ModelFiles) -> None:
        """Read all weights in float32. Raises ModelError."""
        self._h = read_metadata(files).hyperparameters
        source = open_weights(files, self._h)
        self._weights = {name: source.read(name, torch.float32) for name in expected_shapes(self._h)}
        self._divisors = source.rope_divisors()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits after every token, float32 [len(token_ids), vocab_size]."""
        h, weights = self._h, self._weights
        x = weights["embedding"][torch.tensor(list(token_ids))] * h.embedding_scale
        for layer in range(h.num_layers):
            x = self._layer(x, layer)
        output = weights["embedding"] if h.is_tied else weights["output"]
        return self._norm(x, "final_norm") @ output.T

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Continue `prompt` greedily by `num_tokens` tokens."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.logits(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        h, weights, at = self._h, self._weights, f"layers.{layer}."
        attended = self._attention(self._norm(x, at + "attention_norm"), layer)
        x = x + (self._norm(attended, at + "post_attention_norm") if h.has_post_norms else attended)
        normed = self._norm(x, at + "mlp_norm")
        gate = normed @ weights[at + "gate"].T
        gate = functional.silu(gate) if h.activation == "silu" else functional.gelu(gate, approximate="tanh")
        out = (gate * (normed @ weights[at + "up"].T)) @ weights[at + "down"].T
        return x + (self._norm(out, at + "post_mlp_norm") if h.has_post_norms else out)

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        h, weights, at = self._h, self._weights, f"layers.{layer}."
        num_tokens = x.shape[0]
        q = (x @ weights[at + "q"].T).view(num_tokens, h.num_heads, h.head_dim)
        k = (x @ weights[at + "k"].T).view(num_tokens, h.num_kv_heads, h.head_dim)
        v = (x @ weights[at + "v"].T).view(num_tokens, h.num_kv_heads, h.head_dim)
        if h.has_qk_norm:
            q, k = self._norm(q, at + "q_norm"), self._norm(k, at + "k_norm")
        slides = bool(h.sliding_window and h.is_sliding_by_layer and h.is_sliding_by_layer[layer])
        q, k = self._rotate(q, slides), self._rotate(k, slides)
        heads = []
        for head in range(h.num_heads):
            kv_head = head * h.num_kv_heads // h.num_heads
            scores = q[:, head] @ k[:, kv_head].T * (h.attention_scale or h.head_dim**-0.5)
            for position in range(num_tokens):
                scores[position, position + 1 :] = -math.inf
                if slides:
                    scores[position, : max(position - h.sliding_window + 1, 0)] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, kv_head])
        return torch.cat(heads, dim=1) @ weights[at + "o"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self._h.norm_eps).sqrt() * self._weights[name]

    def _rotate(self, x: Tensor, slides: bool) -> Tensor:
        """Turn each pair (i, i + head_dim / 2) by position times its frequency."""
        h, half = self._h, self._h.head_dim // 2
        theta = h.rope_theta_sliding if slides and h.rope_theta_sliding else h.rope_theta
        scaled = not (slides and h.rope_theta_sliding)
        divisors = [1.0] * half if self._divisors is None or not scaled else self._divisors.tolist()
        turned = x.clone()
        for i in range(half):
            frequency = theta ** (-2 * i / h.head_dim) / divisors[i]
            frequency = _scaled(frequency, h.rope_scaling if scaled else None)
            angles = torch.arange(x.shape[0], dtype=torch.float64) * frequency
            cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
            turned[..., i] = x[..., i] * cos - x[..., i + half] * sin
            turned[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
        return turned


def _scaled(frequency: float, scaling: RopeScaling | None) -> float:
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_context_tokens / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_context_tokens / scaling.low_freq_factor:
        return frequency / scaling.factor
    turns = scaling.original_context_tokens / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency
