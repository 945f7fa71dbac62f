"""A worker in a federated round, against servers and peers that lie (rung T0, SPEC §14.5): it withdraws, and opens nothing.

The attacks are those of Bonawitz et al. 2017, Pasquini et al. 2022 and others.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from roundnet import LAYOUT, RoundNet
from roundtable import ELEMENTS, SESSION, Table, opened, plan_for

from shoal.protocol.effects import COORDINATOR, Received, Tick
from shoal.protocol.errors import ConfigError, ProtectionError, RoundClosed
from shoal.protocol.join import CLEAR
from shoal.protocol.rounds import (
    Abandoned,
    Advertise,
    Consent,
    Consents,
    Deal,
    Invite,
    Masked,
    Noted,
    Relay,
    Released,
    Roster,
    Unmask,
    Withdraw,
)
from shoal.protocol.secure.keys import Identity, Pair
from shoal.protocol.secure.plan import Policy
from shoal.protocol.secure.shares import SHARE_BYTES
from shoal.protocol.session import Advert, Members, consent, pack_adverts, pack_leaves
from shoal.ps.recipe import Recipe
from shoal.worker.parley import Invited, Over
from shoal.worker.round import Phase, RoundClient

# --- 1: both secrets of one member


def test_a_client_unmasks_once() -> None:
    """Asked again with other survivors, or consents, or after the end: it gives nothing more."""
    table = Table(active=False)
    table.relay()
    table.survive(0, 0, 1, 2, 3)
    first = opened(table, 0)
    table.survive(0, 0, 1, 2)
    table.survive(0, 0, 2, 3)
    table.tell(0, Consents, (), (b"",))
    table.tell(0, Relay, (), (b"",))
    table.give(0, Tick(), 1.5)
    assert {*first} == {*opened(table, 0)}
    table.tell(0, Abandoned, "")
    table.survive(0, 0, 1, 2)
    table.give(0, Tick(), 9.0)
    assert {*first} == {*opened(table, 0)}


def test_no_script_gets_two_secrets_of_one_member() -> None:
    """Whatever a server asks, in whatever order: of each member a client opens one kind of secret."""
    scripts = product([(0, 1, 2, 3), (0, 1, 2), (0, 2, 3), (0, 1), (0, 1, 2, 9), (3, 0)], repeat=2)
    for script in scripts:
        table = Table(active=False)
        table.relay()
        hand = table.clients[0]._hand
        assert hand is not None
        shares = dict(hand._shares)
        for ranks in script:
            table.survive(0, *ranks)
        given = {bytes(each.buffers[0]): each.ranks for each in table.heard(0, Unmask)}
        assert len(given) <= 1
        for buffer, ranks in given.items():
            for place, rank in enumerate(ranks):
                share = buffer[place * SHARE_BYTES : (place + 1) * SHARE_BYTES]
                assert 1 == (share == shares[rank][:SHARE_BYTES]) + (share == shares[rank][SHARE_BYTES:])


# --- 2: different survivors for different clients


def test_survivors_that_others_did_not_see_are_not_unmasked() -> None:
    """With fewer than the threshold's signatures on its own list a client withdraws."""
    table = Table(6, threshold=5, minimum=5)
    table.relay()
    lists = [(0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)]
    for number in range(6):
        table.survive(number, *lists[number % 2 or number == 5])
    for number in range(5):
        table.tell(number, Consents, *table.consents(range(5)))
        assert "confirmed" in table.refused(number)


def test_no_assignment_of_lists_opens_both_secrets() -> None:
    """Each of two lists told to any subset of the clients, all signatures relayed: never are there enough shares of both kinds."""
    count, threshold = 4, 3
    lists = [(0, 1, 2, 3), (0, 1, 2)]
    for told in product((0, 1), repeat=count):
        table = Table(count, threshold=threshold, minimum=3)
        table.relay()
        for number in range(count):
            table.survive(number, *lists[told[number]])
        signed = [number for number in range(count) if table.heard(number, Consent)]
        for number in signed:
            table.tell(number, Consents, *table.consents(signed))
        own = [number for number in signed if table.heard(number, Unmask)]
        b, s = (sum(told[number] == which for number in own) for which in (0, 1))
        assert min(b, s) < threshold
        assert own or len({told[number] for number in signed}) == 2 or len(signed) < threshold


