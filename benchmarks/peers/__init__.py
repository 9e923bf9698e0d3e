"""The data plane beside its peers: the same load, in turns, in one run. See docs/guides/benchmarks.md.

`make peers` installs the peers, each into its own environment; one that is missing is left out, and named.
"""

from benchmarks.peers.comparison import run

__all__ = ["run"]
