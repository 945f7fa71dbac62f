"""What is wrong with what a caller gives, said before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..protocol.errors import ConfigError, ShapeError
from ..protocol.join import MAX_NAME, is_name
from ..protocol.model import Tensor
from .arrays import Array


def wanted_names(
    names: str | Iterable[str] | None, out: Mapping[str, Array] | None, known: Mapping[str, Any]
) -> list[str]:
    if names is None:
        return list(out if out is not None else known)
    wanted = [names] if isinstance(names, str) else list(names)
    if out is not None and set(wanted) - set(out):
        raise ShapeError(f"out has no {sorted(set(wanted) - set(out))[0]!r}")
    return wanted


def checked_name(name: str) -> str:
    if not isinstance(name, str) or not is_name(name):
        raise ConfigError(f"a worker's name is a printable text of at most {MAX_NAME} bytes, not {name!r:.80}")
    return name


def check_out(wanted: Tensor, found: Tensor) -> None:
    if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
        raise ShapeError(f"out[{wanted.name!r}] is {found.dtype}{list(found.shape)}, registered as {wanted}")
