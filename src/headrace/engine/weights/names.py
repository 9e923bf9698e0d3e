"""Which tensors a decoder has, with their shapes, and what each file format calls them. Pure tables.

Canonical names: `embedding`, `final_norm`, `output`, and `layers.N.PART` for the parts below.
Linear weights are [out_features, in_features].
"""

from __future__ import annotations

from headrace.engine.model_files.metadata import Hyperparameters

_GGUF_TOP = {"embedding": "token_embd", "final_norm": "output_norm", "output": "output"}
_HUGGINGFACE_TOP = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}

_GGUF_PARTS = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}
_HUGGINGFACE_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# The same Hugging Face word means another norm where there are post norms.
_HUGGINGFACE_POST_NORM_PARTS = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def expected_shapes(h: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that the model must have, in the order of loading."""
    parts = _part_shapes(h)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (h.vocab_size, h.hidden_size)}
    for layer in range(h.num_layers):
        shapes |= {f"layers.{layer}.{part}": shape for part, shape in parts.items()}
    shapes["final_norm"] = (h.hidden_size,)
    if not h.is_tied:
        shapes["output"] = (h.vocab_size, h.hidden_size)
    return shapes


def _part_shapes(h: Hyperparameters) -> dict[str, tuple[int, ...]]:
    query_size, kv_size = h.num_heads * h.head_dim, h.num_kv_heads * h.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (h.hidden_size,),
        "q": (query_size, h.hidden_size),
        "k": (kv_size, h.hidden_size),
        "v": (kv_size, h.hidden_size),
        "o": (h.hidden_size, query_size),
        "mlp_norm": (h.hidden_size,),
        "gate": (h.intermediate_size, h.hidden_size),
        "up": (h.intermediate_size, h.hidden_size),
        "down": (h.hidden_size, h.intermediate_size),
    }
    if h.has_qk_norm:
        shapes |= {"q_norm": (h.head_dim,), "k_norm": (h.head_dim,)}
    if h.has_post_norms:
        shapes |= {"post_attention_norm": (h.hidden_size,), "post_mlp_norm": (h.hidden_size,)}
    return shapes


def gguf_name(canonical: str) -> str:
    """llama.cpp's name of a tensor (gguf-py's tensor_mapping)."""
    top, layer, part = _split(canonical)
    return f"{_GGUF_TOP[top]}.weight" if top else f"blk.{layer}.{_GGUF_PARTS[part]}.weight"


def huggingface_name(canonical: str, has_post_norms: bool) -> str:
    """The name of a tensor in checkpoints of `transformers`."""
    top, layer, part = _split(canonical)
    if top:
        return f"{_HUGGINGFACE_TOP[top]}.weight"
    parts = _HUGGINGFACE_PARTS | (_HUGGINGFACE_POST_NORM_PARTS if has_post_norms else {})
    return f"model.layers.{layer}.{parts[part]}.weight"


def _split(canonical: str) -> tuple[str, str, str]:
    if "." not in canonical:
        return canonical, "", ""
    _, layer, part = canonical.split(".")
    return "", layer, part