def test_signatures_of_others_count_for_nothing() -> None:
    """Of somebody who is no survivor, on another list, by another key, of another session, or given twice."""
    for forge in ("outsider", "other", "twice", "garbage"):
        table = Table(6, threshold=5, minimum=5)
        table.relay()
        for number in range(6):
            table.survive(number, *((0, 1, 2, 3, 4, 5) if forge == "other" and number > 3 else (0, 1, 2, 3, 4)))
        ranks, (signatures,) = table.consents(range(4))
        hand = table.clients[0]._hand
        assert hand is not None
        fake = {
            "outsider": table.identities[5].sign(consent(hand._sid, (0, 1, 2, 3, 4))),
            "other": bytes(table.heard(4, Consent)[-1].buffers[0]),
            "twice": signatures[64:128],
            "garbage": bytes(64),
        }[forge]
        rank = {"outsider": 5, "twice": 1}.get(forge, 4)
        table.tell(0, Consents, (*ranks, rank), (signatures + fake,))
        assert "are the fewest" in table.refused(0) or (forge == "twice" and "ascend" in table.refused(0))


# --- 3, 10: what was said before


def test_a_round_that_was_released_is_not_taken_part_in_again() -> None:
    """After shares were given, whatever the session; and what was written down holds for a new life as well."""
    table = Table(active=False)
    table.relay()
    table.survive(0, 0, 1, 2, 3)
    table.tell(0, Abandoned, "")
    assert table.over(0).released
    table.said[0].clear()
    table.session += 1
    table.tell(0, Invite, (table.plan.packed,))
    assert "shares were given" in table.refused(0)
    again = RoundClient(1, "c0", table.policy, ELEMENTS, LAYOUT, None, None, {9: 0})
    effects = again.handle(Received(COORDINATOR, Invite(1, 70, (table.plan.packed,))), 0.0)
    assert any(isinstance(each, Over) and isinstance(each.error, ProtectionError) for each in effects)
    later = plan_for(4, 1, active=False).packed
    effects = again.handle(Received(COORDINATOR, Invite(1, 71, (later,))), 0.0)
    assert any(isinstance(each, Invited) for each in effects)


def test_a_round_that_was_not_released_may_be_tried_again() -> None:
    """With fresh keys: nothing that was sent is sent again."""
    table = Table(active=False)
    table.relay()
    first = [bytes(each.buffers[0]) for kind in (Advertise, Deal, Masked) for each in table.heard(0, kind)]
    for number in range(4):
        table.tell(number, Abandoned, "")
        assert not table.over(number).released
        table.said[number].clear()
    table.session += 1
    table.relay()
    second = [bytes(each.buffers[0]) for kind in (Advertise, Deal, Masked) for each in table.heard(0, kind)]
    assert 3 == len(first) == len(second) and not {*first} & {*second}


@pytest.mark.parametrize("session", [SESSION, SESSION - 1, SESSION - 40])
def test_an_old_invitation_changes_nothing(session: int) -> None:
    """Of this session or of an earlier one of the run."""
    table = Table()
    table.seat()
    table.session = session
    effects = table.tell(0, Invite, (table.plan.packed,))
    assert [Noted] == [type(each.message) for each in effects]
    assert Phase.SEATED == table.clients[0].phase


def test_a_new_invitation_ends_the_old_session() -> None:
    """The coordinator has begun again, or another has taken its place."""
    for run, session in ((9, SESSION + 1), (10, 3)):
        table = Table()
        table.relay()
        table.session = session
        table.tell(0, Invite, (replace(table.plan, run=run).packed,))
        assert isinstance(table.over(0).error, RoundClosed)
        assert Phase.ADVERTISED == table.clients[0].phase


def test_shares_of_another_session_do_not_open() -> None:
    """Recorded in one session of the same plan and relayed in another."""
    table = Table(active=False)
    table.relay()
    sealed = table.sealed_for(0)
    for number in range(4):
        table.tell(number, Abandoned, "")
        table.said[number].clear()
    table.session += 1
    table.deal()
    table.tell(0, Relay, tuple(sealed), (b"".join(sealed.values()),))
    assert "does not open" in table.refused(0)


def test_shares_that_were_swapped_or_changed_do_not_open() -> None:
    """Sealed for another receiver, by another sender, with a bit changed, cut; or from somebody who is no neighbour."""
    for change in ("receiver", "sender", "bit", "cut", "self", "order", "few"):
        table = Table(5, active=False, threshold=3, minimum=3)
        table.deal()
        sealed = table.sealed_for(0)
        ranks, parts = list(sealed), list(sealed.values())
        if change == "receiver":
            parts[0] = table.sealed_for(2)[1]
        elif change == "sender":
            parts[0], parts[1] = parts[1], parts[0]
        elif change == "bit":
            parts[0] = bytes([parts[0][0] ^ 1]) + parts[0][1:]
        elif change == "cut":
            parts[-1] = parts[-1][:-1]
        elif change == "self":
            ranks, parts = [0, *ranks], [parts[0], *parts]
        elif change == "order":
            ranks, parts = ranks[::-1], parts[::-1]
        else:
            ranks, parts = ranks[:1], parts[:1]
        table.tell(0, Relay, tuple(ranks), (b"".join(parts),))
        assert table.refused(0), change
        assert not table.heard(0, Masked)


