"""What a task's inputs and outputs travel as (SPEC §16.3): plain data and arrays, and nothing that runs.

Rules
- A numpy array stays one, a torch tensor stays one where torch is loaded. What is read of an array is a view of the buffer.
- What is not of these kinds is the caller's mistake, a `ShapeError`; what cannot be read is the peer's, a `ProtocolError`.
- Axis 0 counts the inputs: of an array, and of a dictionary or list of arrays that agree on it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import msgpack
import numpy as np

from ..protocol.errors import ProtocolError, ShapeError
from ..protocol.schema import Buffer

Value: TypeAlias = Any
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

ARRAY, PLAIN = 0, 1
NUMPY, TORCH = 0, 1
EXT = 1
MAX_DIMENSIONS = MAX_DEPTH = 32
DTYPES: tuple[str, ...] = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16"),
)
BFLOAT16 = DTYPES.index("bfloat16")
_STORED = tuple(np.dtype("<u2" if name == "bfloat16" else name).newbyteorder("<") for name in DTYPES)
_NUMBERS = {name: number for number, name in enumerate(DTYPES)}


class Unloaded(np.ndarray[Any, np.dtype[Any]]):
    """A torch tensor where torch is not loaded: its rows can be cut and joined, and it can be sent on.

    Attributes:
        name: of its dtype; bfloat16 is kept as its 16 bits.
    """

    name: str

    def __array_finalize__(self, other: Any) -> None:
        self.name = getattr(other, "name", "")


def pack(value: Value) -> bytes:
    """The bytes of a value.

    Raises:
        ShapeError: it holds something that is neither plain data nor an array.
    """
    if isinstance(value, np.ndarray) or _is_torch(value):
        return _pack_array(value)
    try:
        packed: bytes = msgpack.packb(_plain(value, 0))
    except (OverflowError, ValueError, UnicodeError) as error:
        raise ShapeError(f"a task's data cannot be sent: {error}") from None
    return bytes((PLAIN,)) + packed


def unpack(buffer: Buffer) -> Value:
    """The value of these bytes. Arrays are views of them; a torch tensor is `Unloaded` where torch is not loaded.

    Raises:
        ProtocolError: `malformed`: `pack` would not have written this.
    """
    view = memoryview(buffer)
    if len(view) and view[0] == ARRAY:
        return _unpack_array(view)
    if not len(view) or view[0] != PLAIN:
        raise _malformed("a value that is neither an array nor plain data")
    try:
        found = msgpack.unpackb(view[1:], ext_hook=_extended, strict_map_key=True, raw=False)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises many types: all of them are the peer's fault
        raise _malformed(f"a value that is not msgpack: {type(error).__name__}") from None
    _check(found, 0)
    return found


def rows(value: Value) -> int | None:
    """How many inputs a value has along axis 0; None where it has no such axis."""
    if isinstance(value, dict | list) and value:
        found = {rows(part) for part in (value.values() if isinstance(value, dict) else value)}
        return found.pop() if len(found) == 1 else None
    if isinstance(value, np.ndarray) or _is_torch(value):
        return int(value.shape[0]) if value.ndim else None
    return None


def cut(value: Value, start: int, stop: int) -> Value:
    """The inputs `[start, stop)` of a value that has rows. Views."""
    if isinstance(value, dict):
        return {key: cut(part, start, stop) for key, part in value.items()}
    if isinstance(value, list):
        return [cut(part, start, stop) for part in value]
    return value[start:stop]


def join(values: Sequence[Value]) -> Value:
    """Values one after the other along axis 0.

    Raises:
        ShapeError: they differ in kind, dtype or another axis.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if not all(alike(first, other) for other in values[1:]):
        raise ShapeError("values of different kinds cannot be joined")
    if isinstance(first, dict):
        return {key: join([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [join([value[place] for value in values]) for place in range(len(first))]
    if isinstance(first, np.ndarray):
        joined = np.concatenate(values)
        return _unloaded(joined, first.name) if isinstance(first, Unloaded) else joined
    import torch

    return torch.cat(list(values))


def alike(one: Value, other: Value) -> bool:
    """Can these be joined along axis 0?"""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) > 0 and all(map(alike, one, other))
    if isinstance(one, np.ndarray) or _is_torch(one):
        return bool(one.ndim and other.ndim and one.dtype == other.dtype and one.shape[1:] == other.shape[1:])
    return False


# --- arrays


def _pack_array(array: Any) -> bytes:
    if isinstance(array, Unloaded):
        kind, name, flat = TORCH, array.name, array.view(np.ndarray)
    elif isinstance(array, np.ndarray):
        kind, name, flat = NUMPY, array.dtype.name, array
        if array.dtype.names or name not in _NUMBERS:
            raise ShapeError(f"an array of dtype {array.dtype} cannot be sent", hint=f"one of {', '.join(DTYPES)}")
    else:
        import torch

        kind, name = TORCH, str(array.dtype).removeprefix("torch.")
        if name not in _NUMBERS or array.layout is not torch.strided:
            raise ShapeError(f"a {array.layout} tensor of {name} cannot be sent", hint=f"dense, of {', '.join(DTYPES)}")
        tensor = array.detach().cpu().contiguous()
        flat = tensor.view(torch.int16).numpy().view(np.uint16) if name == "bfloat16" else tensor.numpy()
    number = _NUMBERS[name]
    if flat.ndim > MAX_DIMENSIONS:
        raise ShapeError(f"an array of {flat.ndim} dimensions cannot be sent", hint=f"at most {MAX_DIMENSIONS}")
    head = bytes((ARRAY, flat.ndim, number, kind, 0, 0, 0, 0))
    sizes = b"".join(size.to_bytes(8, "little") for size in flat.shape)
    return b"".join((head, sizes, np.ascontiguousarray(flat, _STORED[number]).data.cast("B") if flat.size else b""))


def _unpack_array(view: memoryview) -> Any:
    if len(view) < 8:
        raise _malformed("an array without a head")
    dimensions, number, kind = view[1], view[2], view[3]
    start = 8 + 8 * dimensions
    if dimensions > MAX_DIMENSIONS or number >= len(DTYPES) or kind > TORCH or any(view[4:8]) or len(view) < start:
        raise _malformed("an array with a wrong head")
    if number == BFLOAT16 and kind == NUMPY:
        raise _malformed("a numpy array of bfloat16")
    shape = tuple(int.from_bytes(view[at : at + 8], "little") for at in range(8, start, 8))
    dtype = _STORED[number]
    if prod(shape) * dtype.itemsize != len(view) - start or any(size > 2**40 for size in shape):
        raise _malformed(f"an array of shape {list(shape)} in {len(view) - start} bytes")
    flat: Array = np.frombuffer(view, dtype, prod(shape), start) if prod(shape) else np.empty(0, dtype)
    if number == 0 and flat.size and int(flat.view(np.uint8).max()) > 1:
        raise _malformed("a boolean that is neither")
    array = flat.reshape(shape)
    if kind == NUMPY:
        return array
    torch = sys.modules.get("torch")
    if torch is None:
        return _unloaded(array, DTYPES[number])
    owned = array if array.flags.writeable else array.copy()
    if number == BFLOAT16:
        return torch.from_numpy(owned.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(owned)


# --- plain data


def _plain(value: Any, depth: int) -> Any:
    """The same of what msgpack has."""
    if depth > MAX_DEPTH:
        raise ShapeError(f"a task's data are nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.ndarray) or _is_torch(value):
        return msgpack.ExtType(EXT, _pack_array(value))
    if isinstance(value, np.generic):
        return _plain(value.item(), depth)
    if isinstance(value, list | tuple):
        return [_plain(part, depth + 1) for part in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(part, depth + 1) for key, part in value.items()}
    raise ShapeError(
        f"a {type(value).__name__} cannot be sent as a task's data",
        hint="numbers, texts, bytes, lists, dictionaries with texts as keys, numpy arrays, torch tensors",
    )


def _check(value: Any, depth: int) -> None:
    """Nothing but what `_plain` makes."""
    if depth > MAX_DEPTH:
        raise _malformed(f"a value that is nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        for part in value:
            _check(part, depth + 1)
    elif isinstance(value, dict):
        for key, part in value.items():
            if type(key) is not str:
                raise _malformed("a key that is no text")
            _check(part, depth + 1)
    elif isinstance(value, msgpack.Timestamp):
        raise _malformed("a time")


def _extended(code: int, data: bytes) -> Any:
    if code != EXT or not data or data[0] != ARRAY:
        raise _malformed(f"an extension of type {code}")
    return _unpack_array(memoryview(data))


def _unloaded(array: Array, name: str) -> Unloaded:
    found = array.view(Unloaded)
    found.name = name
    return found


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _malformed(what: str) -> ProtocolError:
    return ProtocolError("malformed", what)
