"""Which mount of a file system, or which coming of a device, holds a file: what was only cached died with the last one.

The kernel makes an entry in sysfs for each mounted file system (ext4, xfs, f2fs), and for each block device, with an
inode number that it does not use again before a reboot: so a number that differs says that it was mounted, or plugged
in, anew. (The id of a mount is no help: each service may have mounts of its own, and numbers are used again.)
"""

import os
import stat

_FILE_SYSTEMS = ("ext4", "xfs", "f2fs")


def mount_identity(fd: int) -> str:
    """Of the file system, or the device, behind an open file; empty where the kernel does not tell."""
    status = os.fstat(fd)
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    entry = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if stat.S_ISBLK(status.st_mode):
        return _entry(entry)
    name = os.path.basename(entry)
    return next(filter(None, (_entry(f"/sys/fs/{kind}/{name}") for kind in _FILE_SYSTEMS)), "")


def _entry(path: str) -> str:
    try:
        return f"{path} {os.stat(path).st_ino}"
    except OSError:
        return ""
