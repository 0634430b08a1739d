"""What witness and clients share about connections: reading a bounded line, and saying why something failed."""

import asyncio
import os

from stortrends_ha.errors import ProtocolError


async def read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty at the end. Raises ProtocolError if it is longer than the reader's limit."""
    try:
        line = await reader.readline()
    except ValueError:  # how asyncio says "too long"
        raise ProtocolError("a line that is too long") from None
    return line if line.endswith(b"\n") else b""


def reason(error: Exception) -> str:
    """A clause, without the address that asyncio puts before it."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno:
        text = os.strerror(error.errno) if error.errno > 0 else error.strerror or text  # below 0: of getaddrinfo
    return text[:1].lower() + text[1:]
