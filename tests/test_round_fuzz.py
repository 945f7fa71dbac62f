"""Damaged and made-up messages at every party of a round, in every stage (rung T1): nobody raises."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import fields, replace
from typing import Any, get_args

import msgpack
from roundnet import SHARD, RoundNet
from simnet import Faults

from shoal.protocol.effects import COORDINATOR, Received
from shoal.protocol.errors import ProtocolError
from shoal.protocol.frames import decode, encode
from shoal.protocol.rounds import RoundMessage
from shoal.ps.recipe import Recipe

SEED = int(os.environ.get("SHOAL_SEED", random.SystemRandom().randrange(2**32)))
ROUNDS = 25
KINDS: tuple[type[Any], ...] = get_args(RoundMessage)
NUMBERS = (0, 1, 2, 3, 7, SHARD, 2**31, 2**63, 2**64 - 1)


def damaged(draw: random.Random, frames: list[bytes]) -> list[bytes]:
    """A message that was sent, with a field or a buffer changed."""
    header, *buffers = frames
    values: list[Any] = msgpack.unpackb(header)
    if buffers and draw.random() < 0.6:
        at = draw.randrange(len(buffers))
        data = bytearray(buffers[at])
        match draw.randrange(4):
            case 0 if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1:
                data = data[: draw.randrange(len(data) + 1)]
            case 2:
                data += bytes(draw.choice((1, 32, 33, 66, 82)))
            case _:
                data = bytearray(draw.randbytes(len(data)))
        buffers[at] = bytes(data)
    else:
        at = draw.randrange(4, len(values)) if len(values) > 4 else 3
        if isinstance(values[at], list):
            others = [], [0], [1, 0], [0, 0], [99], [2**32 - 1]
            values[at] = draw.choice((*others, values[at][1:], [*values[at], 77], values[at][::-1]))
        elif type(values[at]) is int:
            values[at] = draw.choice((*NUMBERS, (values[at] + 1) % 2**64))
        elif type(values[at]) is float:
            values[at] = draw.choice((0.0, -1.0, float("inf"), 1e300))
    return [msgpack.packb(values), *buffers]


def made_up(draw: random.Random, session: int, incarnation: int) -> Any:
    """Any message, of this session."""
    kind = draw.choice(KINDS)
    plain: dict[str, Any] = {"incarnation": incarnation, "session": session, "shard": SHARD}
    for field in fields(kind):
        if field.name in plain:
            continue
        match field.name:
            case "ranks" | "survivors" | "turns" | "added" | "dropped" | "members":
                plain[field.name] = tuple(draw.choice(NUMBERS[:5]) for _ in range(draw.randrange(5)))
            case "metrics":
                plain[field.name] = ()
            case "right":
                plain[field.name] = draw.random() < 0.5
            case "why" | "code":
                plain[field.name] = "x"
            case "weight":
                plain[field.name] = draw.random()
            case "state":
                plain[field.name] = draw.randrange(3)
            case "buffers":
                count = 2 if kind.__name__ == "Finish" else 1
                sizes = (0, 1, 32, 33, 64, 82, 114, 512)
                plain[field.name] = tuple(draw.randbytes(draw.choice(sizes)) for _ in range(count))
            case _:
                plain[field.name] = draw.choice(NUMBERS[:6])
    return kind(**{field.name: plain[field.name] for field in fields(kind)})


def test_bad_messages_raise_nothing() -> None:
    """While rounds go on, whatever is sent to anybody as if from anybody."""
    print(f"SHOAL_SEED={SEED}")
    found: Counter[str] = Counter()
    for number in range(ROUNDS):
        found += attack(SEED + number)
    print(dict(found))
    assert found["sent"] > 20 * ROUNDS


def attack(seed: int) -> Counter[str]:
    draw = random.Random(seed)
    recipe = Recipe(active=draw.random() < 0.4, rounds=1, dropout=0.25)
    net = RoundNet(seed, 4, (5, 3), recipe, Faults())
    net.coordinator.rounds.recipe = replace(net.recipe, rounds=None)
    found: Counter[str] = Counter()

    def strike() -> None:
        if net.wire and net.stage is not None:
            session = net.coordinator.rounds.session
            assert session is not None
            name = draw.choice(sorted(net.nodes))
            try:
                if draw.random() < 0.5:
                    sent = [frames for to, frames in net.wire[-60:] if to == name and frames[0][2] >= 64]
                    message: Any = decode(damaged(draw, list(draw.choice(sent)))) if sent else None
                else:
                    inc = draw.choice((1, 2, 3, 4, 9, SHARD, SHARD + 100))
                    message = decode([bytes(each) for each in encode(made_up(draw, session.number, inc))])
            except ProtocolError:
                message = None
            node = net.nodes[name]
            peers: dict[str, tuple[Any, ...]] = {
                "w": (COORDINATOR, 0, 1),
                "s": (COORDINATOR, b"w1|0|1"),
                "c": (b"w1|-1|1",),
            }
            if message is not None:
                found["sent"] += 1
                net.give(node, Received(draw.choice(peers[name[0]]), message))
        net.at(net.now + 0.02, strike)

    net.at(0.1, strike)
    net.run(20.0, lambda: False)
    found["released"] += sum(end.released is not None for end in net.coordinator.ended)
    return found
