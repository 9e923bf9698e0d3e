"""vLLM behind the adapter's seam: its arguments, its engine core, its words for requests and outputs.

The only importer of vllm. Owns how vLLM is started, so that nothing of it outlives this process, and the
translation both ways. Must not know fronts, sockets or what is done with a step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.api.messages import (
    EngineReady,
    EngineSpec,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from headrace.engine.adapter import BackendOutput, BackendStep, without_end
from headrace.engine.last_words import LogMark
from headrace.engine.lora import adapter_arguments
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.threads import limit_spinning
from headrace.engine.vllm_blocks import BlockNames
from headrace.errors import ConfigError, EngineDead, HeadraceError, InvalidRequest, text_of

OWN_ARGUMENTS: Mapping[str, str] = {
    "model": "it is the endpoint's model",
    "tokenizer": "it is the model's own",
    "skip_tokenizer_init": "grammars need the tokenizer",
    "disable_log_stats": "the load comes from vLLM's statistics",
    "data_parallel_size": "use replicas",
    "enable_log_requests": "prompts do not belong into logs",
    "enable_lora": "name the adapters in vllm.lora",
}
"""Arguments that are not the user's, and why."""
_DEFAULTS: Mapping[str, Any] = {
    "enable_logging_iteration_details": True,  # how many prompt tokens were in a step
    "scheduling_policy": "priority",
    "structured_outputs_config": {"backend": "guidance"},  # grammars are llguidance's, as vLLM calls it
}
_VARIABLES = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # spawned processes ask the kernel to die with their parent
    "VLLM_NO_USAGE_STATS": "1",
}
_MAX_ERROR_CHARACTERS = 1500
_MAX_EVENTS_PER_STEP = 256
"""Messages about the prefix cache read after a step; a step sends one."""
_CLOSE_LIMIT_S = 1.0
"""For its processes to end by themselves; nothing runs there any more."""
_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "repetition": "stop",
    "length": "length",
    "abort": "aborted",
    "error": "error",
}


