"""What makes a name in a directory survive a loss of power."""

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory stable: what was created, renamed or removed there. Raises OSError."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
