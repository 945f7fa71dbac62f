"""Update rules by name and numbers: what the table lets in is what torch would begin with (rung T0, SPEC §8)."""

from __future__ import annotations

import inspect
import re
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol import rules
from shoal.protocol.errors import ConfigError
from shoal.protocol.rules import FLAGS, RULES, SGD, Adagrad, Adam, AdamW, Delta, RMSprop, Rule

MAKERS = (SGD, Adagrad, RMSprop, Adam, AdamW)
NAMES = [make.__name__.lower() for make in MAKERS]
NUMBERS = st.sampled_from((0.0, 0.5, 1.0, -0.5, 0.999, 1e-8, 2.0))


def torch_class(name: str) -> Any:
    return next(getattr(torch.optim, make.__name__) for make in MAKERS if make.__name__.lower() == name)


def torch_takes(name: str, numbers: dict[str, float]) -> bool:
    given_: dict[str, Any] = {key: bool(value) if key in FLAGS else value for key, value in numbers.items()}
    if "beta1" in given_:
        given_["betas"] = (given_.pop("beta1"), given_.pop("beta2"))
    try:
        torch_class(name)([torch.zeros(1)], **given_)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_let_in_when_torch_would_begin_with_it(name: str) -> None:
    """With any finite numbers, a rule can be made exactly when torch's optimizer can."""

    @settings(deadline=None, max_examples=150)
    @given(st.tuples(*(st.sampled_from((0.0, 1.0)) if number in FLAGS else NUMBERS for number in RULES[name])))
    def check(numbers: tuple[float, ...]) -> None:
        wanted = torch_takes(name, dict(zip(RULES[name], numbers, strict=True)))
        if wanted:
            assert numbers == Rule(name, numbers).numbers
        else:
            with pytest.raises(ConfigError):
                Rule(name, numbers)

    check()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_defaults_are_torchs(make: Any) -> None:
    """What a user gets by naming no number is what torch gives; and the names are torch's."""
    made = make()
    theirs = inspect.signature(torch_class(made.name)).parameters
    for name, number in made.named().items():
        default = theirs["betas"].default[name == "beta2"] if name.startswith("beta") else theirs[name].default
        assert float(default) == number, name
    assert set(inspect.signature(make).parameters) <= set(theirs)


@pytest.mark.parametrize(
    ("name", "numbers", "told"),
    [
        ("lion", (), "no update rule 'lion'.*sgd, adagrad"),
        ("os.system", (), "no update rule"),
        ("sgd", (0.1,), "takes 6 numbers, not 1"),
        ("delta", (0.1,), "takes 0 numbers, not 1"),
        ("sgd", (nan, 0, 0, 0, 0, 0), "lr is nan"),
        ("sgd", (inf, 0, 0, 0, 0, 0), "lr is inf"),
        ("sgd", (0.1, 0.9, 0, 0, 0.5, 0), "nesterov is a flag, not 0.5"),
        ("sgd", (0.1, 0.9, 0.1, 0, 1, 0), "nesterov needs a momentum"),
        ("adam", (0.1, 1.0, 0.9, 1e-8, 0, 0, 0, 0), "beta1 is 1.0"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(name: str, numbers: tuple[float, ...], told: str) -> None:
    """A rule that is not in the table is a `ConfigError` that names the number."""
    with pytest.raises(ConfigError, match=told):
        Rule(name, tuple(map(float, numbers)))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_push_may_change_numbers_but_not_flags(data: st.DataObject) -> None:
    """In a push any finite number will do, as many as registered; flags are as they were."""
    rule = data.draw(st.sampled_from([make() for make in MAKERS] + [Delta(), SGD(momentum=0.9, nesterov=True)]))
    names = RULES[rule.name]
    changed = tuple(
        data.draw(st.sampled_from((number, 1.0 - number)) if name in FLAGS else st.floats())
        for name, number in rule.named().items()
    )
    same = all(new == old for name, new, old in zip(names, changed, rule.numbers, strict=True) if name in FLAGS)

    assert rule.accepts(changed) == (same and all(abs(number) < inf for number in changed))
    assert not rule.accepts((*changed, 0.0))
    assert not names or not rule.accepts(changed[:-1])


def test_the_specification_has_the_same_table() -> None:
    """SPEC §8 and the code agree on names, numbers, their order, and which are flags."""
    found = {}
    chapter = (Path(rules.__file__).parent / "SPEC.md").read_text().split("\n## 8. ")[1].split("\n## 9. ")[0]
    for line in chapter.splitlines():
        if row := re.match(r"\| `(\w+)` \| ([^|]+) \|", line):
            found[row[1]] = tuple(word for word in row[2].strip().split(", ") if word != "(none)")

    assert {name: tuple(n + "*" * (n in FLAGS) for n in numbers) for name, numbers in RULES.items()} == found
