"""The `witness` command: run the witness on this machine."""

from pathlib import Path

from stortrends_ha import logs
from stortrends_ha.arbiter import witness_server
from stortrends_ha.config import Address


def witness(listen: Address, state: Path) -> int:
    """Be the witness until told to stop."""
    logs.configure()
    witness_server.run(listen, state)
    return 0
