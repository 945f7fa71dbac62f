"""Several models on one task, over the wire: their answers become one (`tasks.together`).

Rules
- Each model is asked by name with the task's own needs: privacy and deadline hold for every one of them.
- A model that fails is left out where others have answered; if none has, the first failure is raised.
- A cascade asks the next model about those inputs alone that the one before was not sure of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..protocol.errors import ConfigError, TaskFailed
from ..tasks import together
from ..tasks.allot import Needs
from ..tasks.together import Array, Cascade
from ..tasks.values import Value, rows
from .taskclient import NO_NEEDS, Answer, Client

Combine = Callable[[Sequence[Array]], Array]


@dataclass(frozen=True)
class Together:
    """What several models came to.

    Attributes:
        outputs: of all. answers: of each that was asked and has answered, in the order of the models; feedback is given to these.
        asked: inputs that each model was asked about, by name.
    """

    outputs: Array = field(repr=False)
    answers: tuple[Answer, ...]
    asked: dict[str, int]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.outputs if dtype is None else self.outputs.astype(dtype)


def ask(
    client: Client,
    kind: str,
    inputs: Value,
    models: Sequence[str],
    combine: Combine = together.mean,
    needs: Needs = NO_NEEDS,
    timeout: float | None = None,
) -> Together:
    """Ask all of them, and combine.

    Args:
        combine: `together.mean`, `together.vote`, a fitted `together.Stack`, or any function of the outputs, in the order of the
            models that have answered. A stack needs all of them.

    Raises:
        ConfigError: no models. TaskFailed, QueueFull: of the first model, where none has answered. ShapeError: as `combine` says.
    """
    if not models:
        raise ConfigError("no models were named", hint="models=[…], as `shoal models ls` shows them")
    pending = [client.submit(kind, inputs, needs, model=model) for model in models]
    answers, failure = [], None
    for each in pending:
        try:
            answers.append(each.result(timeout))
        except TaskFailed as error:
            failure = failure or error
    if failure is not None and (not answers or isinstance(combine, together.Stack)):
        raise failure
    count = rows(inputs) or 1
    outputs = combine([np.asarray(answer) for answer in answers])
    return Together(outputs, tuple(answers), dict.fromkeys(models, count))


def believed(
    client: Client,
    kind: str,
    inputs: Value,
    models: Sequence[str],
    needs: Needs = NO_NEEDS,
    timeout: float | None = None,
) -> Together:
    """Ask all of them, and average by what is believed of each on this kind of task: its card, and feedback. Raises as `ask`."""
    quality = {
        each["model"].rpartition(" ")[0]: each["mean"] for each in client.status()["quality"] if each["kind"] == kind
    }
    cards = {model: client.model(model) for model in models if model not in quality}
    for model, about in cards.items():
        promoted = next((each for each in about["versions"] if each["version"] == about["promoted"]), None)
        quality[model] = next(iter(promoted["quality"].get(kind, {}).values()), 0.0) if promoted else 0.0
    found = ask(client, kind, inputs, models, lambda outputs: outputs[0], needs, timeout)
    shares = [max(1e-6, quality.get(answer.model, 0.0)) for answer in found.answers]
    outputs = together.weighted([np.asarray(answer) for answer in found.answers], shares)
    return Together(outputs, found.answers, found.asked)


def cascade(
    client: Client,
    kind: str,
    inputs: Array,
    models: Sequence[str],
    stages: Sequence[Cascade],
    needs: Needs = NO_NEEDS,
    timeout: float | None = None,
) -> Together:
    """The first model; where its calibrated threshold says that it is not sure, the next, and so on.

    Args:
        inputs: an array whose axis 0 counts them. models: cheap first. stages: a calibrated `Cascade` of each but the last.

    Returns:
        Scores by class, `(inputs, classes)`.

    Raises:
        ConfigError: there are not as many stages as models but one. TaskFailed, QueueFull: as `Pending.result`.
    """
    if len(stages) != len(models) - 1:
        raise ConfigError(
            f"{len(models)} models and {len(stages)} calibrated stages", hint="one of each model but the last"
        )
    asked = dict.fromkeys(models, 0)
    answers = [client.submit(kind, inputs, needs, model=models[0]).result(timeout)]
    scores, open_ = np.array(answers[0]), np.arange(len(inputs))
    asked[models[0]] = len(inputs)
    for model, stage in zip(models[1:], stages, strict=True):
        open_ = open_[stage.unsure(scores[open_])]
        if not len(open_):
            break
        answer = client.submit(kind, inputs[open_], needs, model=model).result(timeout)
        answers.append(answer)
        asked[model] = len(open_)
        scores = Cascade.join(scores, open_, np.asarray(answer))
    return Together(scores, tuple(answers), asked)
