"""The event loop of a data process: ``NodeLoop`` with sockets of the fake kernel, and threads."""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .clock import MS
from .disk import Disk
from .history import Violation
from .node_loop import NodeLoop
from .sockets import Socket

if TYPE_CHECKING:
    from .data_process import DataProcess

_Callback = tuple[Callable[..., Any], tuple[Any, ...]]


class ProcessLoop(NodeLoop):
    """See the module."""

    def __init__(self, process: "DataProcess") -> None:
        super().__init__(process.world.clock, process.host.clock, process)
        self.process = process
        self._world = process.world
        self.sockets: dict[int, Socket] = {}
        self._readers: dict[int, _Callback] = {}
        self._writers: dict[int, _Callback] = {}
        self._woken: set[int] = set()
        # By an fdatasync in a thread: of each disk what was written before it was started.
        self.synced_until: dict[Disk, int] = {}

    def _call(self, do: Callable[..., Any], *args: Any) -> None:
        """It runs; an exception that escapes it is a bug."""
        try:
            super()._call(do, *args)
        except Killed:
            return
        self.process.look()

    # --- Readiness: by level, as epoll ----------------------------------------------------------------

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Call it as long as there is something to read."""
        self._readers[fd] = callback, args
        self.wake(self.sockets[fd])

    def remove_reader(self, fd: Any) -> bool:
        """No more."""
        return self._readers.pop(fd, None) is not None

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Call it as long as there is room."""
        self._writers[fd] = callback, args
        self.wake(self.sockets[fd])

    def remove_writer(self, fd: Any) -> bool:
        """No more."""
        return self._writers.pop(fd, None) is not None

    def forget(self, sock: Socket) -> None:
        """It is closed."""
        fd = sock.fileno()
        self._readers.pop(fd, None)
        self._writers.pop(fd, None)
        self.sockets.pop(fd, None)

    def wake(self, sock: Socket) -> None:
        """It may have become ready: look, as an event of the process."""
        fd = sock.fileno()
        if fd not in self._woken and self._is_ready(sock) and self._actor.alive:
            self._woken.add(fd)
            self._actor.after(0, self._serve, sock)

    def arrived(self, sock: Socket) -> None:
        """Something has come, while no process runs."""
        fd = sock.fileno()
        if fd in self._readers and fd not in self._woken:
            self._woken.add(fd)
            self._actor.event(self._serve, sock)

    def _is_ready(self, sock: Socket) -> bool:
        fd = sock.fileno()
        return (sock.readable and fd in self._readers) or (fd in self._writers and sock.writable)

    def _serve(self, sock: Socket) -> None:
        fd = sock.fileno()
        self._woken.discard(fd)
        for callbacks, is_ready in ((self._readers, sock.readable), (self._writers, sock.writable)):
            if is_ready and fd in callbacks and self._actor.alive:
                callback, args = callbacks[fd]
                self._call(callback, *args)
        if fd in self.sockets:
            self.wake(sock)

    # --- Coroutines on sockets ------------------------------------------------------------------------

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> list[Any]:
        """Names are addresses."""
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))]

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """Until the other host answers; the network may be cut."""
        self.process.point()
        host, world = self.process.host, self._world
        peer = host.peer
        await asyncio.sleep(world.network.delay_ns() / 1e9)
        while not (peer.on and world.network.joins(host.name, peer.name, "link")):
            await asyncio.sleep(0.2)
        listener = peer.process.listener(address[1]) if peer.process is not None else None
        if listener is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        sock.connect(listener)

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        """What has come, when something has."""
        while True:
            try:
                return bytes(sock.recv(nbytes))
            except BlockingIOError:
                await self._ready(sock, self.add_reader, self.remove_reader)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        """All of it."""
        while data:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                await self._ready(sock, self.add_writer, self.remove_writer)

    async def _ready(self, sock: Socket, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        ready = self.create_future()

        def now() -> None:
            if not ready.done():
                ready.set_result(None)

        add(sock.fileno(), now)
        try:
            await ready
        finally:
            remove(sock.fileno())

    # --- Threads --------------------------------------------------------------------------------------

    def call_soon_threadsafe(self, callback: Any, *args: Any, **_: Any) -> Any:  # type: ignore[override]
        """From what is run in an executor: heard of later."""
        self._actor.after(self._world.random.randrange(MS), self._call, callback, *args)

    def run_in_executor(self, _executor: Any, func: Any, *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        """It does so in a while, and is heard of later."""
        future = self.create_future()
        began = {disk: disk.written for disk in self.process.host.disks}
        random, most_ns = self._world.random, self._world.flush_ns

        def work() -> None:
            self.synced_until = began
            try:
                result, error = func(*args), None
            except Violation:
                raise
            except Exception as e:
                result, error = None, e
            finally:
                self.synced_until = {}
            self._actor.after(random.randrange(MS), self._call, tell, result, error)

        def tell(result: Any, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._actor.after(random.randrange(MS // 10, most_ns), self._call, work)
        return future


class Killed(SystemExit):
    """The process is killed in the middle of something: nothing but the loop catches it."""
