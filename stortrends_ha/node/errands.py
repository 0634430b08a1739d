"""What the operator has a data process do that the group's state machine has not decided, and the answers.

Nothing of it is a role: an errand that is lost, as the data process has ended, is asked for again by the operator.
Bound: those that the connections of the control socket wait for.
"""

import asyncio
import itertools
from typing import Any

from stortrends_ha.errors import OrderError
from stortrends_ha.node.children import Child

# They are short, but wait for the order before them, which may wait for a disk.
PATIENCE_S = 10.0


class Errands:
    """Of one group. Their numbers are negative: the state machine counts its own orders from 1."""

    def __init__(self) -> None:
        self._numbers = itertools.count(-1, -1)
        self._waiting: dict[int, asyncio.Future[str]] = {}

    async def run(self, child: Child, kind: str, **message: Any) -> None:
        """Have something done. Raises OrderError with a clause that says why it was not."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        child.send({"type": kind, "id": number, **message})
        try:
            error = await asyncio.wait_for(answer, PATIENCE_S)
        except TimeoutError:
            raise OrderError(f"its data process has not answered within {PATIENCE_S:g} s") from None
        finally:
            del self._waiting[number]
        if error:
            raise OrderError(error)

    def done(self, number: int, error: str) -> bool:
        """The data process has carried out an order; whether it was one of these."""
        if (answer := self._waiting.get(number)) is not None and not answer.done():
            answer.set_result(error)
        return number < 0

    def ended(self) -> None:
        """The data process has ended."""
        for number in self._waiting:
            self.done(number, "its data process has ended")
