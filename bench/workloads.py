"""What is measured: the workloads, their names and fio's options for them."""

import re
from dataclasses import dataclass

from bench.errors import BenchError

_NAME = re.compile(r"(read|write|rw|randread|randwrite|randrw)-(\d+[km]?)-qd(\d+)")
_READS_PERCENT = 70  # of the mixed workloads

DEFAULT_NAMES = (
    "randwrite-4k-qd1",
    "randwrite-4k-qd32",
    "randread-4k-qd32",
    "write-128k-qd8",
    "read-128k-qd8",
    "randrw-4k-qd16",
    "fsync",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """One pattern of I/O, kept up with `depth` operations at a time."""

    name: str
    pattern: str
    block: str
    depth: int
    flush_each: bool = False

    def fio_options(self) -> list[str]:
        """The options that make fio do this."""
        options = [f"--rw={self.pattern}", f"--bs={self.block}", f"--iodepth={self.depth}"]
        options += [f"--rwmixread={_READS_PERCENT}", "--norandommap"]
        return [*options, "--fsync=1"] if self.flush_each else options


def parse(name: str) -> Workload:
    """The workload called `name`: `fsync`, or PATTERN-BLOCKSIZE-qdDEPTH as in randwrite-4k-qd1."""
    if name == "fsync":
        return Workload(name, "randwrite", "4k", 1, flush_each=True)
    if not (found := _NAME.fullmatch(name)):
        raise BenchError(f"There is no workload '{name}': say fsync, or for example randwrite-4k-qd8.")
    return Workload(name, found[1], found[2], int(found[3]))


def parse_list(names: str) -> list[Workload]:
    """The workloads of a comma-separated list, each once."""
    return [parse(name) for name in dict.fromkeys(names.split(","))]
