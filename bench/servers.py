"""The servers that are measured: stortrends-ha's demo, and those rivals that are installed.

Rivals are set up generously, so that a ratio is not owed to a bad configuration. They are measured one at a
time and so share two images.
"""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.processes import Processes, require

OURS = "stortrends-ha"
NBDKIT = "nbdkit (not mirrored)"
MIB = 1 << 20
# The page cache keeps the folios in which data was first written: on ext4, random 4 KiB writes into folios
# of 1 MiB cost up to four times the CPU. So every image is first filled in blocks of this size.
FILL_KIB = 64
DEMO_READY_S = 60.0
RIVAL_READY_S = 15.0
_DEMO_PORT_BASES = range(21000, 30000, 16)
_DEMO_PORTS = 16


@dataclass(frozen=True, slots=True)
class Server:
    """Something to measure; `pids` are its processes as far as known, without their descendants."""

    name: str
    uri: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Images:
    """The rivals' two images, the second for the mirror's other half."""

    first: Path
    second: Path


def start_demo(processes: Processes, directory: Path) -> Server:
    """A demo cluster of two nodes, with its images in `directory`; its first volume is measured."""
    command = [sys.executable, "-m", "stortrends_ha", "demo", "--json"]
    command += ["--dir", str(directory), "--port-base", str(_free_port_base())]
    processes.start(OURS, command)
    said = processes.output(OURS)
    processes.wait_until(lambda: said.read_bytes().endswith(b"\n"), OURS, DEMO_READY_S)
    return _demo_server(said.read_text())


def _demo_server(announcement: str) -> Server:
    demo = json.loads(announcement)
    volume = next(iter(demo["volumes"].values()))
    return Server(OURS, volume["uri"], tuple(node["pid"] for node in demo["nodes"].values()))


def start_rivals(processes: Processes, directory: Path, size_mib: int, left_out: list[str]) -> list[Server]:
    """Those rivals that can run; to `left_out` is added why the others cannot."""
    installed = [rival for rival in RIVALS if _is_installed(rival, left_out)]
    if not installed:
        return []
    images = _make_images(directory, size_mib)
    servers = []
    for rival in installed:
        try:
            servers.append(rival.start(processes, images))
        except BenchError as error:
            left_out.append(f"{rival.name}: {error}")
    return servers


def _is_installed(rival: "Rival", left_out: list[str]) -> bool:
    try:
        require(rival.program)
    except BenchError as error:
        left_out.append(f"{rival.name}: {error}")
        return False
    return True


def _make_images(directory: Path, size_mib: int) -> Images:
    images = Images(directory / "first.img", directory / "second.img")
    block = os.urandom(FILL_KIB * 1024)
    for path in (images.first, images.second):
        with path.open("wb", buffering=0) as file:
            for _ in range(size_mib * MIB // len(block)):
                file.write(block)
    return images


def _start_nbdkit(processes: Processes, images: Images) -> Server:
    port = _free_port()
    pid = _start_with_pidfile(
        processes,
        "nbdkit",
        lambda pidfile: [
            "nbdkit", "--foreground", "--ipaddr=127.0.0.1", f"--port={port}",
            f"--pidfile={pidfile}", "file", images.first,
        ],
    )  # fmt: skip
    return Server(NBDKIT, f"nbd://127.0.0.1:{port}", (pid,))


def _start_qemu_quorum(processes: Processes, images: Images) -> Server:
    """Two daemons: the quorum driver over a local file and the other daemon's export.

    One vote is enough because only then can reads go to the local file alone (fifo). Unix sockets because
    over TCP the daemon stalls for 40 ms at a time.
    """
    far, near = processes.directory / "far.sock", processes.directory / "near.sock"
    mirror = [
        "--blockdev",
        f"driver=nbd,node-name=far,export=v,server.type=unix,server.path={_for_qemu(far)}",
        "--blockdev",
        "driver=quorum,node-name=mirror,vote-threshold=1,read-pattern=fifo,children.0=file,children.1=far",
    ]
    pids = (
        _start_qemu(processes, "qemu-quorum-far", images.second, far, "file", []),
        _start_qemu(processes, "qemu-quorum", images.first, near, "mirror", mirror),
    )
    return Server("qemu-quorum", f"nbd+unix:///v?socket={near}", pids)


def _start_qemu(processes: Processes, name: str, image: Path, listen: Path, node: str, blockdevs: Sequence[str]) -> int:
    return _start_with_pidfile(
        processes,
        name,
        lambda pidfile: [
            "qemu-storage-daemon", "--pidfile", pidfile,
            "--blockdev", f"driver=file,node-name=file,aio=io_uring,filename={_for_qemu(image)}", *blockdevs,
            "--nbd-server", f"addr.type=unix,addr.path={_for_qemu(listen)}",
            "--export", f"type=nbd,id=export,node-name={node},name=v,writable=on",
        ],
    )  # fmt: skip


def _start_with_pidfile(processes: Processes, name: str, command: Callable[[Path], Sequence[str | Path]]) -> int:
    """Start a server that writes its pid to a file once it serves, and wait for that."""
    pidfile = processes.directory / f"{name}.pid"
    pid = processes.start(name, command(pidfile))
    processes.wait_until(lambda: pidfile.exists() and bool(pidfile.read_text()), name, RIVAL_READY_S)
    return pid


def _for_qemu(path: Path) -> str:
    return str(path).replace(",", ",,")


@dataclass(frozen=True, slots=True)
class Rival:
    """A server that may be installed here."""

    name: str
    program: str
    what: str
    start: Callable[[Processes, Images], Server]


RIVALS = (
    Rival(
        "qemu-quorum",
        "qemu-storage-daemon",
        "two QEMU daemons, mirrored with the quorum driver over Unix sockets",
        _start_qemu_quorum,
    ),
    Rival(NBDKIT, "nbdkit", "the file plugin", _start_nbdkit),
)


def check_space(directory: Path, size_mib: int) -> None:
    """Raise BenchError if the directory cannot hold the demo's two images and the rivals' two."""
    free_mib = shutil.disk_usage(directory).free // MIB
    if free_mib < 4 * size_mib + 256:
        raise BenchError(
            f"{directory} has {free_mib} MiB free, too few for four images of {size_mib} MiB: choose another"
            " with --dir, or fewer with --size-mib"
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _free_port_base() -> int:
    for base in _DEMO_PORT_BASES:
        if all(_is_free(port) for port in range(base, base + _DEMO_PORTS)):
            return base
    raise BenchError("There are no free ports for the demo on 127.0.0.1")


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
