"""What the structures of the compiled kernels look like from Python. Both change together."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class Matrix(Structure):
    """kernels/matrix.h: a packed weight."""

    _fields_ = [
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
    ]


class AttentionShape(Structure):
    """kernels/attention.h."""

    _fields_ = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("norm_eps", c_float),
        ("kv_kind", c_int32),
    ]


class AttentionBlock(Structure):
    """kernels/blocks.h."""

    _fields_ = [
        ("norm", c_void_p),
        ("qkv", Matrix),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("o", Matrix),
        ("post_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("shape", AttentionShape),
    ]


class MlpBlock(Structure):
    """kernels/blocks.h."""

    _fields_ = [
        ("norm", c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("post_norm", c_void_p),
        ("norm_eps", c_float),
        ("is_gelu", c_int32),
    ]


class RankPart(Structure):
    """kernels/ranks.h."""

    _fields_ = [
        ("state", c_void_p),
        ("watched", c_void_p),
        ("num_watched", c_int32),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("limit_ms", c_int32),
        ("spin_us", c_int32),
        ("attended", c_void_p),
        ("inner", c_void_p),
        ("output", c_void_p),
        ("first_attended", c_int32),
        ("first_inner", c_int32),
        ("first_output", c_int32),
        ("links", c_void_p),
        ("attended_starts", c_void_p),
        ("inner_starts", c_void_p),
        ("output_starts", c_void_p),
    ]


class Cut(Structure):
    """kernels/ranks.h."""

    _fields_ = [
        ("rows", c_void_p),
        ("num_rows", c_int32),
        ("row_bytes", c_int64),
        ("starts", c_void_p),
        ("unit_bytes", c_int32),
        ("owners", c_void_p),
    ]


class AttentionStep(Structure):
    """kernels/attention.h."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("num_requests", c_int32),
        ("block_size", c_int32),
        ("table_stride", c_int32),
        ("query_starts", c_void_p),
        ("context_lengths", c_void_p),
        ("block_tables", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
    ]
