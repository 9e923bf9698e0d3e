"""The peer's application: an OpenAI-shaped stream inside one Ray Serve replica, run by `.peers/ray-serve`.

It is Ray Serve's best case: bytes are made ahead, nothing is tokenized or detokenized, and tokens that wait
for the loop leave in one piece. One task gives every open stream a token per step, on a grid, like headrace's
simulated engine. Must not import headrace: it lives in another environment.

`python ray_serve_app.py PORT TEMP_DIR python|haproxy [REPLICAS [STEP_MS]]`; it serves until SIGTERM or until
stdin closes.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

MODEL = "chat"
APPLICATION = "peer"
MAX_OPEN = 4096
TEXT = "[simulated] channel turbine current pouring flowing streams brimful sluices "
app = FastAPI()


class Stream:
    """One answer: how many tokens may leave, and how many have."""

    __slots__ = ("max_tokens", "num_ready", "wake")

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_ready = 0
        self.wake = asyncio.Event()


class StepGrid:
    """Gives every open stream one token per step; busy steps are on a grid: late ones add no drift."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._streams: set[Stream] = set()
        self._task: asyncio.Task[None] | None = None

    def open(self, max_tokens: int) -> Stream:
        stream = Stream(max_tokens)
        self._streams.add(stream)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return stream

    def close(self, stream: Stream) -> None:
        self._streams.discard(stream)

    async def _run(self) -> None:
        end_s = time.monotonic()
        while self._streams:
            end_s = max(end_s, time.monotonic() - self.step_s) + self.step_s
            await asyncio.sleep(end_s - time.monotonic())
            for stream in list(self._streams):
                stream.num_ready += 1
                stream.wake.set()
                if stream.num_ready >= stream.max_tokens:
                    self._streams.discard(stream)


# Above the class: `serve.ingress` pickles it, with what it uses, at the moment of its definition.
def chunk_frame(request_id: str) -> tuple[bytes, bytes]:
    """Return what stands before and after a chunk's delta: the bytes of headrace's front."""
    head = (
        f'data: {{"id":"{request_id}","object":"chat.completion.chunk","created":{int(time.time())},'
        f'"model":"{MODEL}","system_fingerprint":"headrace-simulated","choices":[{{"index":0,"delta":'
    )
    return head.encode(), b',"logprobs":null,"finish_reason":null}],"usage":null}\n\n'


def last_chunks(request_id: str, num_tokens: int) -> bytes:
    """Return the chunk with the reason, the one with the usage, and the end."""
    head, _ = chunk_frame(request_id)
    reason = head + b'{},"logprobs":null,"finish_reason":"length"}],"usage":null}\n\n'
    usage = (
        head.partition(b'"choices":')[0]
        + (
            f'"choices":[],"usage":{{"prompt_tokens":1,"completion_tokens":{num_tokens},'
            f'"total_tokens":{num_tokens + 1}}}}}\n\n'
        ).encode()
    )
    return reason + usage + b"data: [DONE]\n\n"


@serve.deployment(num_replicas=1, max_ongoing_requests=MAX_OPEN, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Replica:
    """Front and engine in one: what Ray Serve calls a replica."""

    def __init__(self, step_s: float) -> None:
        self._grid = StepGrid(step_s)
        self._num_requests = 0

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.put("/step/{milliseconds}")
    async def set_step(self, milliseconds: float) -> dict[str, float]:
        """Set the length of a step: the benchmark's next stage begins."""
        self._grid.step_s = milliseconds / 1e3
        return {"step_ms": milliseconds}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> StreamingResponse:
        body = json.loads(await request.body())
        self._num_requests += 1
        chunks = self._stream(f"chatcmpl-{self._num_requests:024x}", body.get("max_tokens", 16))
        return StreamingResponse(chunks, media_type="text/event-stream")

    async def _stream(self, request_id: str, max_tokens: int) -> AsyncIterator[bytes]:
        head, tail = chunk_frame(request_id)
        stream = self._grid.open(max_tokens)
        num_sent = 0
        pending = head + b'{"role":"assistant","content":""}' + tail
        try:
            while num_sent < max_tokens:
                await stream.wake.wait()
                stream.wake.clear()
                while num_sent < stream.num_ready:
                    letter = TEXT[num_sent % len(TEXT)].encode()
                    pending += head + b'{"content":"' + letter + b'"}' + tail
                    num_sent += 1
                yield pending
                pending = b""
        finally:
            self._grid.close(stream)
        yield last_chunks(request_id, max_tokens)


def build(is_direct: bool, num_replicas: int, step_s: float) -> Any:
    """Return the application; `is_direct`: with Ray Serve LLM's router, which HAProxy asks per request."""
    replicas = Replica.options(num_replicas=num_replicas)
    if not is_direct:
        return replicas.bind(step_s)
    # The wiring of ray.serve.llm's build_openai_app with direct streaming on, around our replica.
    from ray.llm._internal.serve.core.ingress.router import LLMRouter
    from ray.serve.config import RequestRouterConfig
    from ray.serve.experimental.round_robin_router import RoundRobinRouter

    choice = RequestRouterConfig(request_router_class=RoundRobinRouter)
    replica = replicas.options(request_router_config=choice).bind(step_s)
    router = serve.deployment(LLMRouter, max_ongoing_requests=MAX_OPEN, ray_actor_options={"num_cpus": 0})
    return replica._with_ingress_request_router(router.bind(server=replica))


def main() -> int:
    port, temp_dir, proxy = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    num_replicas = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    step_s = float(sys.argv[5]) / 1e3 if len(sys.argv) > 5 else 0.005
    ray.init(
        num_cpus=2,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        _temp_dir=temp_dir,
        log_to_driver=False,
        object_store_memory=128 * 1024 * 1024,
    )
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
    application = build(proxy == "haproxy", num_replicas, step_s)
    serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
    print("ready", flush=True)
    os.read(0, 1)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
