"""The worker's loop with a core that only echoes: who drives, who waits, what an interruption leaves (rung T2, ADR 3)."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from math import inf
from typing import Any

import pytest
import zmq
from conftest import until

from shoal.protocol.effects import Effect, Linked, Open, Received, Resolve, Send, Tick
from shoal.protocol.errors import ShoalError, WaitTimeout
from shoal.protocol.frames import decode, encode
from shoal.protocol.messages import Echo, Echoed
from shoal.worker import loop as loops
from shoal.worker.loop import Loop

Ask = make_dataclass("Ask", ["ticket"])
"""Resolved, with its own number, when the server has echoed it."""
Park = make_dataclass("Park", ["ticket"])
"""Resolved by a `Free`."""
Free = make_dataclass("Free", ["ticket"])
Spoil = make_dataclass("Spoil", ["error", "later"])
"""The core fails: at once, or in the next tick."""


class EchoCore:
    """One thread at a time may be in it. It knows who drove, and how often the main thread was about to poll."""

    def __init__(self, port: int = 0) -> None:
        self.wake, self.looks = inf, 0
        self.drivers: list[str] = []
        self._port, self._asked = port, set[int]()
        self._entered = threading.Lock()
        self._error: BaseException | None = None

    @property
    def wake_at(self) -> float:
        self.looks += threading.current_thread() is threading.main_thread()
        return self.wake

    def timed_out(self, seconds: float, now: float) -> Exception:
        return WaitTimeout(f"{seconds:g} s are over")

    def handle(self, event: Any, now: float) -> list[Effect]:
        assert self._entered.acquire(blocking=False), "two threads drive"
        try:
            return self._effects(event)
        finally:
            self._entered.release()

    def _effects(self, event: Any) -> list[Effect]:
        match event:
            case Ask(ticket):
                self._asked.add(ticket)
                if not self._port:
                    return [self._echo(ticket)]
                port, self._port = self._port, 0
                return [Open(0, "127.0.0.1", port, "")]
            case Linked():
                return [self._echo(ticket) for ticket in sorted(self._asked)]
            case Received(_, Echoed(ticket, (payload,))):
                self.drivers.append(threading.current_thread().name)
                self._asked.discard(ticket)
                return [Resolve(ticket, len(payload))]
            case Free(ticket):
                return [Resolve(ticket, "free")]
            case Spoil(error, later):
                if not later:
                    raise error
                self._error, self.wake = error, 0.0
            case Tick():
                self.drivers.append(threading.current_thread().name)
                self.wake = inf
                if self._error:
                    raise self._error
        return []

    def _echo(self, ticket: int) -> Effect:
        return Send(0, Echo(ticket, (b"x" * ticket,)))


@pytest.fixture
def port() -> Iterator[int]:
    """A server that echoes."""
    context, over = zmq.Context(), threading.Event()
    router = context.socket(zmq.ROUTER)
    found = router.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        while not over.is_set():
            if router.poll(20):
                route, *frames = router.recv_multipart()
                message = decode(frames)
                assert isinstance(message, Echo)
                router.send_multipart([route, *encode(Echoed(message.request, message.buffers))])
        router.close(0)

    thread = threading.Thread(target=serve, name="echo server")
    thread.start()
    yield found
    over.set()
    thread.join()
    context.term()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loop]]:
    """Makes loops; they are closed in the end. What a loop would notice only after a slice, it notices too late here."""
    monkeypatch.setattr(loops, "SLICE", 100.0)
    made: list[Loop] = []

    def loop(core: EchoCore, wait_timeout: float = 30.0) -> Loop:
        made.append(Loop(core, b"", wait_timeout))
        return made[-1]

    yield loop
    for one in made:
        one.close()


@contextmanager
def together(*targets: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run these in threads beside the block; what they return or raise is there when it has ended."""
    results: list[Any] = [None] * len(targets)

    def run(number: int) -> None:
        try:
            results[number] = targets[number]()
        except BaseException as error:
            results[number] = error

    started = [threading.Thread(target=run, args=(number,), name=f"caller {number}") for number in range(len(targets))]
    for thread in started:
        thread.start()
    yield results
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()


def drives(loop: Loop, name: str) -> Callable[[], bool]:
    """Does the thread of this name drive?"""
    return lambda: any(thread.ident == loop._driver and thread.name == name for thread in threading.enumerate())


def test_many_callers_get_their_own_answers(port: int, make: Callable[..., Loop]) -> None:
    """Eight threads at once: each call ends with its own value, and never are two threads in the core."""
    loop = make(core := EchoCore(port))

    def work() -> bool:
        tickets = [loop.call(Ask) for _ in range(100)]
        return all(ticket.number == ticket.result(20) for ticket in tickets[::-1])

    with together(*[work] * 8) as results:
        pass
    assert [True] * 8 == results
    assert 800 <= len(core.drivers)


def test_what_is_left_is_given_by_who_drives(port: int, make: Callable[..., Loop]) -> None:
    """At once where nobody drives; else by the driver, in its wait: none is lost, and its place is not taken."""
    loop = make(core := EchoCore(port))
    assert 1 == loop.leave(Ask).result(20)
    parked = loop.call(Park)
    with together(parked.result) as results:
        until(drives(loop, "caller 0"))
        with together(*[lambda: [loop.leave(Ask) for _ in range(200)]] * 3) as others:
            pass
        assert all(ticket.number == ticket.result(20) for tickets in others for ticket in tickets)
        assert drives(loop, "caller 0")()
        loop.leave(lambda ticket: Spoil(ValueError("a fault"), False))
    assert "a fault" == str(results[0]) and not loop.usable
    with pytest.raises(ShoalError, match="cannot go on"):
        loop.leave(Ask)
    assert {"caller 0"} == set(core.drivers[1:])


def test_one_ticket_may_be_asked_by_several(port: int, make: Callable[..., Loop]) -> None:
    """`result` in two threads and `done` in a third, none of which has made the call: all see the same end."""
    loop = make(EchoCore(port))
    ticket = loop.call(Ask)
    with together(ticket.result, ticket.result, lambda: until(ticket.done)) as results:
        pass

    assert [ticket.number, ticket.number, True] == results
    assert ticket.number == ticket.result(0)


