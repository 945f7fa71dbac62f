"""What all agree on and a worker demands: strict bytes, every law of a plan, all refusals of a policy (rung T0, SPEC §14)."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError, ProtectionError, ProtocolError
from shoal.protocol.join import CLEAR, SECAGG
from shoal.protocol.secure import plan as plans
from shoal.protocol.secure.hashing import digest, pack, unpack
from shoal.protocol.secure.parameters import resolve
from shoal.protocol.secure.plan import Plan, Policy
from shoal.protocol.secure.privacy import Skellam

LAYOUT, MODEL = digest("layout"), digest("model")
PLAN = Plan(
    run=2**64 - 1,
    round=3,
    protection=SECAGG,
    cohort=10,
    minimum=7,
    threshold=7,
    degree=9,
    active=True,
    bits=32,
    clip=0.1,
    cap=8.0,
    reference=100.0,
    elements=1000,
    layout=LAYOUT,
    model=MODEL,
    shards=((0, 400), (131072, 131672)),
    training=(("lr", 0.1), ("batch", 64), ("optimizer", "sgd"), ("note", "")),
    metrics=("loss",),
    deadlines=(10.0, 5.0, 60.0, 5.0),
)
NOISE = Skellam(clip=1.0, multiplier=1.0, units=1 << 10, honest=4)
NOISY = replace(PLAN, cap=1.0, metrics=(), noise=NOISE)
IN_THE_CLEAR = replace(PLAN, protection=CLEAR, threshold=0, degree=0, active=False)
REGULAR = replace(PLAN, cohort=1000, degree=48, threshold=27, minimum=900, active=False)


@pytest.mark.parametrize("plan", [PLAN, NOISY, IN_THE_CLEAR, REGULAR], ids=["masked", "noisy", "clear", "regular"])
def test_packed_and_back(plan: Plan) -> None:
    """Equal, with the same context; an array that begins with the version."""
    again = Plan.unpack(plan.packed)

    assert plan == again
    assert digest("plan", plan.packed) == plan.context == again.context
    assert (1, plan.run, plan.round) == unpack(plan.packed)[:3]


CHANGES: dict[str, Any] = {
    "run": 0,
    "round": 4,
    "protection": None,
    "cohort": 11,
    "minimum": 8,
    "threshold": 6,
    "degree": None,
    "active": False,
    "bits": 16,
    "clip": 0.2,
    "cap": 7.0,
    "reference": 1.0,
    "elements": None,
    "layout": MODEL,
    "model": LAYOUT,
    "shards": ((0, 1000),),
    "training": (("lr", 0.2),),
    "metrics": (),
    "deadlines": (),
    "noise": None,
    "stream": None,
}


def test_everything_is_in_the_context() -> None:
    """Any field that differs for one client gives it another context; there is no field beside."""
    assert {field.name for field in fields(Plan)} == set(CHANGES)
    changed = [
        replace(PLAN, **{name: value}) for name, value in CHANGES.items() if value is not None and name != "cohort"
    ]
    changed += [
        replace(PLAN, cohort=11, degree=10),
        NOISY,
        replace(NOISY, noise=replace(NOISE, units=2000)),
        IN_THE_CLEAR,
    ]
    changed += [replace(PLAN, elements=1001, shards=((0, 1001),)), replace(REGULAR, degree=50)]
    changed += [replace(PLAN, training=PLAN.training[::-1]), replace(PLAN, training=(*PLAN.training, ("x", 1)))]

    assert len(changed) + 2 == len({PLAN.context, REGULAR.context, *(plan.context for plan in changed)})


@pytest.mark.parametrize(
    "change",
    [
        {"run": -1},
        {"run": 2**64},
        {"round": 2**63},
        {"round": True},
        {"protection": "none"},
        {"cohort": 0},
        {"cohort": 16_385, "degree": 16_384},
        {"minimum": 0},
        {"minimum": 11},
        {"minimum": 6},
        {"threshold": 1},
        {"threshold": 8},
        {"threshold": 0},
        {"degree": 10},
        {"degree": 8},
        {"degree": 0},
        {"degree": 7, "active": False},
        {"degree": 4, "active": False},
        {"active": 1},
        {"bits": 24},
        {"bits": 32.0},
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"clip": 1},
        {"cap": 0.5},
        {"cap": 2.0**21},
        {"reference": 0.0},
        {"reference": -1.0},
        {"elements": 0, "shards": ()},
        {"elements": 999},
        {"elements": 2**40 + 1, "shards": ((0, 2**40 + 1),)},
        {"layout": bytes(31)},
        {"layout": "x" * 32},
        {"model": b""},
        {"shards": ()},
        {"shards": ((0, 400), (399, 999))},
        {"shards": ((400, 1000), (0, 400))},
        {"shards": ((0, 1100), (1100, 1000))},
        {"shards": ((-1, 999),)},
        {"shards": ((0, 1000, 0),)},
        {"shards": [(0, 1000)]},
        {"shards": ((0, 1000), *[(1000, 1000)] * 1024)},
        {"training": (("lr", math.nan),)},
        {"training": (("lr", b"x"),)},
        {"training": (("lr", 2**63),)},
        {"training": (("lr", "a\nb"),)},
        {"training": (("", 1),)},
        {"training": (("lr",),)},
        {"training": (("lr", 1), ("lr", 2))},
        {"training": tuple((str(n), n) for n in range(1025))},
        {"metrics": ("loss", "loss")},
        {"metrics": ("a\x1b[31m",)},
        {"metrics": ("x" * 257,)},
        {"metrics": tuple(map(str, range(65)))},
        {"deadlines": (0.0,)},
        {"deadlines": (1,)},
        {"deadlines": (1.0,) * 9},
        {"noise": NOISE},
        {"noise": NOISE, "cap": 1.0},
        {"noise": NOISE, "metrics": ()},
        {"noise": replace(NOISE, honest=8), "cap": 1.0, "metrics": ()},
        {"noise": replace(NOISE, units=1 << 30), "cap": 1.0, "metrics": ()},
        {"noise": replace(NOISE, units=2048), "cap": 1.0, "metrics": (), "bits": 16},
        {"noise": replace(NOISE, clip=1), "cap": 1.0, "metrics": ()},
        {"noise": replace(NOISE, units=2000.0), "cap": 1.0, "metrics": ()},
        {"stream": 2},
        {"protection": CLEAR},
        {"protection": CLEAR, "threshold": 0, "degree": 0},
        {"protection": CLEAR, "threshold": 0, "degree": 0, "active": False, "noise": NOISE, "cap": 1.0, "metrics": ()},
        {"bits": 16, "cohort": 4096, "degree": 4095, "cap": 1e6, "clip": 1e305},
    ],
    ids=str,
)
def test_a_plan_against_its_laws(change: dict[str, Any]) -> None:
    """Cannot be made; and if a server sends it, it is malformed and nothing else."""
    with pytest.raises(ConfigError, match=r"a plan|bits"):
        replace(PLAN, **change)
    sent = [1, *_plain(PLAN, change)]
    try:
        data = pack(sent)
    except (TypeError, ValueError):
        return  # has no bytes at all
    if change in ({"active": 1}, {"shards": [(0, 1000)]}):
        return  # the bytes of a right plan
    with pytest.raises(ProtocolError) as refused:
        Plan.unpack(data)
    assert "malformed" == refused.value.reason


def _plain(plan: Plan, change: dict[str, Any]) -> list[Any]:
    values = {field.name: getattr(plan, field.name) for field in fields(Plan)} | change
    noise = values["noise"]
    values["noise"] = (noise.clip, noise.multiplier, noise.units, noise.honest) if noise else ()
    if values["active"] is True or values["active"] is False:
        values["active"] = int(values["active"])
    return list(values.values())


def test_bytes_that_are_no_plan() -> None:
    """Too long, cut, another version, another number of fields, fields of the wrong kind, the long form of a number."""
    right = unpack(PLAN.packed)
    for data, reason in (
        (b"", "malformed"),
        (PLAN.packed[:-1], "malformed"),
        (PLAN.packed + b"\0", "malformed"),
        (pack(("x" * plans.MAX_BYTES,)), "malformed"),
        (pack(()), "malformed"),
        (pack(7), "malformed"),
        (pack((2, *right[1:])), "version"),
        (pack((1.0, *right[1:])), "version"),
        (pack(right[:-1]), "malformed"),
        (pack((*right, 1)), "malformed"),
        (PLAN.packed.replace(b"\xcb", b"\xca", 1), "malformed"),
        *((pack((*right[:place], (("x",),), *right[place + 1 :])), "malformed") for place in range(1, len(right))),
        *((pack((*right[:place], -1, *right[place + 1 :])), "malformed") for place in range(1, len(right))),
    ):
        with pytest.raises(ProtocolError) as refused:
            Plan.unpack(data)
        assert reason == refused.value.reason, data


@given(st.data())
@settings(max_examples=200)
def test_changed_bytes(data: st.DataObject) -> None:
    """A plan with other bytes is another plan, or is refused; nothing else is raised."""
    packed = bytearray(NOISY.packed)
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Plan.unpack(bytes(packed))
    except ProtocolError:
        return
    assert bytes(packed) == found.packed
    assert (found == NOISY) == (bytes(packed) == NOISY.packed)


def test_how_many_neighbours_take_part() -> None:
    """All the others if the graph was to be complete, or if they are fewer than planned."""
    assert [9, 6, 1] == [PLAN.degree_of(count) for count in (10, 7, 2)]
    assert [48, 48, 48, 40] == [REGULAR.degree_of(count) for count in (1000, 900, 49, 41)]


def test_what_follows_from_a_plan() -> None:
    assert (False, True) == (PLAN.uniform, NOISY.uniform)
    assert (5, 4) == (PLAN.lanes, NOISY.lanes)
    assert (32, 0.1, 8.0, 7) == (PLAN.scale(7).bits, PLAN.scale(7).clip, PLAN.scale(7).cap, PLAN.scale(7).clients)


# --- policy


def check(policy: Policy, plan: Plan, **own: Any) -> None:
    policy.check(plan, **{"elements": 1000, "layout": LAYOUT} | own)


@pytest.mark.parametrize(
    ("policy", "plan"),
    [
        (Policy(), PLAN),
        (Policy(), NOISY),
        (Policy(corrupt=0.1), REGULAR),
        (Policy(protection=CLEAR), PLAN),
        (Policy(protection=CLEAR), IN_THE_CLEAR),
        (Policy(minimum=7, threshold=7, clip=0.1, bits=32, active=True), PLAN),
        (Policy(noise=NOISE), NOISY),
        (Policy(noise=replace(NOISE, multiplier=0.5, clip=2.0)), NOISY),
        (Policy(minimum=2), replace(PLAN, cohort=3, degree=2, threshold=2, minimum=2, active=False)),
    ],
)
def test_a_plan_that_protects_enough(policy: Policy, plan: Plan) -> None:
    """Exactly as much as is demanded, or more."""
    check(policy, plan)
    check(policy, plan, released=2)


@pytest.mark.parametrize(
    ("policy", "plan", "own", "law"),
    [
        (Policy(), PLAN, {"released": 3}, "round 3 comes after 3"),
        (Policy(), PLAN, {"released": 9}, "round 3 comes after 9"),
        (Policy(), PLAN, {"elements": 999}, "the model is the one"),
        (Policy(), PLAN, {"layout": MODEL}, "the model is the one"),
        (Policy(), IN_THE_CLEAR, {}, "protection is secagg"),
        (Policy(protection=CLEAR, noise=NOISE), IN_THE_CLEAR, {}, "noise is added"),
        (Policy(minimum=8), PLAN, {}, "survivors are at least 8: 7"),
        (Policy(), replace(PLAN, cohort=3, degree=2, threshold=2, minimum=2, active=False), {}, "at least 3: 2"),
        (Policy(protection=CLEAR, minimum=8), IN_THE_CLEAR, {}, "survivors are at least 8: 7"),
        (Policy(threshold=8), PLAN, {}, "threshold is at least 8: 7"),
        (Policy(clip=0.05), PLAN, {}, "the clip is at most 0.05: 0.1"),
        (Policy(bits=32), replace(PLAN, bits=16), {}, "at least 32 bits: 16"),
        (Policy(active=True), replace(PLAN, active=False), {}, "identities sign"),
        (Policy(corrupt=0.4), PLAN, {}, r"2t > N \+ c: 2·7 > 10 \+ 4"),
        (Policy(corrupt=0.5), replace(PLAN, threshold=5, active=False), {}, "t > c: 5 > 5"),
        (Policy(corrupt=0.6), replace(PLAN, active=False), {}, r"minimum >= c \+ 2: 7 >= 6 \+ 2"),
        (Policy(), replace(PLAN, threshold=5), {}, r"2t > N \+ c: 2·5 > 10 \+ 3"),
        (Policy(corrupt=0.1), replace(REGULAR, degree=50), {}, "t of 50 neighbours"),
        (Policy(corrupt=0.1), replace(REGULAR, degree=20, threshold=19), {}, "fall apart"),
        (Policy(corrupt=0.1), replace(REGULAR, threshold=26), {}, "t of 48 neighbours"),
        (Policy(corrupt=0.2), REGULAR, {}, "t of 48 neighbours"),
        (Policy(corrupt=0.1), replace(REGULAR, minimum=300), {}, "fall apart"),
        (Policy(noise=NOISE), PLAN, {}, "noise is added"),
        (Policy(noise=replace(NOISE, multiplier=1.1)), NOISY, {}, "the noise is at least 1.1"),
        (Policy(noise=replace(NOISE, clip=0.9)), NOISY, {}, "the norm is clipped at 0.9"),
        (Policy(), replace(NOISY, noise=replace(NOISE, honest=5)), {}, "at most 4 survivors: 5"),
        (Policy(), replace(NOISY, noise=replace(NOISE, units=94)), {}, "in at least 95 units: 94"),
    ],
)
def test_a_plan_that_does_not(policy: Policy, plan: Plan, own: dict[str, Any], law: str) -> None:
    """Is refused by this worker, and the text names what is missing."""
    with pytest.raises(ProtectionError, match=law):
        check(policy, plan, **own)


@pytest.mark.parametrize(
    ("policy", "plan", "count", "law"),
    [
        (Policy(), PLAN, 6, "6 take part, and 7 are the fewest"),
        (Policy(), PLAN, 11, "11 take part, and 10 were invited"),
        (Policy(corrupt=0.1), REGULAR, 899, "899 take part, and 900"),
    ],
)
def test_who_takes_part(policy: Policy, plan: Plan, count: int, law: str) -> None:
    """Asked again when it is known: fewer than can be, more than were invited."""
    with pytest.raises(ProtectionError, match=law):
        policy.check_count(plan, count)
    policy.check_count(plan, plan.cohort)
    policy.check_count(plan, plan.minimum)


def test_what_is_resolved_satisfies_the_policy() -> None:
    """For any number of clients a round with the default parameters is one in which a worker with the default policy takes part."""
    for count in (*range(3, 40), 128, 129, 200, 1000):
        for active in (True, False):
            found = resolve(count, active=active)
            plan = replace(
                PLAN,
                cohort=count,
                degree=found.degree,
                threshold=found.threshold,
                minimum=found.minimum,
                active=active,
            )
            check(Policy(active=active), plan)
            for present in range(found.minimum, count + 1, max(1, count // 7)):
                Policy().check_count(plan, present)
