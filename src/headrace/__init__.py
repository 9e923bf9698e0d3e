"""headrace serves open large language models elastically behind one OpenAI-compatible address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.control.serve import System, serve

__version__ = "0.1.0"
__all__ = ["System", "__version__", "serve"]


def __getattr__(name: str) -> Any:
    """Import `serve` and `System` on first use: every process of ours imports this package, few need them."""
    if name in ("serve", "System"):
        from headrace.control import serve as module

        return getattr(module, name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
