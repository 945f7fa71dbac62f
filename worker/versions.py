"""What a worker does with versions of models: it publishes what it trains, and serves what was promoted (DESIGN §8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..protocol.join import JoinAddress
from ..tasks.card import Lineage
from .cut import consistent

if TYPE_CHECKING:
    from ..tasks.card import Card
    from .client import Worker
    from .serving import Predict, Serving
    from .taskclient import Client

CONNECT_TIMEOUT = 60.0


class Versions:
    """A part of `Worker`."""

    name: str
    _address: JoinAddress
    _patron: Client | None
    _closers: list[Callable[[], None]]

    def publish(
        self,
        name: str,
        metrics: Mapping[str, Any] | None = None,
        *,
        data: Collection[str] = (),
        kind: str = "",
        parent: str = "",
        trained_on: Collection[str] = (),
        promote: bool = False,
        timeout: float | None = None,
    ) -> Card:
        """Bring the parameters, as they are at one moment, into the cluster's registry as a version of a model.

        Args:
            metrics: what was measured of it, by name; the first is its quality for tasks of `kind`, by default the model's name; or
                by kind of task such dictionaries. data: labels of the data that it may see.
            parent: the identity of the version that it began with. trained_on: in words. promote: serve it from now on.

        Raises:
            ConfigError: nothing is registered, or a card that cannot be; promotion of what was never evaluated.
        """
        arrays, at = consistent(cast("Worker", self), timeout)
        lineage = Lineage(at.run, at.mode, at.clock, parent, tuple(trained_on))
        return self._tasks(timeout).publish(
            name, arrays, metrics, kind=kind, data=data, lineage=lineage, promote=promote, timeout=timeout
        )

    def serve(
        self,
        models: Mapping[str, Predict],
        *,
        data: Collection[str] | None = None,
        price: float = 1.0,
        memory: float | None = None,
        together: bool = True,
        timeout: float = CONNECT_TIMEOUT,
    ) -> Serving:
        """Answer tasks with these models' promoted versions, in a thread of their own, until the handle is stopped or this worker
        is closed: `worker.serve({"heart-risk": predict}).wait()`.

        Args:
            models: by name, `predict(weights, inputs) -> outputs`: tensors by name, and a row of outputs for each of inputs.
            data: labels of the data that may be seen here; by default what each version may see. price: of a second's work.
            memory: bytes for all versions; by default any. together: tasks that come together are run as one where they can be.
            timeout: seconds to find the dispatcher in.

        Raises:
            ConfigError: no functions by name. NoServerError, ServerLost: no dispatcher is there.
        """
        from .serving import Serving
        from .taskclient import random_incarnation

        limit = math.inf if memory is None else float(memory)
        where = (self._address, self.name, random_incarnation())
        serving = Serving(*where, models, data, price, limit, together, timeout)
        self._closers.append(serving.stop)
        return serving

    def _tasks(self, timeout: float | None) -> Client:
        if self._patron is None:
            from .taskclient import Client

            self._patron = Client(self._address, timeout=CONNECT_TIMEOUT if timeout is None else timeout)
            self._closers.append(self._patron.close)
        return self._patron
