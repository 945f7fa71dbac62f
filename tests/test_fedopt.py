"""Server optimizers of federated rounds: the formulas of the paper, written a second time (rung T0, Reddi et al. 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shoal.protocol.errors import ConfigError
from shoal.protocol.federated import RULES, ServerRule
from shoal.ps.fedopt import FedOpt

ROUNDS = np.random.default_rng(5).normal(0, 0.1, (6, 40))


def paper(name: str, n: dict[str, float]) -> np.ndarray[Any, Any]:
    """The weights after all rounds, in float64."""
    x, m, v = np.zeros(40), np.zeros(40), np.full(40, n.get("tau", 0.0) ** 2)
    for d in ROUNDS:
        if name == "fedavg":
            x = x + n["lr"] * d
        elif name == "fedavgm":
            m = n["momentum"] * m + d
            x = x + n["lr"] * m
        else:
            m = n["beta1"] * m + (1 - n["beta1"]) * d
            if name == "fedadagrad":
                v = v + d**2
            elif name == "fedadam":
                v = n["beta2"] * v + (1 - n["beta2"]) * d**2
            else:
                v = v - (1 - n["beta2"]) * d**2 * np.sign(v - d**2)
            x = x + n["lr"] * m / (np.sqrt(v) + n["tau"])
    return x


@pytest.mark.parametrize("numbers", [(), (("lr", 0.03),)], ids=["as published", "another rate"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_what_the_paper_says(name: str, numbers: Any) -> None:
    """Six rounds in two blocks, each with a state of its own."""
    rule = ServerRule(name, numbers)
    opt, weights = FedOpt(rule), torch.zeros(40)
    for update in torch.tensor(ROUNDS, dtype=torch.float32):
        for block, part in enumerate((slice(0, 15), slice(15, 40))):
            weights[part] += opt.change(block, update[part].clone())
    expected = paper(name, rule.named)
    assert np.abs(weights.numpy() - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
    moments = {"fedavg": 0, "fedavgm": 1}.get(name, 2)
    assert moments * 40 * 4 == opt.nbytes


def test_rules_differ_and_momentum_0_is_the_average() -> None:
    ends = {name: paper(name, RULES[name]).tobytes() for name in RULES}
    assert len(RULES) == len(set(ends.values()))
    opt = FedOpt(ServerRule("fedavgm", (("momentum", 0.0),)))
    update = torch.tensor(ROUNDS[0], dtype=torch.float32)
    for _ in range(2):
        assert torch.equal(update, opt.change(0, update.clone()))


@pytest.mark.parametrize(
    ("name", "numbers", "told"),
    [
        ("adam", (), "no server optimizer 'adam'.*fedavg"),
        ("fedavg", (("momentum", 0.9),), "fedavg has no momentum.*it has lr"),
        ("fedadam", (("beta1", 1.0),), "beta1 is 1"),
        ("fedadam", (("tau", 0.0),), "tau is 0"),
        ("fedyogi", (("lr", float("nan")),), "lr is nan"),
        ("fedyogi", (("lr", -1.0),), "lr is -1"),
    ],
)
def test_what_is_no_rule_is_refused(name: str, numbers: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ServerRule(name, numbers)


def test_a_rule_travels_in_a_plan() -> None:
    rule = ServerRule("fedyogi", (("lr", 0.5),))
    read = ServerRule.read({**dict(rule.settings), "prox": 0.1})
    assert ("fedyogi", rule.named) == (read.name, read.named)
    assert "fedavg" == ServerRule.read({}).name
