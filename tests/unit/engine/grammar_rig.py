"""A native engine with the fake runner over SmolLM2's real vocabulary, for answers held to grammars."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.api.messages import EngineSpec, GenerationRequest, StepOutput
from headrace.clock import VirtualClock
from headrace.engine.fake_runner import FakeRunner
from headrace.engine.fused_sampling import load_fused_sampling
from headrace.engine.grammar_queue import GrammarQueue
from headrace.engine.grammars import GrammarCompiler
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.model_files.vocabulary import read_token_bytes
from headrace.engine.native import NativeEngine
from headrace.engine.sampler import Sampler
from headrace.engine.speculation.speculator import Speculator

EOS = frozenset({0, 2})
MAX_STEPS = 3000


class Answer:
    """What came out for one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason = ""
        self.error = ""
        self.outputs: list[StepOutput] = []


class GrammarRig:
    """Reads the vocabulary once; each `run` is a fresh engine with the same compiled grammars. Its sampler is
    the compiled one, if there is one."""

    def __init__(self) -> None:
        self.token_bytes = read_token_bytes(read_metadata(resolve_model("smollm2-135m-instruct")))
        self.compiler = GrammarCompiler(lambda: self.token_bytes, EOS)

    def text(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes[token_id] for token_id in token_ids).decode()

    def engine(
        self,
        num_blocks: int = 512,
        max_running: int = 8,
        speculator: Speculator | None = None,
        sampler: Sampler | None = None,
    ) -> NativeEngine:
        runner = FakeRunner(num_blocks, vocab_size=len(self.token_bytes), eos_token_ids=EOS)
        spec = EngineSpec("native", "fake", max_running=max_running, token_budget=64, block_size=8)
        sampler = sampler or Sampler(load_fused_sampling())
        grammars = GrammarQueue(lambda: self.compiler)
        return NativeEngine(spec, runner, VirtualClock(), speculator, grammars, sampler)

    def run(
        self, requests: Sequence[GenerationRequest], engine: NativeEngine | None = None
    ) -> dict[str, Answer]:
        """Generate all answers together, with the engine's invariants checked after every step."""
        engine = engine or self.engine()
        for request in requests:
            engine.submit(request)
        answers = {request.request_id: Answer() for request in requests}
        for _ in range(MAX_STEPS):
            if not engine.has_work():
                return answers
            for output in engine.step().outputs:
                answer = answers[output.request_id]
                assert not answer.finish_reason, f"{output.request_id} gave output after its end"
                answer.outputs.append(output)
                answer.token_ids += output.token_ids
                answer.finish_reason, answer.error = output.finish_reason or "", output.error
            engine.check_integrity()
        raise AssertionError(f"not done after {MAX_STEPS} steps: {engine!r}")
