"""Unix sockets at paths of any length.

An address of the AF_UNIX family has room for 107 bytes of path. A longer path is reached through a descriptor of its
directory, which the kernel resolves like any other path.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PATH_BYTES_MAX = 107  # unix(7): sun_path has 108, with the closing NUL


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """What to bind or connect to for the socket at ``path``; raises OSError if its directory is not there."""
    if len(os.fsencode(path)) <= PATH_BYTES_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
