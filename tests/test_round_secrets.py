"""What a client must not show or send, and what becomes of clients that send what they must not (rungs T0, T1, SPEC §14.5)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import msgpack
import numpy as np
import pytest
from roundnet import RoundNet
from roundtable import ELEMENTS, Table

from shoal.protocol.effects import Send
from shoal.protocol.errors import ConfigError, NonFiniteError, RoundClosed, ShapeError
from shoal.protocol.rounds import (
    Advertise,
    Deal,
    Masked,
    Relay,
    Roster,
    Unmask,
)
from shoal.protocol.secure import keys
from shoal.protocol.secure.keys import Pair
from shoal.protocol.session import read_advert
from shoal.ps.recipe import Recipe
from shoal.ps.round import Stage
from shoal.worker.round import Phase

# --- 14, 18, 22-24, 26


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"update": np.array([1, 2, np.nan, 4, 5, 6], np.float32)}, NonFiniteError),
        ({"update": np.array([1, 2, np.inf, 4, 5, 6], np.float64)}, NonFiniteError),
        ({"update": np.zeros(ELEMENTS + 1, np.float32)}, ShapeError),
        ({"update": np.zeros((1, ELEMENTS), np.float32)}, ShapeError),
        ({"update": np.zeros(ELEMENTS, np.int32)}, ShapeError),
        ({"weight": 0.0}, ConfigError),
        ({"weight": float("nan")}, ConfigError),
        ({"metrics": {}}, ConfigError),
        ({"metrics": {"loss": float("inf")}}, NonFiniteError),
    ],
)
def test_an_input_that_cannot_be_summed_is_the_callers_error(given: dict[str, Any], error: type[Exception]) -> None:
    """Before anything is dealt, so that the others lose nothing."""
    table = Table(metrics=("loss",), cap=2.0)
    table.seat()
    table.train(0, **{"metrics": {"loss": 1.0}, **given})
    table.refused(0, error)
    assert not table.heard(0, Deal)


def test_a_bad_input_costs_its_client_and_nobody_else() -> None:
    """The round is completed without it."""
    net = RoundNet(3, 5, (5, 3), Recipe(rounds=1))
    worker = net.workers["w2"]
    worker.make = lambda plan: replace(worker.plain(plan), update=np.full(plan.elements, np.nan, np.float32))

    assert net.go()
    assert 1 == net.check()
    assert isinstance(worker.ends[0].error, NonFiniteError)


def garble(kind: type[Any], change: Callable[[bytes], bytes]) -> Callable[[Any], Any]:
    def edit(effect: Any) -> Any:
        if isinstance(effect, Send) and isinstance(effect.message, kind):
            message = replace(effect.message, buffers=(change(bytes(effect.message.buffers[0])),))
            return Send(effect.peer, message)
        return effect

    return edit


@pytest.mark.parametrize("kind", [Advertise, Deal, Unmask, Masked])
@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"1", lambda data: b"", lambda data: data * 2]
)
def test_a_message_that_breaks_the_rules_costs_its_sender(kind: type[Any], change: Callable[[bytes], bytes]) -> None:
    """Too short, too long, empty: it is refused and counted; the round is completed without the sender, or without its share."""
    net = RoundNet(3, 5, (5, 3), Recipe(rounds=1))
    net.workers["w2"].edit = garble(kind, change)

    assert net.go()
    assert 1 == net.check()
    assert isinstance(net.workers["w2"].ends[0].error, RoundClosed)
    parties = (net.coordinator.rounds, *(shard.accumulator for shard in net.shards.values()))
    assert sum(party.counters["rejected.malformed"] for party in parties) >= 1


@pytest.mark.parametrize("liar", ["w1", "w4"])
def test_a_wrong_share_is_noticed_and_others_are_used(liar: str) -> None:
    """The commitment and the public key tell; the sum is exact, and too many wrong ones end the round."""
    net = RoundNet(3, 6, (5, 3), Recipe(rounds=1, dropout=1 / 3, threshold=4, minimum=4, corrupt=0.0))
    for worker in net.workers.values():
        worker.client.policy = replace(worker.client.policy, corrupt=0.0)
    net.workers[liar].edit = garble(Unmask, lambda data: bytes(len(data)))
    net.when(lambda: net.stage == Stage.MASKED, lambda: net.lose("w6"))

    assert net.go()
    assert 1 == net.check()


def test_a_client_that_tells_the_shards_different_things_ends_the_round() -> None:
    """What the shards have counted is not the same: nothing is applied at any."""
    net = RoundNet(3, 4, (5, 3), Recipe(rounds=1))

    def change(data: bytes) -> bytes:
        lanes = np.frombuffer(data[-32:], np.uint64).copy()
        lanes[2] += np.uint64(1)
        return data[:-32] + lanes.tobytes()

    edit = garble(Masked, change)
    net.workers["w2"].edit = lambda effect: edit(effect) if isinstance(effect, Send) and effect.peer == 1 else effect
    assert net.go()
    (end,) = net.coordinator.ended
    assert end.released is None and "different things" in end.why
    assert not any(shard.applied for shard in net.shards.values())


def test_too_many_wrong_shares_end_the_round() -> None:
    """Nothing is applied."""
    net = RoundNet(3, 5, (5,), Recipe(rounds=1))
    for name in ("w1", "w2"):
        net.workers[name].edit = garble(Unmask, lambda data: bytes(len(data)))

    assert net.go()
    (end,) = net.coordinator.ended
    assert end.released is None and not net.shards[0].applied


def test_a_second_advert_of_a_client_is_not_taken() -> None:
    """The first one counts: who comes back with new keys does not get the others' shares sealed again."""
    net = RoundNet(3, 4, (5,), Recipe(rounds=1))

    def again(effect: Any) -> Any:
        if isinstance(effect, Send) and isinstance(effect.message, Advertise):
            mine = read_advert(effect.message.buffers[0], True)
            other = replace(mine, sealing=Pair.fresh().public, masking=Pair.fresh().public)
            return [effect, Send(effect.peer, replace(effect.message, buffers=(other.packed,)))]
        return effect

    net.workers["w2"].edit = again
    net.faults = replace(net.faults, delay=1e-4)
    assert net.go()
    assert sum(end.released is not None for end in net.coordinator.ended) in (0, 1)
    net.check()
    for frames in (frames for _, frames in net.wire if frames[0][2] == Roster.TYPE):
        assert len(msgpack.unpackb(msgpack.unpackb(frames[2])[0])) == 5