class VllmBackend:
    """One engine core of vLLM's, in processes of its own."""

    def __init__(self, llm: Any, private: Path, events: str, adapters: Mapping[str, str]) -> None:
        """`llm`: an AsyncLLM whose output handler does not run. `private`: a directory of its sockets,
        removed at the end. `events`: where it tells of its prefix cache; empty: nowhere. `adapters`: public
        name -> directory."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams as VllmSampling
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError

        self._llm = llm
        self._core = llm.engine_core
        self._sampling_type = VllmSampling
        self._grammar_type = StructuredOutputsParams
        self._dead_error = EngineDeadError
        self._private = private
        self._cache_events = _CacheEvents(events) if events else None
        self.ready = _describe(llm.vllm_config)
        self.adapters: Collection[str] = list(adapters)
        self._adapters = {
            name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1)
        }

    async def load_adapters(self) -> None:
        """Load each adapter once, before anyone asks: one that is bad would end the core in the middle of a
        step. Raises ConfigError, EngineDead."""
        for name, adapter in self._adapters.items():
            try:
                await self._llm.add_lora(adapter)
            except self._dead_error as error:
                raise _dead(error) from error
            except Exception as error:  # whatever its worker met while it read foreign files
                raise ConfigError(f"vLLM cannot use the LoRA adapter {name!r}: {_brief(error)}") from error

    async def submit(self, request: GenerationRequest) -> None:
        try:
            core_request = self._llm.input_processor.process_inputs(
                request.request_id,
                _prompt(request),
                self._sampling(request),
                supported_tasks=("generate",),
                lora_request=self._adapters[request.lora] if request.lora else None,
                priority=-request.priority,  # vLLM serves the lowest first
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequest(f"vLLM refuses the request: {_brief(error)}") from error
        core_request.external_req_id = request.request_id
        try:
            await self._core.add_request_async(core_request)
        except self._dead_error as error:
            raise _dead(error) from error

    async def abort(self, request_id: str) -> None:
        try:
            await self._core.abort_requests_async([request_id])
        except self._dead_error as error:
            raise _dead(error) from error

    async def next_step(self) -> BackendStep:
        try:
            message = await self._core.get_output_async()
        except self._dead_error as error:
            raise _dead(error) from error
        step = read_step(message)
        if self._cache_events is not None:
            step.evicted = self._cache_events.read()
        return step

    async def check(self) -> None:
        try:
            await self._llm.is_sleeping()
        except self._dead_error as error:
            raise _dead(error) from error

    def close(self) -> None:
        try:
            self._llm.shutdown(timeout=_CLOSE_LIMIT_S)
        finally:
            _kill_children()
            shutil.rmtree(self._private, ignore_errors=True)

    def _sampling(self, request: GenerationRequest) -> Any:
        grammar = None
        if request.grammar:
            grammar = self._grammar_type(grammar=_lark_of(request.grammar))
        return self._sampling_type(
            **sampling_arguments(request.sampling), structured_outputs=grammar, skip_clone=True
        )


class _CacheEvents:
    """What vLLM tells of its prefix cache, beside its outputs."""

    def __init__(self, address: str) -> None:
        import zmq

        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.subscribe(b"")
        self._socket.connect(address)
        self._nothing = zmq.Again
        self._no_wait = zmq.NOBLOCK
        self._names: BlockNames | None = BlockNames()

    def read(self) -> list[bytes]:
        """Return our hashes of the blocks that went since the last call."""
        gone: list[bytes] = []
        if self._names is None:
            return gone
        try:
            for _ in range(_MAX_EVENTS_PER_STEP):
                gone += self._names.read(self._socket.recv_multipart(self._no_wait)[-1])
        except self._nothing:
            pass
        except msgspec.DecodeError as error:
            # Where prompts go is decided without it; answers need none of it.
            print(f"engine: vLLM's cache events are not as expected: {error}", file=sys.stderr, flush=True)
            self._names = None
            self._socket.close()
        return gone


def start_vllm(spec: EngineSpec, on_phase: Callable[[str], None]) -> VllmBackend:
    """Check the arguments, start vLLM's processes, wait until they are ready.

    Raises ConfigError and ModelError for what starting again cannot help, EngineDead with vLLM's own words if
    its processes fail to start.
    """
    on_phase("finding the model")
    arguments = {
        "model": _model_directory(spec.model),
        **_DEFAULTS,
        **adapter_arguments(spec.lora),
        **checked_arguments(spec.vllm_args),
    }
    private = Path(tempfile.mkdtemp(prefix="headrace-vllm-"))  # of this user alone
    events = "" if "kv_events_config" in arguments else f"ipc://{private}/events"
    if events:
        arguments["kv_events_config"] = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": events,
        }
    limit_spinning()
    for name, value in (_VARIABLES | {"VLLM_RPC_BASE_PATH": str(private)}).items():
        os.environ.setdefault(name, value)
    try:
        return VllmBackend(_start(arguments, on_phase), private, events, spec.lora)
    except BaseException:  # a signal to end, too
        _kill_children()
        shutil.rmtree(private, ignore_errors=True)
        raise


def _start(arguments: Mapping[str, Any], on_phase: Callable[[str], None]) -> Any:
    """Return an AsyncLLM. Raises ConfigError for arguments that vLLM refuses, EngineDead if it fails."""
    on_phase("importing vLLM")
    from vllm.config import KVEventsConfig, StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    on_phase("checking vLLM's arguments")
    usage = UsageContext.OPENAI_API_SERVER  # its defaults, by the device, are those of `vllm serve`
    sections = {"kv_events_config": KVEventsConfig, "structured_outputs_config": StructuredOutputsConfig}
    try:
        made = {name: make(**arguments[name]) for name, make in sections.items() if arguments.get(name)}
        config = AsyncEngineArgs(**{**arguments, **made}).create_engine_config(usage)
    except MemoryError:
        raise
    except Exception as error:  # pydantic's, transformers', its own: it has no tree
        raise ConfigError(f"vLLM refuses its arguments: {_brief(error)}") from error
    on_phase("starting vLLM's engine core")
    log = LogMark()
    try:
        return AsyncLLM.from_vllm_config(config, usage_context=usage)
    except RuntimeError as error:
        raise EngineDead(f"vLLM did not start: {log.first_error() or _brief(error)}") from error


def checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's arguments. Raises ConfigError with all that are not the user's to set."""
    problems = [
        f"vllm.args.{name} cannot be set: {reason}"
        for name, reason in OWN_ARGUMENTS.items()
        if name in arguments
    ]
    if problems:
        raise ConfigError(problems)
    return dict(arguments)


def sampling_arguments(s: SamplingParams) -> dict[str, Any]:
    """Return vLLM's SamplingParams for ours, as keyword arguments."""
    return {
        "max_tokens": s.max_tokens,
        "min_tokens": s.min_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "min_p": s.min_p,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "repetition_penalty": s.repetition_penalty,
        "logit_bias": dict(s.logit_bias) or None,
        "logprobs": None if s.num_logprobs < 0 else s.num_logprobs,
        "seed": s.seed if s.temperature > 0 else None,
        "stop_token_ids": list(s.stop_token_ids),
        "ignore_eos": s.ignore_eos,
        "detokenize": False,
    }


