"""The worker's loop: it performs the core's effects. Whoever waits drives it (DESIGN §4).

Rules
- One thread at a time drives: it alone touches the core and the sockets. Driving changes hands under a lock, which is the
  fence that ZeroMQ asks for.
- What is left (`leave`) while another thread drives, that thread gives to the core: who hands over often need not drive for it.
- A caller that waits drives until its ticket has ended. A background thread drives only while nobody waits: it renews the
  lease, takes in late answers, repeats what was lost.
- Every wait has a deadline, and Ctrl-C works in it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections import deque
from math import ceil
from typing import Any, Protocol

import zmq

from ..protocol.effects import Effect, Fail, Log, Open, Resolve, Send, Tick
from ..protocol.errors import ShoalError
from . import calls
from .wires import Wires

logger = logging.getLogger("shoal")

NAP = 0.005
"""Seconds between looks of the background thread while answers are outstanding and nobody drives."""
_CTRL_C = (signal.SIGINT,)
_mask = signal._signal.pthread_sigmask  # type: ignore[attr-defined]  # without the names that `signal` makes of each answer
_MAIN = threading.main_thread().ident
SLICE = 0.2
"""The longest single poll: Ctrl-C and other callers are seen at least so often."""


class Core(Protocol):
    """What the loop knows of a core."""

    @property
    def wake_at(self) -> float: ...

    def handle(self, event: Any, now: float) -> list[Effect]: ...

    def timed_out(self, seconds: float, now: float) -> Exception:
        """The error for a wait that has ended at its time-out."""
        ...


class Ticket:
    """The answer to come of one call."""

    __slots__ = ("__weakref__", "_error", "_loop", "_seen", "_value", "number", "over")

    def __init__(self, loop: Loop, number: int) -> None:
        self._loop, self.number = loop, number
        self.over = False
        self._value: Any = None
        self._error: Exception | None = None
        self._seen = False

    def done(self) -> bool:
        """Has it ended? Takes in what has arrived, and does not wait."""
        if not self.over:
            self._loop.glance()
        return self.over

    @property
    def failed(self) -> bool:
        """Has it ended in an error?"""
        return self._error is not None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end.

        Args:
            timeout: in seconds; None for the worker's own `wait_timeout`.

        Raises:
            WaitTimeout: it has not ended in time. It may still.
            ServerLost, WorkerEvicted, ShapeError, NonFiniteError: as the call says.
        """
        self._loop.wait(self, timeout)
        self._seen = True
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._value

    def _end(self, value: Any, error: Exception | None) -> None:
        self._value, self._error, self.over = value, error, True

    def __del__(self) -> None:
        if getattr(self, "_error", None) is not None and not self._seen:
            logger.warning("a call failed and nobody asked for its result: %s", self._error)