# --- 4, 5: other people's keys


def forged(table: Table, change: str) -> tuple[bytes, bytes]:
    """A roster for the first client, with something wrong."""
    adverts, mine = list(table.adverts), table.identities
    names = list(table.names)
    one = adverts[1]
    fresh = Pair.fresh().public, Pair.fresh().public

    def sign(advert: Advert, by: Identity) -> Advert:
        return replace(advert, signature=by.sign(advert.signed))

    match change:
        case "forged":
            adverts[1] = sign(Advert(one.context, one.name, *fresh, b""), Identity.fresh())
        case "unsigned":
            adverts[1] = Advert(one.context, one.name, *fresh, b"")
        case "swapped":
            adverts[1] = replace(one, sealing=one.masking, masking=one.sealing)
        case "reflected":
            adverts[1] = sign(Advert(one.context, one.name, adverts[0].sealing, fresh[0], b""), mine[1])
        case "twice":
            adverts[1] = sign(Advert(one.context, one.name, adverts[2].sealing, fresh[0], b""), mine[1])
        case "equal":
            adverts[1] = sign(Advert(one.context, one.name, fresh[0], fresh[0], b""), mine[1])
        case "plan":
            adverts[1] = sign(Advert(bytes(32), one.name, *fresh, b""), mine[1])
        case "unlisted":
            names[3] = "d9"
            adverts[3] = sign(Advert(one.context, "d9", *fresh, b""), Identity.fresh())
        case "own":
            adverts[0] = sign(Advert(one.context, "c0", *fresh, b""), mine[0])
        case "absent":
            names, adverts = names[1:], adverts[1:]
        case "few":
            names, adverts = names[:2], adverts[:2]
        case "many":
            names.append("d9")
            adverts.append(sign(Advert(one.context, "d9", *fresh, b""), Identity.fresh()))
        case "order":
            names[2:], adverts[2:] = names[:1:-1], adverts[:1:-1]
        case "double":
            names[2], adverts[2] = names[1], adverts[1]
    leaves = [advert.leaf for advert in adverts]
    if change == "leaf":
        leaves[1] = bytes(32)
    others = [advert for advert in adverts if advert.name != "c0"]
    if change == "missing":
        others = others[1:]
    return pack_leaves(Members(tuple(names), tuple(leaves))), pack_adverts(others)


CHANGES = "forged unsigned swapped reflected twice equal plan unlisted own absent few many order double leaf missing"


@pytest.mark.parametrize("change", CHANGES.split())
def test_a_roster_that_is_not_right_is_refused(change: str) -> None:
    """Nothing is dealt to keys that are not those of the clients whom this one knows."""
    table = Table()
    table.invite()
    table.tell(0, Roster, forged(table, change))
    table.train(0)
    assert table.refused(0)
    assert not table.heard(0, Deal)


def test_keys_with_which_everybody_agrees_are_refused() -> None:
    """Points of low order, signed by a client that lies."""
    low = [
        bytes(32),
        bytes([1]) + bytes(31),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    ]
    for key in low:
        table = Table()
        table.invite()
        one = Advert(table.plan.context, "c1", key, Pair.fresh().public, b"")
        table.adverts[1] = replace(one, signature=table.identities[1].sign(one.signed))
        table.tell(0, Roster, table.rosters()[0])
        table.train(0)
        table.refused(0)
        assert not table.heard(0, Deal)


def test_identities_that_cannot_be_are_refused_when_they_are_loaded() -> None:
    """Two clients with one key; this client with another key than its own."""
    mine, other = Identity.fresh(), Identity.fresh()
    for peers in ({"c0": mine.public, "c1": mine.public}, {"c0": other.public, "c1": mine.public}):
        with pytest.raises(ConfigError):
            RoundClient(1, "c0", Policy(), ELEMENTS, LAYOUT, mine, peers)


def test_a_plan_with_identities_needs_them() -> None:
    """A worker that has none pinned does not take part: it could not tell who the others are."""
    plan = plan_for(4)
    for identity, peers in ((None, None), (Identity.fresh(), None), (None, {})):
        client = RoundClient(1, "c0", Policy(minimum=2, corrupt=0.0), ELEMENTS, LAYOUT, identity, peers)
        effects = client.handle(Received(COORDINATOR, Invite(1, SESSION, (plan.packed,))), 0.0)
        assert any(isinstance(each, Over) and isinstance(each.error, ProtectionError) for each in effects)


# --- 6, 9: plans


