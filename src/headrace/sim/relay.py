"""A simulated relay: streams that wait for long are begun, and sent to HAProxy again under the same id.

Mirrors `replica.relay_connection` for messages instead of bytes, with its periods. Must not know what the
router decides.
"""

from __future__ import annotations

import msgspec

from headrace.replica.relay_passes import Passes, Word
from headrace.sim.haproxy import internal_address
from headrace.sim.http import HttpAgain, HttpError, HttpPiece, HttpRequest
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather, connect
from headrace.sim.timeline import Timer


class RelayProcess(Process):
    """One relay process."""

    def __init__(self, registry: Registry, host: Host, gateway: str, run_dir: str, weather: Weather) -> None:
        super().__init__(registry, f"relay-{gateway}", host)
        self.weather = weather
        self.internal = internal_address(run_dir, gateway)
        self._address = f"{run_dir}/{gateway}/relay.sock"
        self.passes: dict[_LaterPasses, None] = {}
        self.is_leaving = False
        self.num_refused = 0
        """Passes that came again because fronts refused them."""

    def begin(self) -> None:
        self.after(self.random.uniform(0.1, 0.5), self._start, "relay start")

    def _start(self) -> None:
        if not self.is_leaving:
            self.listen(self._address)

    def terminate(self) -> None:
        """SIGTERM: take nothing more, and end with the last request."""
        self.is_leaving = True
        self.stop_listening()
        self.end_if_idle()

    def end_if_idle(self) -> None:
        if self.is_leaving and not self.passes:
            self.exit(0)

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        connection.on_message = lambda request: self._on_request(request, connection)

    def _on_request(self, request: HttpRequest, client: End) -> None:
        self.passes[_LaterPasses(self, request, client)] = None


class _LaterPasses:
    """One request here: its client's end, and HAProxy's on the other side."""

    def __init__(self, owner: RelayProcess, request: HttpRequest, client: End) -> None:
        self._owner = owner
        self._request = request
        self._client = client
        self._far: End | None = None
        self._passes = Passes()
        self._is_begun = request.wait == "told"
        self._is_answered = False
        self._has_ended = False
        self._again: Timer | None = None
        client.on_close = self._end
        if self._is_begun:
            client.send(HttpPiece([]))  # the head, and the first comment
        self._send()

    def _send(self) -> None:
        owner = self._owner
        connect(owner, owner.weather, owner.internal, self._on_connected, self._on_refused)

    def _on_connected(self, far: End) -> None:
        if self._has_ended:
            far.close()
            return
        self._far = far
        far.on_message = self._on_answer
        far.on_close = self._on_far_closed
        far.send(msgspec.structs.replace(self._request, pass_name=self._passes.begin()))

    def _on_refused(self) -> None:
        if not self._has_ended:
            self._refuse(503, "the gateway is restarting or stopping")

    def _on_answer(self, message: HttpAgain | HttpError | HttpPiece) -> None:
        if self._has_ended:
            return
        if isinstance(message, HttpAgain):
            self._come_again(message.word)
        elif isinstance(message, HttpError):
            self._refuse(message.status, message.reason)
        else:
            self._is_answered = True
            self._client.send(message)
            if message.end:
                self._end()

    def _come_again(self, word: Word) -> None:
        self._drop_far()
        self._owner.num_refused += word == "refused"
        pause_s = self._passes.pause_s(word, self._owner.host.now_s())
        if pause_s is None:
            self._refuse(503, f"nobody takes it: {word}")
        else:
            self._again = self._owner.after(pause_s, self._send, "relay again")

    def _on_far_closed(self) -> None:
        self._far = None
        if self._has_ended:
            return
        if self._is_answered or self._is_begun:
            self._end()  # cut, and visibly so
        else:
            self._refuse(502, "the gateway closed this request without an answer")

    def _refuse(self, status: int, reason: str) -> None:
        self._client.send(HttpPiece([], "error", reason) if self._is_begun else HttpError(status, reason))
        self._end()

    def _drop_far(self) -> None:
        far, self._far = self._far, None
        if far is not None:
            far.close()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._again is not None:
            self._again.cancel()
        self._owner.passes.pop(self, None)
        self._drop_far()
        self._client.close()
        if self._owner.is_leaving:
            self._owner.after(0.0, self._owner.end_if_idle, "relay ends")