class Loop:
    """Drives one core.

    Args:
        secret: as `Wires`.
        wait_timeout: seconds, for waits that name none.
    """

    def __init__(self, core: Core, secret: bytes, wait_timeout: float) -> None:
        self._core, self._wait_timeout = core, wait_timeout
        self._wires = Wires(secret)
        self._tickets: dict[int, Ticket] = {}
        self._last_ticket = 0
        self._lock = threading.RLock()
        self._gate = threading.Condition(self._lock)
        self._driver = 0
        """The thread that drives, 0 for none."""
        self._queue = 0
        """Threads that want to drive; the driver gives way to them."""
        self._waiters = 0
        """Threads that are content to let another drive until their ticket has ended."""
        self._left: deque[Any] = deque()
        """Events for the driver to give to the core."""
        self._driven_at = time.monotonic()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._wires.poller.register(self._wake_in, zmq.POLLIN)
        self._alarm = threading.Event()
        self._dozing = False
        self._broken: BaseException | None = None
        self._closed = self._close_wanted = False
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _free, self._wires, (self._wake_in, self._wake_out), self._pid)
        self._finalizer.atexit = False
        self._thread = threading.Thread(target=_background, args=(weakref.ref(self),), name="shoal", daemon=True)
        self._thread.start()

    # --- what the client calls

    def call(self, make: Any, *args: Any) -> Ticket:
        """Give the core the event `make(ticket, *args)`. Does not wait."""
        self._check()
        self._take()
        try:
            if self._closed or self._broken is not None:
                self._check()
            with self._lock:
                self._last_ticket += 1
                ticket = Ticket(self, self._last_ticket)
            self._tickets[ticket.number] = ticket
            self._give(make(ticket.number, *args))
        finally:
            self._release()
        if self._dozing:
            self._alarm.set()
        return ticket

    def leave(self, make: Any, *args: Any) -> Ticket:
        """As `call`; but where another thread drives, that one gives it to the core, and soon."""
        self._check()
        with self._gate:
            self._last_ticket += 1
            ticket = Ticket(self, self._last_ticket)
            self._tickets[ticket.number] = ticket
            self._left.append(make(ticket.number, *args))
            idle, first = not self._driver, len(self._left) == 1
            if idle:
                self._driver = threading.get_ident()
        if idle:
            self._release()
            if self._dozing:
                self._alarm.set()
        elif first:
            self._poke()
        return ticket

    def tell(self, event: Any) -> None:
        """Give the core an event that wants no answer."""
        self._check()
        self._take()
        try:
            self._give(event)
        finally:
            self._release()
        if self._dozing:
            self._alarm.set()

    def patience(self, timeout: float | None) -> float:
        """Seconds that a call may wait, given what its caller said."""
        return self._wait_timeout if timeout is None else timeout

    def wait(self, ticket: Ticket, timeout: float | None) -> None:
        """Drive until a ticket has ended.

        Raises:
            WaitTimeout: it has not ended in time; ServerLost if that is because a server is silent.
        """
        if ticket.over:
            return
        self._check()
        now = time.monotonic()
        deadline = now + self.patience(timeout)
        while not ticket.over:
            if now >= deadline:
                raise self._timed_out(self.patience(timeout))
            if not self._take_or_wait(ticket, min(deadline - now, SLICE)):
                now = time.monotonic()
                continue
            try:
                while not (ticket.over or self._queue or self._close_wanted) and now < deadline:
                    self._turn(min(deadline - now, SLICE), ticket)
                    now = time.monotonic()
            finally:
                self._release()
                if self._close_wanted:
                    self.close()
            self._check()

    def result(self, ticket: Ticket, timeout: float | None) -> Any:
        """The answer; a call that nobody waits for any more is taken back. Raises as `Ticket.result`."""
        try:
            return ticket.result(timeout)
        except BaseException:
            if not ticket.over and self.usable:
                self.tell(calls.Cancelled(ticket.number))
            raise

    def _timed_out(self, seconds: float) -> Exception:
        self._take()
        try:
            return self._core.timed_out(seconds, time.monotonic())
        finally:
            self._release()

    def glance(self) -> None:
        """Take in what has arrived."""
        if self._closed or self._broken or not self._take_or_wait(None, 0.0):
            return
        try:
            self._turn(0.0)
        finally:
            self._release()

    def close(self) -> None:
        """Free everything. The core should have said goodbye before.

        In a signal handler that has interrupted a wait of this thread's, the wait frees it when it goes on.
        """
        if self._closed or self._pid != os.getpid():
            return
        if self._driver == threading.get_ident():
            self._close_wanted = True
            return
        self._closed = True
        self._alarm.set()
        self._poke()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)
        self._take()
        try:
            with self._gate:
                self._wake_out = -1
            self._finalizer()
            for ticket in list(self._tickets.values()):
                ticket._end(None, ShoalError("this worker was closed"))
                ticket._seen = True
            self._tickets.clear()
        finally:
            self._release()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def usable(self) -> bool:
        """Can calls be made?"""
        return not self._closed and self._broken is None and self._pid == os.getpid()

    # --- who drives

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ShoalError(
                "this worker was made in the parent process, and connections do not survive a fork",
                hint="shoal.connect() in the child, or keep the worker out of DataLoader workers",
            )
        if self._closed:
            raise ShoalError("this worker was closed", hint="shoal.connect() makes a new one")
        if self._broken is not None:
            raise ShoalError(
                f"this worker cannot go on: {type(self._broken).__name__}: {self._broken}"
            ) from self._broken

    def _take(self) -> None:
        """Become the driver; a thread that drives now is asked to stop."""
        me = threading.get_ident()
        if self._driver == me:
            raise ShoalError("a signal handler has called the worker whose wait it interrupts")
        with self._lock:
            if self._driver:
                self._queue += 1
                try:
                    while self._driver:
                        self._poke()
                        self._gate.wait(SLICE)
                finally:
                    self._queue -= 1
            self._driver = me

    def _take_or_wait(self, ticket: Ticket | None, seconds: float) -> bool:
        """Become the driver if nobody is; else wait for the driver to stop or to end the ticket."""
        with self._lock:
            if self._driver and ticket is not None and not ticket.over and seconds > 0:
                background = self._driver == self._thread.ident
                self._queue += background  # the background thread gives way; another caller drives for us both
                self._waiters += 1
                try:
                    if background:
                        self._poke()
                    self._gate.wait(seconds)
                finally:
                    self._waiters -= 1
                    self._queue -= background
            if self._driver:
                return False
            self._driver = threading.get_ident()
            return True

    def _release(self) -> None:
        error: BaseException | None = None
        while True:
            with self._lock:
                if not self._left or self._closed or self._broken is not None:
                    self._driver = 0
                    self._driven_at = time.monotonic()
                    if self._queue or self._waiters:
                        self._gate.notify_all()
                    break
            try:
                self._give(None)
            except BaseException as failure:  # then it is broken, and nobody drives any more
                error = failure
        if error is not None:
            raise error

    def _poke(self) -> None:
        """Interrupt the poll of whoever drives."""
        if self._wake_out >= 0:
            try:
                os.write(self._wake_out, b"!")
            except BlockingIOError:  # it is awake
                pass

    # --- driving

    def _turn(self, seconds: float, ticket: Ticket | None = None) -> None:
        """Poll once, at most so long, and handle what comes, but nothing after that which has ended `ticket`."""
        until = min(seconds, self._core.wake_at - time.monotonic())
        if self._wires.flush():
            until = min(until, 0.002)
        ready = self._wires.poller.poll(ceil(until * 1000) if until > 0 else 0)
        if (self._wake_in, zmq.POLLIN) in ready:
            _drain(self._wake_in)
        if self._left:
            self._give(None)
        for event in self._wires.events(ready):
            self._give(event)
            if ticket is not None and ticket.over:
                break
        if time.monotonic() >= self._core.wake_at:
            self._give(Tick())

    def _give(self, event: Any) -> None:
        """Give the core an event; None: what was left."""
        whole = False
        shielded = threading.get_ident() == _MAIN and signal.SIGINT not in _mask(signal.SIG_BLOCK, _CTRL_C)
        try:
            if event is not None:
                self._handle(event)
            while event is None and self._left:
                self._handle(self._left.popleft())
            whole = True
        except Exception as error:
            self._break(error)
            raise
        finally:
            if (
                not whole and self._broken is None
            ):  # Ctrl-C in the middle, through another thread: the core may be in two minds
                self._break(KeyboardInterrupt("interrupted"))
            if shielded:
                _mask(signal.SIG_UNBLOCK, _CTRL_C)

    def _handle(self, event: Any) -> None:
        for effect in self._core.handle(event, time.monotonic()):
            self._perform(effect)

    def _break(self, error: BaseException) -> None:
        self._broken = error
        for ticket in list(self._tickets.values()):
            ticket._end(None, ShoalError(f"this worker cannot go on: {type(error).__name__}: {error}"))
            ticket._seen = True
        self._tickets.clear()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer, message):
                self._wires.send(peer, message)  # type: ignore[arg-type]
            case Resolve(number, value):
                self._end(number, value, None)
            case Fail(number, error):
                self._end(number, None, error)
            case Open():
                self._wires.open(effect)
            case Log(level, text):
                logger.log(logging.getLevelName(level.upper()), text)

    def _end(self, number: int, value: Any, error: Exception | None) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is not None:
            ticket._end(value, error)
            if self._waiters:
                with self._gate:
                    self._gate.notify_all()

    # --- the background thread

    def _doze(self) -> float:
        """How long the background thread may sleep. Negative: the loop is over."""
        if self._closed or self._broken is not None:
            return -1.0
        quiet = 0.0 if self._driver else time.monotonic() - self._driven_at
        if quiet < NAP:  # whoever drove a moment ago may call again: a sleeper who need not be woken costs him nothing
            return NAP - quiet
        if self._tickets or time.monotonic() >= self._core.wake_at:
            return 0.0
        return min(max(self._core.wake_at - time.monotonic(), NAP), 1.0)

    def _attend(self) -> None:
        """Drive while nobody else wants to and something is outstanding."""
        with self._gate:
            if self._driver or self._queue or self._waiters:
                return
            self._driver = threading.get_ident()
        try:
            while not self._closed and self._queue == 0:
                self._turn(SLICE if self._tickets else 0.0)
                if not self._tickets:
                    break
        finally:
            self._release()


def _background(ref: weakref.ref[Loop]) -> None:
    """The quiet thread. It holds the loop only while it works, so that a forgotten worker can be collected."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _CTRL_C)
    while True:
        loop = ref()
        if loop is None:
            return
        seconds = loop._doze()
        if seconds < 0:
            return
        if seconds > 0:
            alarm = loop._alarm
            loop._dozing = seconds > NAP
            del loop
            alarm.wait(seconds)
            loop = ref()
            if loop is None:
                return
            alarm.clear()
            loop._dozing = False
            continue
        try:
            loop._attend()
        except Exception:
            logger.exception("the background thread of a worker has failed")
            return
        del loop


def _free(wires: Wires, pipe: tuple[int, int], pid: int) -> None:
    """What a loop holds of the operating system's. Also when it was forgotten: ZeroMQ waits for ever for an open socket."""
    if os.getpid() != pid:
        return
    wires.poller.unregister(pipe[0])
    wires.close()
    for fd in pipe:
        os.close(fd)


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass
