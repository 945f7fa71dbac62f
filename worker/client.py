"""What a training script holds: `Worker` (DESIGN §8).

Rules
- Every call that can wait has a time-out, and a worker can be used from several threads.
- What is wrong with the arguments is raised in the caller, before anything is sent.
- The arrays that a caller gives are copied; the arrays that it gets are its own.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..protocol.codecs import Codec
from ..protocol.errors import (
    ConfigError,
    NonFiniteError,
    NoServerError,
    ServerLost,
    ShapeError,
    ShoalError,
    WaitTimeout,
)
from ..protocol.join import MAX_NAME, JoinAddress, key_text
from ..protocol.model import ModelSpec
from ..protocol.phases import at
from ..protocol.records import Place
from ..protocol.rules import Rule
from ..protocol.secure.plan import Policy
from ..protocol.stale import Option, Stale, read_option
from . import calls
from .address import check_resolves
from .arrays import Array, Cache, Template, describe, write
from .buffers import Buffers
from .checks import check_out, checked_name, wanted_names
from .core import Core
from .data import Partition
from .evaluates import Evaluates
from .exchange import Exchange, first_values
from .loop import Loop, Ticket
from .rounds import Round, Trainer
from .stats import Stats
from .versions import CONNECT_TIMEOUT, Versions

if TYPE_CHECKING:
    import torch

    from ..protocol.secure.keys import Identity
    from .optimizer import Optimizer

logger = logging.getLogger("shoal")

WAIT_TIMEOUT = 600.0
CLOSE_TIMEOUT = 10.0
RAW_CODEC = Codec()
MOST_LOGGED = 256


class Worker(Versions, Evaluates):
    """A worker, joined to a cluster. Made by `shoal.connect`; a context manager.

    Args:
        address: of the coordinator, with its keys.
        name: of this worker, one live worker a name; made from host and process id if empty.
        attempt: how often a supervisor has restarted it.
        timeout: seconds to find the servers in.
        wait_timeout: seconds after which any other call ends in `WaitTimeout`, unless it says otherwise.
        transport: `shm` shares memory with the servers, which must be on this machine; `tcp` does not; `auto` where it can be.
        push_codec, pull_codec: what travels to and from servers of other machines is in these; raw by default.
        require: what is demanded of federated rounds: `secagg`, `clear`, or a `Policy`; by default what `address` says.
        identity, identities: what this worker signs with in federated rounds, and everybody's public keys by name; both, or none.

    Raises:
        NoServerError: nobody answers at the address in time.
        AuthError: the keys do not fit. VersionError: the server is another shoal.
        ConfigError: another live worker has this name.
    """

    def __init__(
        self,
        address: JoinAddress,
        *,
        name: str = "",
        attempt: int = 0,
        timeout: float = CONNECT_TIMEOUT,
        wait_timeout: float = WAIT_TIMEOUT,
        transport: str = "auto",
        push_codec: Codec = RAW_CODEC,
        pull_codec: Codec = RAW_CODEC,
        require: str | Policy | None = None,
        identity: Identity | None = None,
        identities: Mapping[str, bytes] | None = None,
    ) -> None:
        host = socket.gethostname()
        self.name = checked_name(name) or f"{host[:64]}-{os.getpid()}-{os.urandom(2).hex()}"
        check_resolves(address)
        key = key_text(address.server_key) if address.server_key else ""
        who = (self.name, attempt, host, os.getpid())
        self._address = address
        self._patron = None
        self._core = Core(Place(0, 0, address.host, address.port, key), who, _random)
        self._loop = Loop(self._core, address.secret, wait_timeout)
        self._exchange = Exchange(self._loop, self._core.stats, transport, push_codec, pull_codec)
        self._buffers = Buffers(self._exchange)
        self._core.federation.identify(identity, identities)
        self._trainer = Trainer(self, address.protection if require is None else require, identity is not None)
        self._examples = 0.0
        self._step_examples: list[float] = []
        self._jobs = 0
        self._evaluators, self._results = [], []
        self._logged: set[str] = set()
        self._refreshers: list[Callable[[], None]] = []
        self._arrivers: list[Callable[[float], None]] = []
        self._closers: list[Callable[[], None]] = []
        self._last_push: Ticket | None = None
        self._on_exit: Callable[[], None] | None = None
        atexit.register(_close_at_exit, weakref.ref(self))
        try:
            self._open(address, timeout)
        except BaseException:
            self._loop.close()
            raise

    def _open(self, address: JoinAddress, timeout: float) -> None:
        ticket = self._loop.call(calls.OpenCalled)
        try:
            ticket.result(timeout)
        except (WaitTimeout, ServerLost):
            raise NoServerError(
                f"no server at {address.address} after {timeout:g} s: {self._core.why_waiting()}",
                cause="the server is not started, or a firewall is between",
                hint="shoal doctor",
            ) from None

    # --- what is known of the cluster

    @property
    def stats(self) -> Stats:
        """What this worker has done so far; a copy."""
        return self._core.stats.copy()

    @property
    def number(self) -> int:
        """This worker's number in the cluster, from 0."""
        return self._core.welcome.worker if self._core.welcome else 0

    @property
    def run(self) -> str:
        """The cluster's life, in hex: another one each time that its coordinator is started."""
        return f"{self._core.welcome.run:016x}" if self._core.welcome else ""

    @property
    def mode(self) -> str:
        """`async`, `sync` or `federated`."""
        if self._core.federated:
            return "federated"
        return at(self._core.phases, self._core.stats.clock).mode if self._core.phases else ""

    @property
    def federated(self) -> bool:
        """Does this worker train by itself now? A batch that was leased to it still ends in a push."""
        return self._core.federated and not self._examples

    @property
    def incarnation(self) -> int:
        """This life. It changes when the worker was declared dead and has joined again."""
        return self._core.incarnation

    # --- parameters

    def register(
        self, arrays: Mapping[str, Array], optimizer: Rule, *, stale: Option = None, timeout: float | None = None
    ) -> None:
        """Say what is trained, and be counted in. The first worker's values are the first weights.

        Args:
            arrays: by name; numpy or torch; float32, float64, float16 or bfloat16.
            optimizer: how the shards apply what is pushed: `shoal.SGD(lr=0.1)`, `shoal.Adam()`, …, or `shoal.Delta()` to add it.
            stale: what is done about a gradient that was computed on older weights, in `async`: nothing, `"scale"` (its
                learning rate is divided by its staleness), `"compensate"` or `shoal.Compensate(lam=…)`. All workers must agree.

        Raises:
            ConfigError: there is no such remedy, or the optimizer has no use for it.
            ShapeError: the model differs from the one that is being trained; the text names the first difference.
            WaitTimeout: fewer than `min_workers` have come in time.
        """
        if not isinstance(optimizer, Rule):
            raise ConfigError(
                f"optimizer is a {type(optimizer).__name__}",
                hint="shoal.SGD(lr=0.1) and its like; for torch optimizers worker.optimizer(opt, model)",
            )
        entries = {name: (array, 0) for name, array in arrays.items()}
        self._register(entries, (optimizer,), timeout, read_option(stale))

    def _register(
        self, arrays: Mapping[str, tuple[Array, int]], groups: tuple[Rule, ...], timeout: float | None, stale: Stale
    ) -> Cache:
        """`arrays`: by name, with the number of the group."""
        spec = ModelSpec(tuple(describe(name, array, group) for name, (array, group) in arrays.items()), groups, stale)
        if stale and self.mode == "sync":
            logger.warning("stale=%s is without effect in sync mode, where no gradient is stale", stale)
        exchange = self._exchange
        first = first_values({name: array for name, (array, _) in arrays.items()}) if exchange.cache is None else {}

        def cache() -> Cache:
            assert self._core.layout is not None
            return exchange.begin(self._core.layout, first)

        ticket = self._loop.call(calls.RegisterCalled, spec.description, lambda block: cache().block(block))
        self._loop.result(ticket, timeout)
        cache()
        exchange.registered({name: Template(array) for name, (array, _) in arrays.items()})
        if self._core.federated:
            self._loop.tell(calls.PauseCalled())
        return cache()

    @property
    def buffers(self) -> Buffers:
        """The arrays that pulls and pushes need no copy for.

        Raises:
            ConfigError: nothing is registered.
        """
        self._registered()
        return self._buffers

    def pull(
        self,
        names: str | Iterable[str] | None = None,
        *,
        out: Mapping[str, Array] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Array]:
        """Read parameters, within the staleness bound.

        Args:
            names: which; all by default.
            out: arrays to write into, by name, instead of new ones; they say which names, too.

        Returns:
            Arrays of the registered shape, dtype and kind, by name.

        Raises:
            ConfigError: nothing is registered. ShapeError: an unknown name, or an `out` that does not fit.
            WaitTimeout: another worker is too slow, in this time. ServerLost: a shard does not answer.
        """
        cache = self._registered()
        if out is not None and out is self._buffers.weights and names is None:
            with self._exchange.fetched(None, timeout):
                return dict(self._buffers.weights)
        wanted = wanted_names(names, out, self._exchange.templates)
        if out is not None:
            for name in wanted:
                check_out(cache.tensor(name), describe(name, out[name]))
        partial = None if len(wanted) == len(cache.layout.spec.tensors) else wanted
        with self._exchange.fetched(partial, timeout):
            if out is None:
                return {name: self._exchange.templates[name].make(cache.values(name)) for name in wanted}
            for name in wanted:
                write(out[name], cache.values(name))
            return {name: out[name] for name in wanted}

    def push(
        self, arrays: Mapping[str, Array], *, examples: float | None = None, timeout: float | None = None
    ) -> Ticket:
        """Push gradients (or whatever the registered rule takes) of some or all tensors.

        Args:
            examples: how many examples they are the mean over, the weight in sync mode; by default what `partition` has
                handed out since the last `clock`, else 1.

        Returns:
            A ticket; `ticket.result()` waits until every shard has applied it. The arrays may be changed at once.

        Raises:
            ShapeError: a name, shape or dtype is not as registered. NonFiniteError: NaN or infinity, where the
                server's policy is `error`; where it is `skip`, the push is left out and counted.
        """
        return self._push(arrays, advance=False, examples=examples, hyper=(), timeout=timeout)

    def clock(self, *, examples: float | None = None) -> int:
        """This worker's step is finished. Returns its new clock.

        Args:
            examples: the step's weight in sync mode; by default that of its pushes. 0: the step does not count.
        """
        self._be_counted_in(None)
        weight = self._weight(examples)
        self._last_push = self._loop.call(calls.PushCalled, (), True, weight, ())
        self._last_push._seen = True
        self._step_over()
        return self._core.stats.clock

    def _push(
        self,
        arrays: Mapping[str, Array],
        *,
        advance: bool,
        examples: float | None,
        hyper: tuple[tuple[float, ...], ...],
        timeout: float | None,
        early: bool = False,
    ) -> Ticket:
        self._registered()
        started = time.perf_counter()
        self._be_counted_in(timeout)
        gathers = self._exchange.gathers
        gather = self._exchange.gather(arrays, timeout)
        skip = self._core.welcome is not None and self._core.welcome.nonfinite == "skip"
        weight = self._step_weight(examples)
        try:
            gather.put(arrays, check=True)
            parts = self._exchange.parts(gather, self._core.incarnation)
        except NonFiniteError:
            gathers.append((_done_ticket(self._loop), gather))
            if not skip:
                raise
            self._core.stats.skipped += 1
            parts, weight = (), 0.0
        except ShapeError:
            gathers.append((_done_ticket(self._loop), gather))
            raise
        if weight:
            self._step_examples.append(weight)
        weight = self._weight(examples) if advance else weight
        ticket = self._loop.call(calls.PushCalled, parts, advance, weight, hyper, gather.number, early and bool(parts))
        gathers.append((ticket, gather))
        if advance:
            self._step_over()
        self._core.stats.seconds["push"] += time.perf_counter() - started
        return ticket

    def _step_weight(self, examples: float | None) -> float:
        """The weight of one push."""
        if examples is not None:
            if not examples >= 0:
                raise ConfigError(f"examples is {examples}")
            return float(examples)
        return self._examples or 1.0

    def _weight(self, examples: float | None) -> float:
        """The weight of the step that ends."""
        if examples is not None:
            return self._step_weight(examples)
        return max(self._step_examples, default=0.0)

    def _step_over(self) -> None:
        self._examples = 0.0
        self._step_examples.clear()

    def _registered(self) -> Cache:
        cache = self._exchange.cache
        if cache is None:
            raise ConfigError(
                "no model is registered",
                hint="worker.register({…}, optimizer=shoal.SGD(lr=0.1)) or worker.optimizer(opt, model)",
            )
        return cache

    def _be_counted_in(self, timeout: float | None) -> None:
        """After a rest, or another life, be in the clocks again before anything is pushed: it would be lost."""
        if self.federated:
            raise ConfigError(
                "the cluster makes federated rounds, in which nothing is pushed",
                cause="`shoal mode federated`, or `--mode federated`",
                hint="worker.rounds(model), or worker.optimizer(opt, model) with worker.partition(…)",
            )
        if self._exchange.cache is not None and not self._core.fleet.running:
            self._loop.result(self._loop.call(calls.ResumeCalled), timeout)
            self._exchange.be_exact(False)

    # --- federated rounds

    def rounds(
        self,
        model: torch.nn.Module | Mapping[str, Array],
        *,
        examples: float = 1.0,
        require: str | Policy | None = None,
        metrics: Iterable[str] = (),
        count: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[Round]:
        """Take part in federated rounds: in each the model holds the round's weights, is trained here, and is submitted.

        Args:
            model: a torch module, whose parameters and floating buffers are federated, or arrays by name, trained in place. If
                nothing is registered yet, this is.
            examples: how much this worker's update weighs. It leaves under the mask alone.
            require: what is demanded of every round: `secagg`, `clear`, or a `Policy`; by default as `connect` was told.
            metrics: names of what `submit` will be given.
            count: so many rounds of the cluster; by default all that it makes.
            timeout: seconds to wait for each.

        Raises:
            ConfigError: the cluster is in another mode, or the model is not the registered one.
            ProtectionError: a round protects less than is required. WaitTimeout: none has begun in time.
        """
        self._trainer.hold(model, timeout)
        return self._trainer.rounds(float(examples), self._trainer.demanded(require), tuple(metrics), count, timeout)

    # --- torch

    def optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        buffers: str = "local",
        overlap: bool = True,
        prefetch: bool = False,
        stale: Option = None,
        scaffold: bool = False,
    ) -> Optimizer:
        """Wrap a torch optimizer: `step` pushes gradients, ends the step, and takes weights within the bound.

        Args:
            optimizer: SGD, Adagrad, RMSprop, Adam and AdamW run on the shards; any other runs here, and its weight deltas are
                pushed.
            model: whose parameters the optimizer holds; a compiled one is unwrapped.
            buffers: `local` (each worker keeps its own BatchNorm statistics) or `mean` (averaged through the shards).
            overlap: to servers on other machines, gradients travel while backward still runs. They count when `step` is called and
                finds them as they were; if something has changed them in between, they travel again.
            prefetch: `step` does not wait for the next weights: they arrive while the loop prepares its next batch, and are there
                when the model is called. Between the two its parameters are those before the step, which is why this is to be
                asked for. Takes the memory of another copy of the model.
            stale: as in `register`; only with an optimizer that runs on the shards.
            scaffold: in federated rounds, control variates for owners whose data differ (Karimireddy et al. 2020); for plain SGD.
                All workers must agree. Twice as much travels.

        Raises:
            ConfigError: a parameter of the optimizer is not in the model, or a setting is unknown or has no effect.
        """
        from .optimizer import Optimizer

        return Optimizer(self, optimizer, model, buffers, overlap, prefetch, read_option(stale), scaffold)

    # --- data

    def partition(
        self,
        data: Any,
        batch_size: int,
        epochs: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        partition_size: int | None = None,
        name: str = "",
    ) -> Partition:
        """Share a data set with the other workers: an iterator over this worker's batches.

        Each worker has the data; the coordinator leases ranges of it. What a dead worker had not finished goes to another.

        Args:
            data: a torch Dataset, an array, a tuple of arrays of one length, or any sequence; the same in every worker.
            partition_size: examples in one lease, a multiple of `batch_size`; by default about a 32nd of the data.
            name: of the data set, the same in every worker; by default the first is `data0`, the next `data1`, …

        Raises:
            ConfigError: no length, arrays of several lengths, a size that does not fit.
        """
        if not name:
            name, self._jobs = f"data{self._jobs}", self._jobs + 1
        return Partition(self, data, batch_size, epochs, shuffle, seed, partition_size, name)

    def _refresh(self) -> None:
        for refresh in self._refreshers:
            refresh()

    # --- the rest

    def log(self, **values: float) -> None:
        """Named numbers for the display, the status and the report; the newest of each name counts.

        While a federated round is trained for they leave with its update alone, summed over all workers under its protection.
        """
        try:
            numbers = {name: float(value) for name, value in values.items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"log takes numbers: {error}") from None
        for name in numbers.keys() - self._logged:
            if len(self._logged) >= MOST_LOGGED or len(name) > MAX_NAME or not name.isprintable():
                raise ConfigError(
                    f"log takes at most {MOST_LOGGED} printable names of {MAX_NAME} characters, not also {name!r:.80}",
                    hint="a fixed name whose value changes: worker.log(loss=…)",
                )
            self._logged.add(name)
        if self._trainer.active:
            return self._trainer.log(numbers)
        self._loop.tell(calls.LogCalled(numbers))

    def drain(self, timeout: float | None = None) -> None:
        """Wait until everything pushed so far is acknowledged, or has failed."""
        for ticket in [ticket for ticket, _ in list(self._exchange.gathers)] + (
            [self._last_push] if self._last_push else []
        ):
            self._loop.wait(ticket, timeout)

    def close(self) -> None:
        """Drain what was pushed, say goodbye, free everything. Again changes nothing."""
        if self._loop.closed:
            return
        try:
            for arrive in self._arrivers:
                with contextlib.suppress(ShoalError):
                    arrive(CLOSE_TIMEOUT)
            with contextlib.suppress(ShoalError):
                self.drain(CLOSE_TIMEOUT)
            with contextlib.suppress(ShoalError):
                self._loop.call(calls.CloseCalled).result(CLOSE_TIMEOUT / 2)
        finally:
            self._loop.close()
            while self._closers:
                self._closers.pop()()
            self._exchange.close()
            if self._on_exit is not None:
                self._on_exit()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<shoal.Worker {self.name!r} clock={self._core.stats.clock} mode={self.mode}>"


def _random() -> int:
    return int.from_bytes(os.urandom(8), "big") | 1


def _done_ticket(loop: Loop) -> Ticket:
    ticket = Ticket(loop, 0)
    ticket._end(None, None)
    return ticket


def _close_at_exit(ref: weakref.ref[Worker]) -> None:
    worker = ref()
    if worker is not None:
        with contextlib.suppress(Exception):
            worker.close()
