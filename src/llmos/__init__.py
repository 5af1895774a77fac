"""LLMOS, an operating system for private language models; see `llmos.open` and `llmos.create`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["System", "__version__", "create", "open", "verify"]

if TYPE_CHECKING:
    from llmos.system import System, create, verify
    from llmos.system import open_home as open

_LAZY = {"System": "System", "create": "create", "open": "open_home", "verify": "verify"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the system on first use: `import llmos` itself stays cheap."""
    if name in _LAZY:
        from llmos import system

        return getattr(system, _LAZY[name])
    raise AttributeError(f"module 'llmos' has no attribute {name!r}")
