"""The cluster's key: the secret that proves a datagram, a request to the witness or a peer to be of this cluster.

Job: read it from its file, or say in a sentence what is wrong and what to do.
Invariants: `read_key` returns at least `KEY_BYTES_MIN` bytes or raises `ConfigError`, never anything else; no message
holds a piece of the key. A file that others may read is refused, because its secret is one no more. The same key
written in different ways (hex on one machine, base64 on another) is the same key.
Bounds: at most `FILE_BYTES_MAX` bytes are read, and only from a regular file, so reading never waits for anybody.
"""

import base64
import os
import re
import shlex
import stat
from pathlib import Path

from stortrends_ha.errors import ConfigError

KEY_BYTES_MIN = 32
FILE_BYTES_MAX = 4096
OTHERS = stat.S_IRWXG | stat.S_IRWXO  # the permissions of everybody but the owner

HEX_FORM = re.compile(rb"[0-9A-Fa-f]+")
BASE64_FORM = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
TEXT_FORM = re.compile(rb"[\t\n\r -~]*")


def read_key(path: Path) -> bytes:
    """The key in a file; raises `ConfigError` with a sentence that says what to do."""
    try:
        content = _content(path)
    except FileNotFoundError as error:
        raise ConfigError([f"The key file {path} does not exist. {_advice(path)}"]) from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([f"The key file {path} cannot be read: {reason}."]) from error
    key = _decoded(content, path)
    if len(key) < KEY_BYTES_MIN:
        found = f"holds a key of {len(key)} bytes, expected at least {KEY_BYTES_MIN}"
        raise ConfigError([f"The key file {path} {found}. {_advice(path)}"])
    return key


def _advice(path: Path) -> str:
    file = shlex.quote(str(path))
    make = f"head -c {KEY_BYTES_MIN} /dev/urandom | base64 > {file}; chmod 600 {file}"
    return f"Make a key with `{make}` and copy it to the other node and the witness."


def _content(path: Path) -> bytes:
    """What is in the file, once it is known to be one that only its owner can read."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError([f"The key file {path} is not a regular file. {_advice(path)}"])
        if status.st_mode & OTHERS:
            found = f"is open to others than its owner (mode {stat.S_IMODE(status.st_mode):04o})"
            advice = f"run `chmod 600 {shlex.quote(str(path))}`, and make a new key if others may have read it"
            raise ConfigError([f"The key file {path} {found}: {advice}."])
        content = os.read(file, FILE_BYTES_MAX + 1)
    finally:
        os.close(file)
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError([f"The key file {path} is larger than {FILE_BYTES_MAX} bytes. {_advice(path)}"])
    return content


def _decoded(content: bytes, path: Path) -> bytes:
    """Hex first, as it can be read as base64, too, while base64 of a random key never has the letters of hex alone.

    Text that is neither is a mistake, and anything else is the key itself.
    """
    text = b"".join(content.split())
    if HEX_FORM.fullmatch(text) and len(text) % 2 == 0:
        return bytes.fromhex(text.decode())
    if BASE64_FORM.fullmatch(text) and len(text) % 4 == 0:
        return base64.b64decode(text)
    if text and TEXT_FORM.fullmatch(content):
        raise ConfigError([f"The key file {path} holds text that is neither hex nor base64. {_advice(path)}"])
    return content
