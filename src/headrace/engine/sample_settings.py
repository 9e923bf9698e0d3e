"""One request's sampling parameters and penalties, as the compiled sampler reads them.

Owns that memory; a request has it from its first token to its end. Must not know logits or other requests.
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_double, c_float, c_int32, c_uint64, c_void_p
from typing import Any

from numpy.typing import NDArray

from headrace.api.messages import SamplingParams
from headrace.engine.penalties import Penalties, SeenTokens

_MASK_64 = (1 << 64) - 1


class SampleSettings(Structure):
    """The same fields in the same order as `SampleSettings` in kernels/sampling.h."""

    _fields_ = [
        ("seed", c_uint64),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("top_k", c_int32),
        ("num_top", c_int32),
        ("repetition", c_float),
        ("frequency", c_float),
        ("presence", c_float),
        ("num_seen", c_int32),
        ("num_generated", c_int32),
        ("num_biases", c_int32),
        ("num_stops", c_int32),
        ("seen", c_void_p),
        ("generated", c_void_p),
        ("counts", c_void_p),
        ("biased", c_void_p),
        ("biases", c_void_p),
        ("stops", c_void_p),
    ]


class RowSettings:
    """Valid while it lives; `update` before each row."""

    __slots__ = ("_arrays", "_penalties", "_settings", "address")

    def __init__(self, sampling: SamplingParams, penalties: Penalties | None = None) -> None:
        self._settings = SampleSettings(
            seed=sampling.seed & _MASK_64,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            num_top=sampling.num_logprobs,
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )
        self.address = addressof(self._settings)
        self._penalties = penalties
        self._arrays: dict[str, NDArray[Any]] = {}
        """What the pointers point to."""
        if penalties is not None:
            self._settings.num_biases = len(penalties.bias_ids)
            self._point("biased", penalties.bias_ids)
            self._point("biases", penalties.biases)
            self._point("stops", penalties.stop_ids)

    def update(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Take in the tokens that came since the last row. Does not grow with their number."""
        penalties, settings = self._penalties, self._settings
        if penalties is None:
            return
        penalties.count(token_ids, num_prompt_tokens)
        forbids_stops = penalties.forbids_stops(len(token_ids) - num_prompt_tokens)
        settings.num_stops = len(penalties.stop_ids) if forbids_stops else 0
        settings.num_seen = self._point_tokens("seen", penalties.seen)
        settings.num_generated = self._point_tokens("generated", penalties.generated)
        if settings.num_generated:
            self._point("counts", penalties.generated.all_counts)

    def _point_tokens(self, name: str, tokens: SeenTokens) -> int:
        num_tokens = len(tokens)
        if num_tokens:
            self._point(name, tokens.all_ids)
        return num_tokens

    def _point(self, name: str, array: NDArray[Any]) -> None:
        if self._arrays.get(name) is not array:
            self._arrays[name] = array
            setattr(self._settings, name, array.ctypes.data)
