"""A dispatcher, executors and clients on the simulated network: real cores, a real book, versions in memory (rung T1).

Rules
- An executor's application loads and works as long as the dice say, and looks at what it is given: it holds what it answers
  with, it may see the data, the version may.
- A crash of the dispatcher loses what its book had not committed; a crash of an executor all that it did.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from simnet import Faults, Node, Sim

from shoal.protocol.asking import Answer, Inquire
from shoal.protocol.effects import COORDINATOR, Fail, Received, Resolve, Send
from shoal.protocol.errors import ConfigError, QueueFull, TaskFailed
from shoal.protocol.records import Place
from shoal.protocol.tasking import Asked, Feedback, Govern, Host, Valued
from shoal.ps.hosted import Hosted
from shoal.tasks.book import SqliteBook
from shoal.tasks.card import Card, Cost
from shoal.tasks.dispatcher import Dispatcher, Settings
from shoal.tasks.values import pack, unpack
from shoal.worker.calls import Cancelled
from shoal.worker.executor import Executor, Finished, Gone, Job, NextCalled, OpenCalled, Ready, Unable, Version
from shoal.worker.submitter import AskCalled, Reply, SubmitCalled, Submitter

NAME = "m"
LABELS = ("", "site:a", "site:b")


class MemoryLibrary:
    """Versions that outlive the dispatcher."""

    def __init__(self) -> None:
        self.cards: dict[str, list[Card]] = {}
        self.bytes: dict[str, bytes] = {}
        self.stacks: dict[str, list[int]] = {}

    def make(self, name: str, content: bytes, quality: Mapping[str, Any], data: Sequence[str]) -> Card:
        digest = hashlib.sha256(content).hexdigest()
        self.bytes[digest] = content
        cards = self.cards.setdefault(name, [])
        cards.append(Card(name, len(cards) + 1, digest, len(content), quality, Cost(), tuple(data)))
        return cards[-1]

    def names(self) -> list[str]:
        return sorted(self.cards)

    def versions(self, name: str) -> list[Card]:
        return self.cards.get(name, [])

    def promoted(self, name: str) -> Card | None:
        stack = self.stacks.get(name)
        return self.find(name, stack[-1]) if stack else None

    def find(self, name: str, version: int | None = None) -> Card:
        for card in self.cards.get(name, []):
            if card.version == version:
                return card
        raise ConfigError(f"there is no version {version} of {name!r}")

    def promote(self, name: str, version: int, why: str = "") -> Card:
        card = self.find(name, version)
        if not card.quality:
            raise ConfigError("it was never evaluated")
        self.stacks.setdefault(name, []).append(version)
        return card

    def rollback(self, name: str, why: str = "") -> Card:
        stack = self.stacks.get(name, [])
        if len(stack) < 2:
            raise ConfigError("nothing was promoted before")
        stack.pop()
        return self.find(name, stack[-1])

    def history(self, name: str) -> list[dict[str, Any]]:
        return []

    def piece(self, weights: str, offset: int) -> tuple[int, bytes]:
        if weights not in self.bytes:
            raise ConfigError("there are no such weights")
        return len(self.bytes[weights]), self.bytes[weights][offset : offset + 64]

    def take(self, weights: str, total: int, offset: int, piece: Any) -> int:
        raise ConfigError("nothing is uploaded here")

    publish = take  # type: ignore[assignment]

    def end(self) -> None:
        pass


class Guide:
    """The coordinator, as far as it knows where the dispatcher is."""

    wake_at = inf

    def __init__(self) -> None:
        self._hosted = Hosted()

    def handle(self, event: Any, now: float) -> list[Any]:
        match event:
            case Received(_, Host() as message):
                self._hosted.heard(message, now)
            case Received(peer, Inquire(request, "dispatcher")):
                body = json.dumps(self._hosted.place(now)).encode()
                return [Send(peer, Answer(request, now, (body,)))]
        return []


class ExecutorApp:
    """Runs the models of one executor."""

    def __init__(self, net: TaskNet, node: Node, data: frozenset[str] | None) -> None:
        self.net, self.node, self.data = net, node, data
        self.held: dict[str, Card] = {}
        self.tickets = 0
        node.on_effect = self.on_effect

    def ask(self) -> None:
        self.tickets += 1
        self.net.sim.give(self.node, NextCalled(self.tickets))

    def on_effect(self, effect: Any, now: float) -> None:
        if isinstance(effect, Resolve) and effect.value is not None:
            self.net.sim.at(now + self.net.dice.uniform(0.0, self.net.slowness), lambda: self.act(effect.value))

    def act(self, thing: Any) -> None:
        sim = self.net.sim
        if sim.nodes.get(self.node.name) is not self.node:
            return
        match thing:
            case Version(card, data):
                assert hashlib.sha256(data).hexdigest() == card.weights, "a version that is not whole"
                if self.net.dice.random() < self.net.unable:
                    sim.give(self.node, Unable(card.identity, "the dice"))
                else:
                    self.held[card.identity] = card
                    sim.give(self.node, Ready(card.identity))
            case Gone(identity):
                del self.held[identity]
            case Job():
                sim.give(self.node, self.work(thing))
        self.ask()

    def work(self, job: Job) -> Finished:
        card = self.held[job.identity]
        outputs = []
        for payload in job.payloads:
            value = unpack(payload)
            label = value["label"]
            assert not label or label in card.data, "a version that may not see this"
            assert not label or self.data is None or label in self.data, "an executor that may not see this"
            outputs.append(pack({"identity": card.identity, "number": value["number"]}))
        self.net.counts["batches"] += 1
        return Finished(job.batch, 0.001, ("",) * len(outputs), tuple(outputs))


class ClientApp:
    """Submits tasks, and keeps what became of each."""

    def __init__(self, net: TaskNet, node: Node) -> None:
        self.net, self.node = net, node
        self.tickets = 0
        self.asked: dict[int, tuple[Asked, float]] = {}
        self.outcomes: dict[int, list[Any]] = {}
        node.on_effect = self.on_effect

    def call(self, make: Any, *args: Any) -> int:
        self.tickets += 1
        self.net.sim.give(self.node, make(self.tickets, *args))
        return self.tickets

    def submit(self, label: str = "", deadline: float = inf, kind: str = NAME) -> int:
        number = self.tickets + 1
        asked = Asked(0, kind, "", 1, inf, 0.0, label, inf, deadline)
        self.asked[number] = asked, self.net.sim.now
        payload = pack({"label": label, "number": number})
        return self.call(SubmitCalled, asked, payload)

    def govern(self, what: str, version: int, share: float = 0.0) -> int:
        return self.call(
            AskCalled, lambda client, request: Govern(client, request, what, NAME, version, share, "the dice")
        )

    def feed_back(self, number: int, reward: float) -> None:
        (outcome,) = self.outcomes[number]
        if isinstance(outcome, Reply):
            value = Valued(outcome.owner, outcome.told.number, reward)
            self.call(AskCalled, lambda client, request: Feedback(client, request, (value,), (b"",)))

    def on_effect(self, effect: Any, now: float) -> None:
        if effect.ticket in self.asked or effect.ticket not in self.outcomes:
            outcome = effect.value if isinstance(effect, Resolve) else effect.error
            self.outcomes.setdefault(effect.ticket, []).append(outcome)
            self.net.done(self, effect.ticket, outcome, now)


class TaskNet:
    """All of them.

    Args:
        slowness: seconds that loading and a batch may take. unable: the chance that a version cannot be loaded.
    """

    def __init__(
        self,
        seed: int,
        folder: Path,
        faults: Faults,
        settings: Settings = Settings(),  # noqa: B008 - frozen
        slowness: float = 0.05,
        unable: float = 0.0,
    ) -> None:
        self.sim, self.dice = Sim(seed, faults), random.Random(seed)
        self.slowness, self.unable, self.settings = slowness, unable, settings
        self.library = MemoryLibrary()
        self.counts: Counter[str] = Counter()
        self._file = folder / f"{seed}.sqlite"
        self._lives = 0
        self.book: SqliteBook | None = None
        self.dispatcher = ""
        self.executors: dict[str, ExecutorApp] = {}
        self.clients: list[ClientApp] = []
        self.sim.add(Node("coordinator", Guide()))
        self.start_dispatcher()

    # --- processes

    def start_dispatcher(self) -> None:
        self._lives += 1
        self.dispatcher = f"dispatcher{self._lives}"
        self.book = SqliteBook(self._file)
        draw = random.Random(self.dice.random()).betavariate
        here = self.dispatcher, 1, ""
        core = Dispatcher(self.dice.randrange(1 << 62), self.book, self.library, self.settings, here, 0.0, draw)
        core.now = self.sim.now
        node = self.sim.add(Node(self.dispatcher, core))
        self.sim.door(node, COORDINATOR, "coordinator")

    def crash_dispatcher(self, seconds: float) -> None:
        if self.dispatcher in self.sim.nodes:
            self.sim.crash(self.dispatcher)
            assert self.book is not None
            self.book._writing = False  # what was not committed is gone
            self.book.end()
            self.sim.at(self.sim.now + seconds, self.start_dispatcher)
            self.counts["dispatcher crashes"] += 1

    def start_executor(self, name: str, data: frozenset[str] | None = None) -> ExecutorApp:
        core = Executor(Place(0, 0, "coordinator", 1, ""), self.dice.randrange(1 << 62), name, (NAME,), data)
        node = self.sim.add(Node(name, core))
        app = self.executors[name] = ExecutorApp(self, node, data)
        self.sim.at(self.sim.now, app.ask)
        return app

    def crash_executor(self, name: str, seconds: float) -> None:
        if name in self.sim.nodes:
            data = self.executors[name].data
            self.sim.crash(name)
            self.sim.at(self.sim.now + seconds, lambda: self.start_executor(name, data) and None)
            self.counts["executor crashes"] += 1

    def start_client(self, name: str) -> ClientApp:
        core = Submitter(Place(0, 0, "coordinator", 1, ""), self.dice.randrange(1 << 62))
        app = ClientApp(self, self.sim.add(Node(name, core)))
        self.clients.append(app)
        return app

    # --- the end

    def run(self, after: float, until: float) -> bool:
        """Until every task has come to something, which is looked at from `after` on."""

        def done() -> bool:
            ended = (len(app.outcomes.get(number, ())) for app in self.clients for number in app.asked)
            return self.sim.now > after and all(ended)

        return self.sim.run(until, done)

    def done(self, app: ClientApp, ticket: int, outcome: Any, now: float) -> None:
        """What became of a call is looked at when it happens."""
        asked, came = app.asked.get(ticket, (None, 0.0))
        if asked is None:
            return
        match outcome:
            case Reply(_, told, output):
                value = unpack(output)
                assert value == {"identity": told.identity, "number": ticket}, "an answer to another task"
                assert told.identity in {card.identity for card in self.library.versions(NAME)}
                self.counts["answered"] += 1
            case TaskFailed():
                late = "not done within" in outcome.what
                assert late or "no model qualifies" in outcome.what or "executors have ended" in outcome.what, outcome
                assert not late or now - came >= asked.deadline - 1e-6, "a failure before its deadline"
                self.counts["late" if late else "unmet" if "no model" in outcome.what else "tried"] += 1
            case QueueFull():
                self.counts["full"] += 1
            case _:
                raise AssertionError(f"a task came to {outcome!r}")

    def close(self) -> None:
        if self.book is not None and self.dispatcher in self.sim.nodes:
            self.book.end()

    def end(self) -> None:
        for app in self.clients:
            for number in app.asked:
                assert 1 == len(app.outcomes.get(number, [])), (number, app.outcomes.get(number))


__all__ = ["LABELS", "NAME", "Cancelled", "ClientApp", "ExecutorApp", "Fail", "OpenCalled", "TaskNet"]
