"""Fakes of what resumption deals with: an engine that does as it is told, siblings, and a stream."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.api.messages import EngineLoad, GenerationRequest, KvPlace, SamplingParams, Sibling, StepOutput
from headrace.errors import Overloaded, RequestError
from headrace.replica.engine_client import EngineState
from headrace.replica.engine_users import EngineStream
from headrace.replica.peer_link import HostedStream


class FakeStream:
    """Keeps what it is given."""

    def __init__(self, request_id: str = "r", prompt: tuple[int, ...] = (1, 2)) -> None:
        self.request = GenerationRequest(request_id, list(prompt), SamplingParams(max_tokens=100, seed=7))
        self.token_ids: list[int] = []
        self.engine_ns = 0
        self.hosts: list[str] = []
        self.error: RequestError | None = None
        self.finish_reason = ""
        self.lost: list[str] = []
        self.num_flushes = 0
        self.is_broken = False

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        assert not self.finish_reason, "an output after the end"
        self.token_ids += output.token_ids
        self.engine_ns = max(self.engine_ns, output.engine_ns)
        self.finish_reason = output.finish_reason or ""
        return True

    def flush(self) -> None:
        self.num_flushes += 1

    def on_engine_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def on_given_back(self, reason: str) -> None:
        self.lost.append(f"given back: {reason}")

    def on_broken(self) -> None:
        self.is_broken = True

    def on_resumed(self, host: str) -> None:
        self.hosts.append(host)

    def fail(self, error: RequestError) -> None:
        assert self.error is None, "failed twice"
        self.error = error


class FakeEngine:
    """One engine: its requests, and ways to let it step and die."""

    def __init__(self) -> None:
        self.state: EngineState = "ready"
        self.load: EngineLoad | None = EngineLoad()
        self.kv_place: KvPlace | None = KvPlace(1, 10)
        self.requests: dict[str, GenerationRequest] = {}
        self._streams: dict[str, EngineStream] = {}
        self.aborted: list[str] = []

    @property
    def streams(self) -> Mapping[str, EngineStream]:
        return self._streams

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    def submit(self, request: GenerationRequest, stream: EngineStream) -> None:
        if self.state != "ready":
            raise Overloaded(f"the engine is {self.state}")
        assert request.request_id not in self._streams
        self.requests[request.request_id] = request
        self._streams[request.request_id] = stream

    def abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def has_request(self, request_id: str) -> bool:
        return request_id in self._streams

    def give(self, request_id: str, output: StepOutput, now_s: float = 0.0) -> None:
        """One step with this output, for as long as the request is there."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if output.finish_reason is not None:
            del self._streams[request_id]
        if stream.on_output(output, now_s):
            stream.flush()

    def die(self, reason: str = "it died") -> None:
        self.state = "starting"
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_engine_lost(reason)


class FakePeers:
    """Siblings' engines by their paths."""

    def __init__(self) -> None:
        self.hosted: dict[tuple[str, str], tuple[GenerationRequest, HostedStream]] = {}
        self.aborted: list[tuple[str, str]] = []

    def submit(self, path: str, request: GenerationRequest, stream: HostedStream) -> None:
        assert (path, request.request_id) not in self.hosted
        self.hosted[path, request.request_id] = request, stream

    def abort(self, path: str, request_id: str) -> None:
        if self.hosted.pop((path, request_id), None) is not None:
            self.aborted.append((path, request_id))

    def at(self, path: str) -> list[GenerationRequest]:
        return [request for (where, _), (request, _) in self.hosted.items() if where == path]

    def give(self, path: str, output: StepOutput, now_s: float = 0.0) -> None:
        entry = self.hosted.get((path, output.request_id))
        if entry is None:
            return
        if output.finish_reason is not None:
            del self.hosted[path, output.request_id]
        entry[1].on_output(output, now_s)

    def die(self, path: str, reason: str = "it died") -> None:
        for key in [key for key in self.hosted if key[0] == path]:
            self.hosted.pop(key)[1].on_engine_lost(reason)

    def give_back(self, path: str, reason: str = "it is full") -> None:
        for key in [key for key in self.hosted if key[0] == path]:
            self.hosted.pop(key)[1].on_given_back(reason)


def make_sibling(name: str, num_open: int = 0, **fields: object) -> Sibling:
    values: dict[str, object] = {
        "peer_socket": f"/{name}",
        "stream_class": "A",
        "state": "ready",
        "num_open": num_open,
        "max_open": 10,
        **fields,
    }
    return Sibling(name, **values)  # type: ignore[arg-type]
