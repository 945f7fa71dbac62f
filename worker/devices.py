"""Copies between a model on an accelerator and shoal's memory, beside what the accelerator computes (DESIGN §4).

Rules
- Gradients go out on a stream of their own, behind what has made them, while backward goes on; nobody reads them before `arrive`.
- Weights come in on the stream that computes, so that whoever uses them comes after; their source is not written before `settle`.
- Memory is page-locked once, where the driver allows it: otherwise the same copies are right, and wait.
- CUDA alone. A model on any other device is copied as torch copies it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

Bits: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

WORTH_LOCKING = 1 << 20
"""Bytes of memory of its own: smaller arrays may share a page with something else, and locking takes longer than copying."""


class Lanes(Protocol):
    """The copies of one device."""

    def lock(self, memory: Sequence[Bits]) -> None:
        """Copies from and to these vectors will come."""
        ...

    def take(self, name: str, gradient: torch.Tensor, into: torch.Tensor) -> None:
        """Copy a gradient to memory of this machine, once what is under way has made it."""
        ...

    def taken(self) -> Iterator[str]:
        """Names whose copies have ended since this was asked last, in the order of `take`. Does not wait."""
        ...

    def arrive(self) -> None:
        """Wait for all of `take`."""
        ...

    def bring(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """Copy weights to the device; what is computed there from now on finds them."""
        ...

    def settle(self) -> None:
        """Wait until all of `bring` have been read."""
        ...


class Cuda:
    """One CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[str, torch.cuda.Event]] = deque()
        self._brought: torch.cuda.Event | None = None
        self._locked: set[int] = set()

    def lock(self, memory: Sequence[Bits]) -> None:
        for vector in memory:
            address = vector.ctypes.data
            if address not in self._locked and vector.nbytes >= WORTH_LOCKING:
                runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                if int(runtime.cudaHostRegister(address, vector.nbytes, 0)) == 0:
                    self._locked.add(address)
                    weakref.finalize(vector, self._unlock, runtime, self._locked, address).atexit = False

    @staticmethod
    def _unlock(runtime: Any, locked: set[int], address: int) -> None:
        locked.discard(address)
        runtime.cudaHostUnregister(address)

    def take(self, name: str, gradient: torch.Tensor, into: torch.Tensor) -> None:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            into.copy_(gradient, non_blocking=True)
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record(self._out)
        gradient.record_stream(self._out)  # its memory is not given to others before it has been read
        self._under_way.append((name, ended))

    def taken(self) -> Iterator[str]:
        while self._under_way and self._under_way[0][1].query():  # type: ignore[no-untyped-call]
            yield self._under_way.popleft()[0]

    def arrive(self) -> None:
        self._under_way.clear()
        self._out.synchronize()

    def bring(self, values: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(values, non_blocking=True)
        self._brought = self._brought or torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._brought.record(torch.cuda.current_stream(self._device))

    def settle(self) -> None:
        if self._brought is not None:
            self._brought.synchronize()
            self._brought = None


def lanes_for(device: torch.device) -> Lanes | None:
    """The copies of a device; None where there is nothing to be copied, or torch does it."""
    return Cuda(device) if device.type == "cuda" else None
