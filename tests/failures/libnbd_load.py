"""The same as `load` through libnbd, one request at a time: run by Debian's own Python, which has its module.

A connection that breaks is made again every 20 ms, and the request that was not answered is made again.
"""

import argparse
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import nbd  # type: ignore[import-not-found]

from .blocks import BLOCK_BYTES, Blocks
from .load import RECONNECT_S, Answers, listen, options


class Client:
    """One handle after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.answers = Answers()
        self._options = options
        self._blocks = Blocks(options.first, options.blocks, random.getrandbits(63))
        self._random = random.Random()
        self._finishing = False
        self._handle = self._connect()

    def finish(self) -> None:
        """From another thread."""
        self._finishing = True

    def run(self) -> None:
        """Until `finish` was asked for; then all is read."""
        while not self._finishing:
            began_s = time.monotonic()
            block = self._random.randrange(len(self._blocks))
            (self._write if self._random.random() < 0.5 else self._read)(block)
            if self._options.rate:
                time.sleep(max(0.0, began_s + 1 / self._options.rate - time.monotonic()))
        for block in self._blocks.known():
            self._read(block)
        self._handle.shutdown()
        self.answers.finished = True

    def _connect(self) -> Any:
        host, _, port = self._options.to.rpartition(":")
        while True:
            handle = nbd.NBD()
            handle.set_export_name(self._options.export)
            try:
                handle.connect_tcp(host.strip("[]"), port)
            except nbd.Error:
                time.sleep(RECONNECT_S)
                continue
            self.answers.connects += 1
            return handle

    def _do(self, what: Callable[[Any], Any]) -> Any:
        began_s = time.monotonic()
        while True:
            try:
                result = what(self._handle)
            except nbd.Error as error:
                if not self._handle.aio_is_dead() and not self._handle.aio_is_closed():
                    self.answers.errors.append(str(error))
                    self.answers.answer(began_s)
                    return None
                self._handle = self._connect()
            else:
                self.answers.answer(began_s)
                return result

    def _offset(self, block: int) -> int:
        return int(self._options.first + block) * BLOCK_BYTES

    def _write(self, block: int) -> None:
        which, data = self._blocks.write(block)
        flags = nbd.CMD_FLAG_FUA if which % 8 == 0 else 0
        self._do(lambda handle: handle.pwrite(data, self._offset(block), flags))
        self._blocks.written(block, which)

    def _read(self, block: int) -> None:
        floor = self._blocks.floor(block)
        data = self._do(lambda handle: handle.pread(BLOCK_BYTES, self._offset(block)))
        if data is not None and (wrong := self._blocks.read(block, floor, bytes(data))):
            self.answers.errors.append(wrong)


if __name__ == "__main__":
    client = Client(options())
    threading.Thread(target=listen, args=(client,), daemon=True).start()
    client.run()
    threading.Event().wait()
