"""The effects that one event has brought about, in their order. Pure."""

from stortrends_ha.cluster import effects as do


class Outbox:
    """Collects effects until they are taken; numbers those that are awaited."""

    def __init__(self) -> None:
        self._effects: list[do.Effect] = []
        self._number = 0
        self._said = ""

    def count(self) -> int:
        """A new number for an awaited effect."""
        self._number += 1
        return self._number

    def put(self, effect: do.Effect) -> None:
        """One more."""
        self._effects.append(effect)

    def say(self, text: str, epoch: int) -> None:
        """One line of log a decision; not again and again while it is repeated."""
        if text != self._said:
            self._said = text
            self.put(do.Decision(f"{text} (epoch {epoch})"))

    def take(self) -> list[do.Effect]:
        """All that was put in since the last time."""
        effects, self._effects = self._effects, []
        return effects
