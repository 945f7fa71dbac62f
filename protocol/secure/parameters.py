"""How many neighbours, shares and survivors a round of so many clients needs (SPEC §14): from what may go wrong in it.

Rules
- N clients, of which at most c work with the servers and at most d drop out; each secret is in h shares, t of which open it.
- Privacy: t > c; if the servers may show different clients different things (`active`), 2t > h + c.
- Liveness: t <= h - d, and as many must survive as the sum must be of.
- Up to 128 clients, and always when `active`, everybody is everybody's neighbour and h = N. Above, each has k neighbours in a
  random order, and what can go wrong has a probability: at most 2^-40 for privacy, 2^-20 for liveness (Bell et al. 2020, by
  hypergeometric tails).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..errors import ConfigError

COMPLETE = 128
"""Up to so many clients the graph is complete."""
LEAST = 3
"""Survivors, unless fewer are asked for: a sum of two shows each of them the other's part."""
CORRUPT = DROPOUT = 0.3
"""Shares of the clients that the default threshold, over two thirds, bears whatever their number."""
SECRECY_BITS, LIVENESS_BITS = 40, 20


@dataclass(frozen=True, slots=True)
class Parameters:
    """Of a round of so many clients.

    Attributes:
        degree: neighbours of each client. threshold: shares that open a secret. minimum: survivors without whom there is no sum.
    """

    degree: int
    threshold: int
    minimum: int


def resolve(
    count: int,
    *,
    active: bool,
    corrupt: float = CORRUPT,
    dropout: float = DROPOUT,
    threshold: int | None = None,
    minimum: int | None = None,
) -> Parameters:
    """The parameters of a round.

    Args:
        count: clients that are invited.
        active: may the servers lie, and not only look?
        corrupt, dropout: at most this share of the clients works with the servers, or drops out; from 0, below 1.
        threshold, minimum: as asked for, or None for the least that does; on a complete graph at least two thirds.

    Raises:
        ConfigError: it cannot be done; the text says which inequality does not hold.
    """
    if count < 2 or not 0 <= corrupt < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            f"a secure round of {count} clients with shares of {corrupt:g} corrupt, {dropout:g} dropping out"
        )
    c, d = most(corrupt, count), most(dropout, count)
    if active or count <= COMPLETE:
        return _complete(count, c, d, active, threshold, minimum)
    found = _regular(count, c, d, threshold)
    if found is None:
        return _complete(count, c, d, active, threshold, minimum)
    return Parameters(*found, _minimum(count, c, d, found[1], minimum, least=count - d))


def most(share: float, count: int) -> int:
    """How many of so many clients a share is."""
    return math.floor(share * count + 1e-9)


def violated(count: int, degree: int, threshold: int, corrupt: int, dropout: int, active: bool) -> str:
    """Which inequality of privacy does not hold, or an empty text.

    Args:
        count, degree, threshold: of the round. corrupt, dropout: at most so many clients.
    """
    if degree >= count - 1:
        if active and 2 * threshold <= count + corrupt:
            return f"2t > N + c: 2·{threshold} > {count} + {corrupt}"
        if threshold <= corrupt:
            return f"t > c: {threshold} > {corrupt}"
        return ""
    if active:
        return f"k = N - 1 where servers may lie: {degree} = {count - 1}"
    if _cut(count, degree, corrupt + dropout) > 2 ** -(SECRECY_BITS + 1):
        return f"P[the survivors fall apart] <= 2^-{SECRECY_BITS + 1} with {degree} neighbours"
    if _open(count, degree, corrupt, threshold) > 2 ** -(SECRECY_BITS + 1):
        return f"P[t of {degree} neighbours are corrupt] <= 2^-{SECRECY_BITS + 1}: t = {threshold}"
    return ""


def _complete(
    count: int, corrupt: int, dropout: int, active: bool, threshold: int | None, minimum: int | None
) -> Parameters:
    low = max(2, (count + corrupt) // 2 + 1 if active else corrupt + 1)
    high = count - dropout
    if low > high:
        law = "c + 2d < N" if active else "c + d < N"
        raise _impossible(f"{law}, with c = {corrupt}, d = {dropout}, N = {count}")
    if threshold is None:
        threshold = min(max(low, 2 * count // 3 + 1), high)
    if threshold < 2 or threshold > high:
        raise _impossible(f"2 <= t <= N - d: 2 <= {threshold} <= {high}")
    if broken := violated(count, count - 1, threshold, corrupt, dropout, active):
        raise _impossible(broken)
    return Parameters(count - 1, threshold, _minimum(count, corrupt, dropout, threshold, minimum))


def _minimum(count: int, corrupt: int, dropout: int, threshold: int, asked: int | None, least: int = 0) -> int:
    """How many must survive. On a graph that is not complete as many as its parameters were found for."""
    floor = max(threshold, corrupt + 2, least)
    minimum = max(floor, LEAST) if asked is None else asked
    if minimum < floor:
        raise _impossible(f"minimum >= {floor}: {minimum} >= {floor}")
    if minimum > count - dropout:
        raise _impossible(f"minimum <= N - d: {minimum} <= {count} - {dropout}")
    return minimum


def _impossible(law: str) -> ConfigError:
    return ConfigError(
        f"a secure round cannot be: this does not hold: {law}",
        cause="too few clients for what is to be borne",
        hint="more workers, or fewer that may drop out or be corrupt",
    )


@lru_cache(maxsize=64)
def _regular(count: int, corrupt: int, dropout: int, asked: int | None) -> tuple[int, int] | None:
    """The fewest neighbours, and the threshold, or None if only the complete graph does."""
    for degree in range(2, count - 1, 2):
        if _cut(count, degree, corrupt + dropout) > 2 ** -(SECRECY_BITS + 1):
            continue
        threshold = asked or _threshold(count, degree, corrupt)
        if violated(count, degree, threshold, corrupt, dropout, False):
            continue
        if count * _tail(count - 1, dropout, degree, degree - threshold + 1) <= 2**-LIVENESS_BITS:
            return degree, threshold
    return None


def _threshold(count: int, degree: int, corrupt: int) -> int:
    """The fewest shares that corrupt neighbours do not have."""
    for threshold in range(2, degree + 1):
        if _open(count, degree, corrupt, threshold) <= 2 ** -(SECRECY_BITS + 1):
            return threshold
    return degree + 1


def _open(count: int, degree: int, corrupt: int, threshold: int) -> float:
    """At most the probability that some client has so many corrupt neighbours."""
    return count * _tail(count - 1, corrupt, degree, threshold)


def _cut(count: int, degree: int, gone: int) -> float:
    """At most the probability that the ring falls apart: two runs of half the degree in it are all gone."""
    if degree > gone:
        return 0.0
    pairs = count * (count - degree - 1) / 2
    return pairs * math.exp(_log_choose(count - degree, gone - degree) - _log_choose(count, gone))


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """The probability that of so many drawn at least `least` are marked ones."""
    every = _log_choose(population, drawn)
    return math.fsum(
        math.exp(_log_choose(marked, hit) + _log_choose(population - marked, drawn - hit) - every)
        for hit in range(max(least, 0, drawn - population + marked), min(drawn, marked) + 1)
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
