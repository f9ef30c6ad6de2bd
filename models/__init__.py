"""Models: `build` composes one as the command line does, `load` reads a checkpoint. Imported on first use."""

from __future__ import annotations

__all__ = ["build", "load"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    from models import composition

    return getattr(composition, name)
