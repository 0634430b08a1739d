"""The one error tree.

Every error that a user or an operator may see is a ``StorTrendsError`` whose text is a sentence: what
happened, to what (by name), and what to do. The command line prints it and exits with 1; anything else
that escapes is a bug and shows its traceback.
"""

from pathlib import Path


class StorTrendsError(Exception):
    """Something went wrong that can be said in a sentence."""


class ConfigError(StorTrendsError):
    """The configuration file has mistakes: all of them, not only the first."""

    def __init__(self, problems: list[str], path: Path | None = None) -> None:
        prefix = f"{path}: " if path else ""
        super().__init__("\n".join(prefix + problem for problem in problems))
        self.problems = problems


class StorageError(StorTrendsError):
    """A backing file, a device or a node's own state cannot be used; the text names it."""


class SyncFailedError(StorageError):
    """A disk failed to make written data stable: what was acknowledged may be lost, and a retry proves nothing."""


class ProtocolError(StorTrendsError):
    """The other side of a connection broke its protocol: that connection is closed, nothing else."""


class PeerFailedError(StorTrendsError):
    """The peer says that its replica has failed; the text is what it says."""


class SessionRefusedError(StorTrendsError):
    """The two nodes opened no session of the link; ``passing``: they will in a moment, without anybody's help."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class PeerUnfitError(SessionRefusedError):
    """The secondary needs a full sync, though the record has it in sync: the owner must go alone first."""


class OrderError(StorTrendsError):
    """A data process cannot do what its supervisor ordered; the text says why, and its role is as before."""


class ReleaseError(OrderError):
    """An owner cannot stop for a handover now: it takes requests again when it is told to lead."""


class StartError(StorTrendsError):
    """A process cannot start, for example because its address is in use."""
