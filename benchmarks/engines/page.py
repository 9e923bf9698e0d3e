"""What the reports about engines share: who they were, who failed, how a ratio reads. Must not measure."""

from __future__ import annotations

from benchmarks.engines.catalogue import PeerEngine, engines, on_request
from benchmarks.engines.company import Company
from benchmarks.engines.models import BenchModel
from benchmarks.engines.running import QUESTION
from benchmarks.report import Table


def engines_table(model: BenchModel, company: Company) -> Table:
    """Return who answered, with what."""
    peers = {engine.name: engine for engine in [*engines(), *on_request()]}
    rows = []
    for engine in company.running:
        peer = peers.get(engine.name)
        weights = engine.weights
        if peer is not None:
            weights = model.file_format if engine.weights == "as in the file" else engine.weights
        rows.append(
            [
                engine.name,
                engine.title if peer is None else f"{peer.package} {version_of(peer)}",
                weights,
                f"{engine.start_s:.1f} s",
                f"`{QUESTION}{_brief(engine.answer)}`",
                "" if peer is None else peer.note,
            ]
        )
    headers = ("engine", "version", "weights", "start to first answer", "what it says", "")
    return Table(f"{model.title}: the engines", headers, rows)


def failures_of(model: BenchModel, company: Company) -> list[str]:
    """Return a sentence for each engine that is missing and each turn that failed."""
    lines = [f"{model.title}, {name}: {reason}" for name, reason in company.failures.items()]
    return [*lines, *company.turns_failed]


def ratio(ours: float | None, theirs: float) -> str:
    """Return how many times `theirs` ours is."""
    return "-" if not ours or not theirs else f"{ours / theirs:.2f}"


def version_of(peer: PeerEngine) -> str:
    """Return the version of the peer's package in its environment; a question mark if it cannot be seen."""
    pattern = f"lib/python*/site-packages/{peer.package.replace('-', '_')}-*.dist-info"
    found = [path.name.removesuffix(".dist-info").partition("-")[2] for path in peer.folder.glob(pattern)]
    return found[0] if len(found) == 1 else "?"


def _brief(text: str) -> str:
    return " ".join(text.replace("`", "'").split(" ")).replace("\n", "⏎")[:60]
