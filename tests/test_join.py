"""The join string: read as it was written, wrong in words, never shown whole (rung T0, SPEC §10.2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError
from shoal.protocol.join import JoinAddress, bracket, key_text, read_join, read_key

keys = st.binary(min_size=32, max_size=32)
hosts = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True) | st.ip_addresses().map(str)
KEY, SECRET = bytes(range(32)), bytes(range(100, 132))


@settings(deadline=None, max_examples=200)
@given(hosts, st.integers(1, 65535), st.tuples(keys, keys) | st.just((b"", b"")))
def test_a_join_string_is_read_as_it_was_written(host: str, port: int, pair: tuple[bytes, bytes]) -> None:
    """Any host, any port, with keys or without: what is written is read; a `repr` is that without the secret."""
    address = JoinAddress(host, port, *pair)
    text = str(address)

    assert address == read_join(text)
    assert address == read_join(f"  SHOAL_JOIN='{text}'\n") == read_join(f'"{text}"')
    assert (5 if pair[0] else 3) == len(text.replace(bracket(host), "HOST").split(":"))
    assert f"{bracket(host)}:{port}" == address.address
    assert repr(replace(address, secret=b"")) == repr(address)


@settings(deadline=None, max_examples=100)
@given(keys)
def test_a_key_is_43_characters(key: bytes) -> None:
    """32 raw bytes are 43 characters of unpadded base64url, and nothing else reads as those bytes."""
    text = key_text(key)

    assert (43, key) == (len(text), read_key(text, "key"))
    assert not set(text) & set("+/=")
    for wrong in (text[:-1], text + "A", text + "=", "é" + text[1:], " " + text[1:], text[:-1] + "_", ""):
        if wrong != text:
            with pytest.raises(ConfigError, match=f"the secret key has {len(wrong)} characters"):
                read_key(wrong, "secret key")


def test_a_plain_address_will_do() -> None:
    """A host, with a port or without, is an address without keys."""
    for text, host, port in (
        ("a.org", "a.org", 7450),
        ("a.org:", "a.org", 7450),
        ("[::1]", "::1", 7450),
        ("a:81", "a", 81),
    ):
        assert JoinAddress(host, port) == read_join(text) == read_join(f"shoal1:{text}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("shoal2:host:1", "begins with 'shoal2', not 'shoal1'"),
        ("shoal1:", "'' is not a host"),
        ("::1", "'' is not a host"),
        ("ho st:1", "is not a host"),
        ("tcp://host:1", "'//host' is not a port"),
        ("[::1:7450", "has no closing bracket"),
        ("[::1]7450", "has no closing bracket"),
        ("host:0", "'0' is not a port"),
        ("host:65536", "is not a port"),
        ("host:٣", "is not a port"),
        ("host:1:key", "3 parts after 'shoal1', not 2 or 4.*cut short"),
        (f"host:1:{key_text(KEY)}:{key_text(SECRET)}:more", "5 parts"),
        (f"host:1:{key_text(KEY)[:-1]}:{key_text(SECRET)}", "the server key has 42 characters"),
        (f"host:1:{key_text(KEY)}:{key_text(SECRET)[:-3]}", "the secret has 40 characters"),
    ],
)
def test_a_wrong_string_says_which_part(text: str, told: str) -> None:
    """Each part that is wrong is named, with what to do, and neither key is in the text."""
    with pytest.raises(ConfigError, match=told) as error:
        read_join(text)

    assert key_text(SECRET)[:20] not in str(error.value)
    assert key_text(KEY) not in str(error.value)
    assert "shoal server" in error.value.hint


@pytest.mark.parametrize("text", ["[]:1", "shoal1:[a b]:1"])
def test_brackets_hold_a_host(text: str) -> None:
    """Nothing, or a blank, between brackets is no host."""
    with pytest.raises(ConfigError):
        read_join(text)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40) | st.lists(st.sampled_from(("shoal1", ":", "[", "]", "1", "a", "é", "\0")), max_size=9))
def test_any_text_is_read_or_refused(text: str | list[str]) -> None:
    """Whatever is typed is an address or a `ConfigError`."""
    try:
        found = read_join("".join(text))
    except ConfigError:
        return
    assert 0 < found.port < 65536
