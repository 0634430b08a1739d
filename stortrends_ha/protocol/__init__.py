"""Wire formats, pure: bytes in, bytes out. No asyncio, socket, os, time or random."""
