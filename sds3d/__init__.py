"""Text to 3D by score distillation: ``sds3d.generate("a red mug")`` makes a coloured mesh.

Importing the package does not import torch. Its functions and classes are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sds3d.runtime import threads

if TYPE_CHECKING:
    from sds3d.api import Asset, Generated, Painting, generate, load_generator, paint, resume, train_generator

threads.prepare()  # before torch is imported

__version__ = "0.1.0"
__all__ = ["Asset", "Generated", "Painting", "generate", "load_generator", "paint", "resume", "train_generator"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sds3d import api

        return getattr(api, name)
    raise AttributeError(f"module 'sds3d' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
