"""A virtual machine on a volume while the nodes of the volume are killed, come back and hand over.

It is not part of a run of all tests, as it needs QEMU's system emulation and a kernel: `make test-guest` names its
file. What it has in common with the integration tests is theirs, and is found by its path.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "integration"))
