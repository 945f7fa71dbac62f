"""A shard without torch's compiler: optimizers load it only to say that they are not compiled, which takes a second and memory.

Rules
- For the process of a shard alone, which compiles nothing.
- Whatever else is asked of the compiler loads it, and the asker does not notice.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


class Uncompiled(ModuleType):
    """In the compiler's place until it is needed."""

    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        """What is not compiled need not be kept from it."""
        return function if function is not None else self.disable

    def graph_break(self, *_: Any, **__: Any) -> None:
        """There is no graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # that is asked for by an import of what is within
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
            del torch._dynamo
        import torch._dynamo as compiler

        return getattr(compiler, name)


def compile_nothing() -> None:
    """Keep the compiler out of this process, unless it is there."""
    if NAME not in sys.modules:
        torch._dynamo = sys.modules[NAME] = Uncompiled(NAME)