def test_asking_takes_in_what_has_arrived(
    port: int, make: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`done` in a loop ends by itself: it does not count on the background thread, which sleeps here."""
    monkeypatch.setattr(loops, "NAP", 100.0)
    loop = make(core := EchoCore(port))

    assert until(loop.call(Ask).done)
    assert {"MainThread"} == set(core.drivers)


def test_who_waits_drives_for_the_others(port: int, make: Callable[..., Loop]) -> None:
    """While one thread drives, waiting for what does not come, the calls of others end, and `done` does not wait."""
    loop = make(EchoCore(port))
    parked = loop.call(Park)
    until(drives(loop, "shoal"))  # the background thread gives way
    with together(parked.result) as results:
        until(drives(loop, "caller 0"))
        with together(*(lambda: loop.call(Ask).result(20) for _ in range(4))) as others:
            pass
        assert {2, 3, 4, 5} == set(others)
        assert not parked.done()
        loop.tell(Free(parked.number))

    assert ["free"] == results


def test_a_wait_ends_at_its_timeout(make: Callable[..., Loop]) -> None:
    """With the core's words, after its own time or the worker's; the call may still end later."""
    loop = make(EchoCore(), wait_timeout=0.15)
    ticket = loop.call(Park)
    with pytest.raises(WaitTimeout, match=r"0\.05 s are over"):
        ticket.result(0.05)
    with pytest.raises(WaitTimeout, match=r"0\.15 s are over"):
        ticket.result()
    with together(lambda: ticket.result(20)) as results:  # another who drives, and is not hindered
        until(drives(loop, "caller 0"))
        with pytest.raises(WaitTimeout):
            ticket.result(0.05)
        loop.tell(Free(ticket.number))

    assert ["free"] == results == [ticket.result(0)]


@pytest.mark.parametrize("driving", [True, False])
def test_ctrl_c_in_a_wait_leaves_it_usable(port: int, make: Callable[..., Loop], driving: bool) -> None:
    """It ends the wait, of the thread that drives or one that another drives for; later calls, and this very one, still end."""
    loop = make(core := EchoCore(port))
    ticket, other = loop.call(Park), loop.call(Park)

    def interrupt() -> None:
        looks = core.looks
        until(lambda: core.looks > looks if driving else loop._waiters)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with together(*([] if driving else [other.result])):
        if not driving:
            until(drives(loop, "caller 0"))
        with together(interrupt), pytest.raises(KeyboardInterrupt):
            ticket.result()
        assert 3 == loop.call(Ask).result()
        loop.tell(Free(other.number))
    loop.tell(Free(ticket.number))

    assert "free" == ticket.result(0)
    assert (0, 0) == (loop._waiters, loop._queue)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a fault")])
def test_a_core_in_two_minds_is_not_used_again(make: Callable[..., Loop], error: BaseException) -> None:
    """Ctrl-C, or a fault, in the middle of the core: everybody is told, in this call and in every later one."""
    loop = make(EchoCore())
    waiting = loop.call(Park)
    with together(waiting.result) as results:
        until(drives(loop, "caller 0"))
        with pytest.raises(type(error)):
            loop.tell(Spoil(error, False))
    assert f"this worker cannot go on: {type(error).__name__}" in str(results[0])
    assert not loop.usable
    for call in (lambda: loop.call(Ask), lambda: loop.tell(Free(1)), waiting.result):
        with pytest.raises(ShoalError, match="cannot go on"):
            call()


def test_a_fault_in_the_background_is_told(make: Callable[..., Loop], caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits when it happens: it is logged, and whoever comes next is told."""
    loop = make(EchoCore())
    ticket = loop.call(Park)
    loop.tell(Spoil(ValueError("a fault"), True))
    until(lambda: not loop.usable and not loop._thread.is_alive())

    assert "the background thread of a worker has failed" in caplog.text
    for call in (ticket.result, lambda: loop.call(Ask)):
        with pytest.raises(ShoalError, match="ValueError: a fault"):
            call()


def test_answers_come_while_nobody_waits(port: int, make: Callable[..., Loop]) -> None:
    """The background thread takes them in, and ticks when the core wants it; also when it had long gone to sleep."""
    loop = make(core := EchoCore(port))
    until(lambda: loop._dozing)
    for _ in range(2):
        ticket = loop.call(Ask)
        until(lambda: ticket.over)  # noqa: B023
        until(lambda: loop._dozing)
    assert {"shoal"} == set(core.drivers)
    core.wake = 0.0
    until(lambda: len(core.drivers) > 2)

    assert ("shoal", 2) == (core.drivers[-1], ticket.result(0))


def test_closing_frees_who_waits(make: Callable[..., Loop]) -> None:
    """One that drives and two that it drives for are told at once that it is over; so is whoever calls later. Again is nothing."""
    loop = make(EchoCore())
    tickets = [loop.call(Park) for _ in range(3)]
    with together(*(ticket.result for ticket in tickets)) as results:
        until(lambda: loop._waiters == 2)
        loop.close()
    loop.close()

    assert ["this worker was closed"] * 3 == [str(error).split(".")[0] for error in results]
    assert [True] * 3 == [ticket.done() for ticket in tickets]
    for call in (lambda: loop.call(Ask), lambda: loop.tell(Free(1))):
        with pytest.raises(ShoalError, match=r"was closed\. Try: shoal\.connect"):
            call()


def test_a_fork_has_no_worker(port: int, make: Callable[..., Loop]) -> None:
    """In a child process each use is an error that says so, and closing changes nothing; the parent goes on."""
    loop = make(EchoCore(port))
    ticket = loop.call(Park)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = 0
        for call in (ticket.result, lambda: loop.call(Ask), lambda: loop.tell(Free(1))):
            try:
                call()
            except ShoalError as error:
                told += "do not survive a fork" in str(error)
        loop.close()
        os.write(write, b"%d %d %d" % (told, loop.usable, loop.closed))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "3 0 0" == pipe.read()
    os.waitpid(child, 0)

    assert 2 == loop.call(Ask).result()


def test_a_forgotten_worker_is_collected() -> None:
    """Nobody holds the loop, not even its thread, which ends by itself. That nothing is left is the leak check's to say."""

    def forget() -> tuple[weakref.ref[Loop], threading.Thread]:
        loop = Loop(EchoCore(), b"", 30.0)
        return weakref.ref(loop), loop._thread

    ref, thread = forget()
    until(lambda: gc.collect() + 1 and ref() is None)
    thread.join(10)

    assert not thread.is_alive()
