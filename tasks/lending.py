"""Versions that come in, go out, and are promoted, as requests of a dispatcher's (SPEC §16.5).

Rules
- A request that is repeated has the outcome that it had; the last so many are remembered, over restarts as well.
- What cannot be done is refused with the reason and what to type next.
"""

from __future__ import annotations

from ..protocol.errors import ConfigError
from ..protocol.messages import Message, Refused
from ..protocol.tasking import Chunk, Fetch, Govern, Governed, Publish, Published, Upload, Uploaded
from .book import Book
from .card import Card
from .library import Library
from .rollout import Rollout

MOST_REQUESTS = 256
NOTE = "request:"


class Lending:
    """Of one dispatcher.

    Args:
        notes: of the book, as it was found.
    """

    def __init__(self, book: Book, library: Library, rollout: Rollout, notes: dict[str, str]) -> None:
        self._book, self._library, self._rollout = book, library, rollout
        self._known = {key: text for key, text in notes.items() if key.startswith(NOTE)}

    def fetch(self, message: Fetch) -> Message:
        """A piece of weights, for whoever asks."""
        try:
            total, piece = self._library.piece(message.weights, message.offset)
        except ConfigError as error:
            return Refused(0, "weights", error.what[:4096])
        return Chunk(message.executor, message.weights, message.offset, total, (piece,))

    def change(self, message: Upload | Publish | Govern) -> tuple[Message, str]:
        """The answer, and if something is other than before, what, in words."""
        try:
            match message:
                case Upload():
                    upto = self._library.take(message.weights, message.total, message.offset, message.buffers[0])
                    return Uploaded(message.client, message.request, upto), ""
                case Publish():
                    return self._publish(message)
                case Govern():
                    return self._govern(message)
        except (ConfigError, OSError) as error:
            what, hint = (error.what, error.hint) if isinstance(error, ConfigError) else (str(error), "")
            text = f"{what}. Try: {hint}" if hint else what
            return Refused(message.request, "config", text[:4096]), ""

    def _publish(self, message: Publish) -> tuple[Message, str]:
        known, news = self._known.get(_note(message)), ""
        if known is None:
            card = self._library.publish(message.weights, message.buffers[0])
            known, news = card.packed.decode(), f"{card} was published"
            self._remember(message, known)
            self._rollout.look()
        return Published(message.client, message.request, (known.encode(),)), news

    def _govern(self, message: Govern) -> tuple[Message, str]:
        known, news = self._known.get(_note(message)), ""
        if known is None:
            card = self._done(message)
            known, news = str(card.version), f"{card}: {message.what}" + (f", {message.why}" if message.why else "")
            self._remember(message, known)
        return Governed(message.client, message.request, int(known)), news

    def _done(self, message: Govern) -> Card:
        match message.what:
            case "promote":
                return self._rollout.promote(message.name, message.version, message.why)
            case "rollback":
                return self._rollout.rollback(message.name, message.why)
            case "canary":
                return self._rollout.canary(message.name, message.version, message.share)
        raise ConfigError(f"there is nothing like {message.what!r} to be done with a version")

    def _remember(self, message: Publish | Govern, outcome: str) -> None:
        self._known[_note(message)] = outcome
        self._book.put(_note(message), outcome)
        while len(self._known) > MOST_REQUESTS:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._book.put(oldest, "")
        self._book.commit()


def _note(message: Publish | Govern) -> str:
    """By which a repeated request is known."""
    return f"{NOTE}{message.client:016x}:{message.request}"