def read_step(message: Any) -> BackendStep:
    """Return an EngineCoreOutputs in the adapter's words."""
    step = BackendStep(outputs=[_read_output(output) for output in message.outputs])
    for output in message.outputs:
        for event in output.events or ():
            step.num_preemptions += event.type.name == "PREEMPTED"
    stats = message.scheduler_stats
    if stats is None:
        return step
    step.num_running = stats.num_running_reqs
    step.kv_usage_ratio = min(1.0, max(0.0, stats.kv_cache_usage))
    step.prefix_query_tokens = stats.prefix_cache_stats.queries
    step.prefix_hit_tokens = stats.prefix_cache_stats.hits
    if stats.iteration_details is not None:
        step.num_prompt_tokens = stats.iteration_details.num_ctx_tokens
    if stats.spec_decoding_stats is not None:
        step.num_draft_tokens = stats.spec_decoding_stats.num_draft_tokens
        step.num_accepted_tokens = stats.spec_decoding_stats.num_accepted_tokens
    return step


def _read_output(output: Any) -> BackendOutput:
    token_ids = list(output.new_token_ids)
    logprobs = None if output.new_logprobs is None else _read_logprobs(output.new_logprobs)
    finish_reason = None if output.finish_reason is None else _FINISH_REASONS[str(output.finish_reason)]
    if str(output.finish_reason) == "stop":
        token_ids, logprobs = without_end(token_ids, logprobs)
    prefill = output.prefill_stats
    return BackendOutput(
        output.request_id,
        token_ids,
        finish_reason,
        logprobs,
        None if prefill is None else prefill.num_cached_tokens,
        "vLLM ended the request with an error; its log says why" if finish_reason == "error" else "",
    )


def _read_logprobs(lists: Any) -> list[TokenLogprobs]:
    """In each row the sampled token comes first, then the most likely ones."""
    return [
        TokenLogprobs(values[0], list(zip(token_ids[1:], values[1:])))
        for token_ids, values in zip(lists.logprob_token_ids.tolist(), lists.logprobs.tolist())
    ]


def _prompt(request: GenerationRequest) -> dict[str, Any]:
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.prompt_token_ids}
    if request.cache_salt:
        # Of the whole prompt: vLLM knows no first part that several salts share, so shared tokens are not.
        prompt["cache_salt"] = request.cache_salt
    return prompt


def _lark_of(grammar: str) -> str:
    """Return the grammar in the notation that vLLM hands to llguidance. Raises InvalidRequest."""
    try:
        (part,) = json.loads(grammar)["grammars"]
        lark = part["lark_grammar"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("the grammar is not one of llguidance's in Lark", param="grammar") from error
    # "::=" inside of a text would make it GBNF in the library's eyes.
    return str(lark).replace("::=", ":\\u003a=")


def _describe(config: Any) -> EngineReady:
    import vllm
    from vllm.platforms import current_platform

    model, cache = config.model_config, config.cache_config
    dtype = str(model.dtype).removeprefix("torch.")
    quantization = f" {model.quantization}" if model.quantization else ""
    return EngineReady(
        kind="vllm",
        architecture=model.architectures[0],
        vocab_size=model.get_vocab_size(),
        max_context_tokens=model.max_model_len,
        block_size=cache.block_size,
        num_total_blocks=cache.num_gpu_blocks or 0,
        max_running=config.scheduler_config.max_num_seqs,
        path=f"{dtype}{quantization} vLLM {vllm.__version__} on {current_platform.device_type}",
        phases={},
    )


def _model_directory(model: str) -> str:
    """Return where the model lies. Raises ModelError, ConfigError for what vLLM is not given."""
    files = resolve_model(model)
    if files.format != "huggingface":
        raise ConfigError(
            f"model is {model!r}, a {files.format} model; engine vllm takes a Hugging Face id or a directory "
            "with config.json, tokenizer.json and *.safetensors"
        )
    return str(files.path)


def _dead(error: BaseException) -> HeadraceError:
    return EngineDead(f"vLLM's engine core is gone: {_brief(error)}")


def _brief(error: BaseException) -> str:
    text = " ".join(text_of(error).split())
    return text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[:_MAX_ERROR_CHARACTERS]}…"


def _kill_children() -> None:
    """What vLLM did not end, ends; the children of its children ask the kernel for the same."""
    for child in multiprocessing.active_children():
        child.kill()
