"""The witness: one register, with the rules of the real one (``arbiter.registers.judge``), behind a bad network.

A request or its answer may be lost, late (after its sender gave up, or died), and come twice.
"""

from collections.abc import Callable
from random import Random

from stortrends_ha.arbiter.registers import judge
from stortrends_ha.cluster.answers import Answer, Granted, Known, Refused, Unreachable
from stortrends_ha.protocol.witness import Force, Propose, Read, Seed
from stortrends_ha.record import Record

from .clock import MS, Clock, S
from .network import Network
from .trace import Trace

Request = Read | Propose | Seed | Force
NAME = "arbiter"
GROUP = "g"


class Arbiter:
    """The third machine."""

    def __init__(self, clock: Clock, random: Random, network: Network, trace: Trace) -> None:
        self._clock = clock
        self._random = random
        self._network = network
        self._trace = trace
        self._down = 0
        self.current: Record | None = None
        self.loss = 0.0
        self.late = 0.0  # the share of requests that take up to ``late_ns``
        self.late_ns = 5 * S
        self.timeout_ns = 1 * S
        self.granted: Callable[[Record, str], None] = lambda _record, _node: None
        self.forced: set[int] = set()  # epochs

    # --- Faults ---------------------------------------------------------------------------------------

    def fail(self) -> None:
        """It answers nobody."""
        self._down += 1

    def recover(self) -> None:
        """It answers again."""
        self._down -= 1

    def forget(self) -> None:
        """Its disk is lost."""
        self.current = None

    # --- Requests -------------------------------------------------------------------------------------

    def ask(self, node: str, request: Request, answer: Callable[[Answer], None]) -> None:
        """``answer`` is called once, in bounded time."""
        waiting = [answer]

        def reply(said: Answer) -> None:
            if waiting:
                waiting.pop()(said)

        if not self._network.passes(node, NAME, "arbiter") and self._random.random() < 0.5:
            refused = Unreachable("the arbiter cannot be reached", asked=False)
            self._clock.after(self._random.randrange(self.timeout_ns), reply, refused)
            return
        self._clock.after(self.timeout_ns, reply, Unreachable("the arbiter does not answer"))
        for _ in range(1 + (self.late > 0 and self._random.random() < self.late / 4)):
            if self.loss and self._random.random() < self.loss:
                continue
            self._clock.after(self._delay_ns(), self._arrive, node, request, reply)

    def _delay_ns(self) -> int:
        if self.late and self._random.random() < self.late:
            return self._random.randrange(self.late_ns)
        return self._random.randrange(MS, 6 * MS)

    def _arrive(self, node: str, request: Request, reply: Callable[[Answer], None]) -> None:
        if self._down or not self._network.passes(node, NAME, "arbiter"):
            if self._random.random() < 0.3:  # a connection outlives a short interruption
                self._clock.after(self._random.randrange(MS, 2 * S), self._arrive, node, request, reply)
            return
        said = self._carry_out(node, request)
        if (not self.loss or self._random.random() >= self.loss) and self._network.passes(NAME, node, "arbiter"):
            self._clock.after(self._delay_ns(), reply, said)

    def _carry_out(self, node: str, request: Request) -> Answer:
        if isinstance(request, Read):
            return Known(self.current)
        answer, record = judge(self.current, request)
        if record is not None:
            self.current = record
            self.granted(record, node)
            if isinstance(request, Force):
                self.forced.add(record.epoch)
        self._trace.say(NAME, f"{type(request).__name__.lower()} of {node}: {answer.kind}", self.current)
        return Granted() if answer.kind == "granted" else Refused(answer.current)
