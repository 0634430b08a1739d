"""A disk that fails or hangs when a test says so: a file on a FUSE file system, nbdfuse with nbdkit behind it.

Errors and hangs come from the kernel, as those of a real disk: who waits for a request that hangs cannot be killed.
Writes go through to it at once, and what was written or read is in the page cache.
"""

import os
import subprocess
from pathlib import Path

from files import make_sparse
from harness import PATIENCE_S, wait_for

PLUGIN = Path(__file__).with_name("nbdkit_faults.py")
HANG = "hang"


class FaultyDisk:
    """Mounted at `where`, with one file."""

    def __init__(self, where: Path, name: str, size_bytes: int) -> None:
        self.path = where / name
        self._where = where
        self._faults = where.with_name(f"{where.name}.faults")
        self._image = where.with_name(f"{where.name}.image")
        make_sparse(self._image, size_bytes)
        for directory in (where, self._faults):
            directory.mkdir(parents=True)
        with where.with_name(f"{where.name}.log").open("wb") as log:
            server: list[str | Path] = ["nbdkit", "python", PLUGIN, f"image={self._image}", f"faults={self._faults}"]
            self._server = subprocess.Popen(
                ["nbdfuse", self.path, "[", *server, "]"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for("the disk is there", self.path.exists)

    def fail(self, *kinds: str, how: str = "EIO") -> None:
        """From now on requests of these kinds fail, or hang."""
        for kind in kinds:
            new = self._faults / f".{kind}"
            new.write_text(how)
            new.rename(self._faults / kind)

    def fail_sector(self, offset: int) -> None:
        """The 4 KiB there cannot be read any more, until they are written."""
        self.fail("sector", how=str(offset))

    def rot(self, offset: int) -> None:
        """What is on the disk there is not what was written; what is in the page cache is."""
        with self._image.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0xFF]), offset)

    def mend(self) -> None:
        for fault in self._faults.iterdir():
            fault.unlink()

    def forget_cache(self) -> None:
        """What is read now is read from the disk."""
        file = os.open(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)

    def close(self) -> None:
        self.mend()
        subprocess.run(["fusermount3", "-u", "-z", self._where], check=True)
        self._server.terminate()
        self._server.wait(PATIENCE_S)
