"""torch's compiler stays out of a shard, and comes when it is asked for (rung T1)."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import sys, torch
{begin}
p = torch.ones(3)
for make in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW):
    opt = make([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step(); opt.zero_grad(); opt.load_state_dict(opt.state_dict())
loaded = "torch._dynamo.config" in sys.modules
{end}
print(loaded, p.tolist())
"""
BEGIN = "from shoal.ps.uncompiled import compile_nothing; compile_nothing()"
END = 'p = torch.compile(lambda x: x + 0, backend="eager")(p); assert "torch._dynamo.config" in sys.modules'


@pytest.mark.parametrize("end", ["", END], ids=["steps", "compiles"])
def test_optimizers_step_without_it(end: str) -> None:
    """With the same results; the control shows that torch loads it otherwise, and `torch.compile` still finds it."""
    found = []
    for begin in ("", BEGIN):
        script = STEPS.format(begin=begin, end=end)
        found.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert ["True", "False"] == [line.split()[0] for line in found]
    assert found[0].split()[1:] == found[1].split()[1:]


def test_what_is_loaded_stays() -> None:
    """In a process that has the compiler nothing is put in its place."""
    code = (
        "import sys, torch._dynamo as before\n"
        + BEGIN
        + "\nassert sys.modules['torch._dynamo'] is before is torch._dynamo"
    )
    subprocess.run([sys.executable, "-c", "import torch\n" + code], check=True)