def secrets_of(obj: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """What can be reached from an object and is wanted."""
    skipped = type, ModuleType, FunctionType, BuiltinFunctionType
    seen, found, todo = {id(obj)}, [], [obj]
    while todo:
        for each in gc.get_referents(todo.pop()):
            if id(each) not in seen and not isinstance(each, skipped):
                seen.add(id(each))
                todo.append(each)
                if wanted(each):
                    found.append(each)
    return found


def test_no_secret_is_left_after_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with the client nor with the coordinator: no key pair, no derived key, no share of the session."""
    made: set[bytes] = set()
    derive = keys.derive

    def recorded(secret: bytes, salt: bytes, info: bytes) -> bytes:
        found = derive(secret, salt, info)
        made.update((secret, found))
        return found

    monkeypatch.setattr(keys, "derive", recorded)
    net = RoundNet(3, 4, (5,), Recipe(rounds=1))
    kept: list[int] = []

    def holds(each: Any) -> bool:
        return isinstance(each, Pair) or (isinstance(each, bytes) and each in made)

    def look_when(phase: Phase) -> None:
        client = net.workers["w1"].client
        net.when(lambda: client.phase == phase, lambda: kept.append(len(secrets_of(client, holds))))

    look_when(Phase.SENDING)
    look_when(Phase.UNMASKED)
    assert net.go()
    net.run(net.now + 10.0, lambda: all(worker.ends for worker in net.workers.values()))
    assert kept[0] > 0 == kept[1]  # else this test could not see them; and what was opened is forgotten at once
    for worker in net.workers.values():
        assert not secrets_of(worker.client, holds)
    assert not secrets_of(net.coordinator.rounds, holds)
    assert not secrets_of(net.shards[0].accumulator, holds)


def test_no_key_is_used_in_two_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is derived in a round is derived in no other; and within one, for one purpose, by the two who share it."""
    made: dict[bytes, set[tuple[bytes, bytes]]] = {}
    rounds: list[set[bytes]] = [set()]
    derive = keys.derive

    def recorded(secret: bytes, salt: bytes, info: bytes) -> bytes:
        found = derive(secret, salt, info)
        made.setdefault(found, set()).add((salt, info))
        rounds[-1].add(found)
        return found

    monkeypatch.setattr(keys, "derive", recorded)
    net = RoundNet(3, 4, (5,), Recipe(rounds=6))
    for number in range(1, 7):
        assert net.go(number)
        rounds.append(set())
    rounds.pop()
    assert 6 == len(rounds) and all(rounds)
    assert len(set.union(*rounds)) == sum(map(len, rounds)) == len(made)
    assert all(1 == len(purposes) for purposes in made.values())


def test_nothing_of_one_client_shows(caplog: pytest.LogCaptureFixture) -> None:
    """Neither its weight, loss and update nor any secret: on the wire, in logs, or in what its objects say of themselves."""
    net = RoundNet(3, 4, (50,), Recipe(rounds=1, cap=4.0, reference=2.0, metrics=("loss",)))
    told: list[str] = []
    hands: list[tuple[bytes, ...]] = []

    def look() -> None:
        for worker in net.workers.values():
            client = worker.client
            hand = client._hand
            assert hand is not None and hand._masking is not None and hand._sealing is not None
            hands.append((hand._b, hand._masking.private_bytes, hand._sealing.private_bytes, *hand._shares.values()))
            told.extend(map(repr, (client, hand, hand._masking, client._given, client._upload)))
        told.append(repr(net.coordinator.rounds) + repr(net.shards[0].accumulator))

    for number, worker in enumerate(net.workers.values()):
        worker.make = lambda plan, plain=worker.plain, more=0.3177 * number: replace(plain(plan), weight=1.2345 + more)
    net.when(lambda: net.stage == Stage.MASKED, look)
    assert net.go()
    (end,) = net.coordinator.ended
    wire = b"".join(b"".join(frames) for _, frames in net.wire)
    text = "\n".join((*told, *net.log, *net.coordinator.log, caplog.text, *map(repr, net.coordinator.ended)))
    for (session, _), given in net.world.inputs.items():
        assert session == end.session
        for number in (given.weight, given.metrics["loss"]):
            for packed in (msgpack.packb(number), np.float32(number).tobytes(), np.float64(number).tobytes()[:-1]):
                assert packed not in wire
            assert repr(number) not in text
        assert given.update[:4].tobytes() not in wire
    assert 4 * 4 == sum(map(len, hands))  # b, two keys and its own shares, of four clients
    for secret in (each for held in hands for each in held):
        assert len(secret) in (32, 66) and secret not in wire
        for part in (secret, secret[:33], secret[-33:]):
            assert part.hex() not in text and repr(part) not in text
    for message in (
        Deal(1, 2, (b"secret",)),
        Unmask(1, 2, (0,), (b"secret",)),
        Masked(1, 2, 3, 0, (b"secret",)),
        Relay(1, 2, (), (b"secret",)),
    ):
        assert "secret" not in repr(message)