@pytest.mark.parametrize(
    ("policy", "settings", "why"),
    [
        (Policy(), {"protection": CLEAR, "active": False}, "secagg"),
        (Policy(minimum=4), {"minimum": 3}, "survivors are at least 4"),
        (Policy(minimum=2, threshold=4), {}, "threshold is at least 4"),
        (Policy(minimum=2, corrupt=0.0, clip=0.5), {}, "clip is at most"),
        (Policy(minimum=2, corrupt=0.0, bits=32), {"bits": 16}, "modulus"),
        (Policy(minimum=2, corrupt=0.0, active=True), {"active": False}, "identities sign"),
        (Policy(minimum=2, corrupt=0.5), {}, "c + 2"),
    ],
)
def test_a_plan_that_protects_less_is_refused(policy: Policy, settings: dict[str, Any], why: str) -> None:
    """What a worker pins is what it gets, or `ProtectionError`; nothing is advertised."""
    table = Table(policy=policy, **settings)
    for number in range(4):
        table.tell(number, Invite, (table.plan.packed,))
        assert why in table.refused(number)
        assert not table.heard(number, Advertise)


def test_a_threshold_that_an_active_server_could_cheat_is_refused() -> None:
    """Five of ten."""
    plan = replace(plan_for(10), threshold=5, minimum=5)
    table = Table(10)
    table.tell(0, Invite, (plan.packed,))
    assert "2t > N + c" in table.refused(0)


@pytest.mark.parametrize("other", [{"elements": 7, "shards": ((0, 7),)}, {"layout": bytes(32)}])
def test_a_plan_for_another_model_is_refused(other: dict[str, Any]) -> None:
    """A server cannot change what is trained."""
    table = Table()
    table.tell(0, Invite, (replace(table.plan, **other).packed,))
    assert "model" in table.refused(0)


def test_a_plan_that_cannot_be_read_is_declined() -> None:
    """It is counted; the client withdraws, and takes part in the next."""
    table = Table()
    for number, bad in enumerate((b"", b"\x90", table.plan.packed[:-1], bytes(1 << 19))):
        effects = table.give(0, Received(COORDINATOR, Invite(1, number, (bad,))))
        assert [Withdraw] == [type(each.message) for each in effects]
    assert 4 == table.clients[0].counters["rejected.malformed"]
    table.seat()
    assert Phase.SEATED == table.clients[0].phase


# --- 7: tiny sums


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        ((0,), "fewest"),
        ((0, 1), "fewest"),
        ((1, 2, 3), "not among"),
        ((0, 1, 2, 9), "never advertised"),
        ((0, 1, 1, 2), "ascend"),
        ((2, 1, 0), "ascend"),
        ((), "not among"),
    ],
)
def test_a_sum_that_must_not_be_opened_is_not(survivors: tuple[int, ...], why: str) -> None:
    """Of one, of fewer than the minimum, without this client, with somebody who is not in the session."""
    for active in (True, False):
        table = Table(active=active, threshold=3, minimum=3)
        table.relay()
        table.survive(0, *survivors)
        assert why in table.refused(0)
        assert not table.heard(0, Consent)


def test_a_survivor_whose_shares_never_came_is_not_unmasked() -> None:
    """A client that dealt, as the server says now, and whose deal it kept back before."""
    table = Table(5, active=False, threshold=3, minimum=3)
    table.relay(dealt=(0, 1, 2, 3))
    table.survive(0, 0, 1, 2, 4)
    assert "has not got" in table.refused(0)


def test_nothing_is_unmasked_before_everything_was_sent() -> None:
    """A server that asks at once gets nothing: the input of this client is not in any sum yet."""
    table = Table(active=False)
    table.deal()
    table.survive(0, 0, 1, 2, 3)
    assert not table.heard(0, Unmask) and Phase.DEALT == table.clients[0].phase
    assert table.clients[0].counters["rejected.misplaced"]
    table.tell(0, Released, (0, 1, 2, 3), 4.0, 0, 0, ())
    assert isinstance(table.over(0).error, RoundClosed)


# --- 8: different weights for different clients


def test_other_weights_than_the_plans_are_refused() -> None:
    """Before anything is dealt."""
    table = Table()
    table.seat()
    table.train(0, model=bytes(32))
    assert "other weights" in table.refused(0)
    assert not table.heard(0, Deal)


@pytest.mark.parametrize("liar", ["w1", "w3"])
def test_a_client_with_other_weights_sends_noise(liar: str) -> None:
    """Even if it were talked into taking part: its masks do not cancel, and the canary says so at the shard. Nothing is applied."""
    net = RoundNet(3, 4, (60,), Recipe(rounds=1))
    client = net.workers[liar].client

    def other() -> None:
        hand = client._hand
        assert hand is not None
        real = hand.keys
        hand.keys = lambda model: real(bytes(32))  # type: ignore[method-assign]

    net.when(lambda: client.phase == Phase.DEALT, other)
    assert net.go()
    (end,) = net.coordinator.ended
    assert end.released is None and "not right" in end.why
    assert not net.shards[0].applied
