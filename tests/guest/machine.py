"""A guest under software emulation whose disk is an NBD volume.

Job: a file system for its disk, an initramfs of busybox, the modules of its disk and `init.sh`, QEMU as its host, and
what it says on its serial ports.
Invariants: the guest's program and its kernel have a file each, so neither waits for somebody to read; time is the
guest's own. Whatever waits here fails at once when the guest says that something failed, or has ended.
Neighbours: `init.sh` says the lines that are read here.
"""

import itertools
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from clients import require, run
from harness import wait_for

WRITERS = ("cached", "direct")
FILE_SYSTEM_BYTES = 64 << 20
MEMORY_MIB = 256
# About 3 s on an idle machine.
BOOT_S = 180.0
# Kernel and daemon share two cores with the emulator.
WRITES_S = 180.0
# Re-reading 2 MiB, unmounting and the way down.
END_S = 120.0
LAST_WORDS = 3000

_BOOT_DIR, _MODULES_DIR = Path("/boot"), Path("/lib/modules")
_KERNEL = "vmlinuz-*-cloud-amd64"
_BUSYBOX = Path("/bin/busybox")
_DISK_MODULES = ("virtio_pci", "virtio_blk")
_INIT = Path(__file__).with_name("init.sh")
_KERNEL_OPTIONS = "console=ttyS0 ignore_loglevel panic=-1 mitigations=off nokaslr random.trust_cpu=on"
# What Linux 6.1 says of failed I/O: blk_print_req_error (block/blk-mq.c), buffer_io_error (fs/buffer.c),
# __ext4_error and ext4_handle_error (fs/ext4/super.c), jbd2_journal_abort (fs/jbd2/journal.c).
_IO_ERROR = re.compile(
    r"error, dev |I/O error|EXT4-fs (error|warning)|Remounting filesystem|Aborting journal|JBD2:.*rror"
)


class Kernel(NamedTuple):
    """A kernel and where its modules are."""

    image: Path
    modules: Path


def newest_kernel() -> Kernel:
    """The newest cloud kernel of Debian that has its modules beside it."""
    found = [
        Kernel(image, modules)
        for image in _BOOT_DIR.glob(_KERNEL)
        if (modules := _MODULES_DIR / image.name.removeprefix("vmlinuz-")).is_dir()
    ]
    assert found, f"there is no {_BOOT_DIR / _KERNEL} with its modules: apt-get install linux-image-cloud-amd64"
    return max(found, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.image.name)])


def modules_in_order(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of some modules and of what they need, each after what it needs."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[path] = needed.split()
    by_name = {Path(path).name.removesuffix(".ko"): path for path in needs}
    # What is not there is built into the kernel.
    wanted = [by_name[name] for name in names if name in by_name]
    # modules.dep names everything that a module needs, in the opposite order.
    in_order = dict.fromkeys(each for path in wanted for each in (*reversed(needs[path]), path))
    return [modules / path for path in in_order]


def make_initramfs(kernel: Kernel, into: Path) -> Path:
    """An initramfs that runs `init.sh`."""
    assert b"/ld-linux" not in _BUSYBOX.read_bytes()[:4096], f"{_BUSYBOX} needs libraries: install busybox-static"
    with tempfile.TemporaryDirectory(dir=into) as made:
        root = Path(made)
        for name in ("bin", "dev", "proc", "modules"):
            (root / name).mkdir()
        shutil.copy(_BUSYBOX, root / "bin" / "busybox")
        shutil.copy(_INIT, root / "init")
        (root / "init").chmod(0o755)
        for number, module in enumerate(modules_in_order(kernel.modules, _DISK_MODULES)):
            shutil.copy(module, root / "modules" / f"{number:02}-{module.name}")
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = into / "initramfs.cpio"
        with archive.open("wb") as file:
            subprocess.run(
                ["cpio", "--create", "--format=newc", "--quiet", "--owner=+0:+0"],
                cwd=root, input=names.encode(), stdout=file, check=True,
            )  # fmt: skip
    return archive


def make_file_system(into: Path, uri: str) -> None:
    """Put an ext4 onto the start of a volume that is all zeros."""
    image = into / "ext4.img"
    with image.open("wb") as file:
        file.truncate(FILE_SYSTEM_BYTES)
    run("mkfs.ext4", "-q", "-F", image)
    run("qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw", image, uri)


class Endpoint(NamedTuple):
    """Where a volume is served."""

    host: str
    port: int
    export: str

    @property
    def uri(self) -> str:
        return f"nbd://{self.host}:{self.port}/{self.export}"


@dataclass(slots=True)
class Writes:
    """The writes of one writer: when each was done, in seconds of the guest's uptime."""

    done_s: list[float] = field(default_factory=list)

    def longest_stall_s(self, since: int) -> float:
        """The longest time from one write to the next, from the write before `since` on."""
        times = self.done_s[max(since - 1, 0) :]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


class Guest:
    """A guest that boots now and then writes to its disk all the time."""

    def __init__(self, directory: Path, disk: Endpoint, reconnect_delay_s: int) -> None:
        self.writes = {name: Writes() for name in WRITERS}
        self.failures: list[str] = []
        self.verdict = ""
        self._ready = False
        self._kernel_log, program_log, self._qemu_log = (directory / f"guest-{n}.log" for n in ("kernel", "1", "qemu"))
        make_file_system(directory, disk.uri)
        kernel = newest_kernel()
        initramfs = make_initramfs(kernel, directory)
        with program_log.open("wb") as out, self._qemu_log.open("wb") as err:
            self._qemu = subprocess.Popen(
                _qemu_command(kernel, initramfs, self._kernel_log, disk, reconnect_delay_s),
                stdin=subprocess.PIPE, stdout=out, stderr=err,
            )  # fmt: skip
        self._program_log = program_log.open()
        self._rest = ""

    # --- What it says ---

    def _read(self) -> None:
        """Take in what its program has said since."""
        *lines, self._rest = (self._rest + self._program_log.read()).split("\n")
        for line in lines:
            self._take(line)

    def _take(self, line: str) -> None:
        match line.split():
            case ["write", name, number, "ok", uptime_s]:
                self.writes[name].done_s.append(float(uptime_s))
                assert len(self.writes[name].done_s) == int(number), line
            case ["ready"]:
                self._ready = True
            case ["verdict", *_]:
                self.verdict = line
            case _:
                self.failures.append(line)

    def _wait(self, what: str, is_so: Callable[[], object], within_s: float, *, ends: bool = False) -> None:
        def probe() -> bool:
            # In this order: what it said before it ended counts.
            ended = self._qemu.poll() is not None
            self._read()
            self.assert_well()
            assert ends or not ended, f"the guest ended\n{self.last_words()}"
            return bool(is_so())

        try:
            wait_for(what, probe, within_s)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.last_words()}") from None

    def assert_well(self) -> None:
        """No program failed, and no I/O error is in the kernel's log."""
        assert not self.failures, self.failures
        errors = list(self.io_errors())
        assert not errors, errors

    def io_errors(self) -> Iterator[str]:
        """What its kernel has said of failed I/O."""
        if self._kernel_log.exists():
            lines = self._kernel_log.read_text(errors="replace").splitlines()
            yield from (line for line in lines if _IO_ERROR.search(line))

    def last_words(self) -> str:
        """The ends of what its kernel and QEMU said."""
        ends = [path.read_text(errors="replace")[-LAST_WORDS:] for path in (self._kernel_log, self._qemu_log)]
        return "kernel: {}\nqemu: {}".format(*ends)

    # --- What is asked of it ---

    def wait_ready(self) -> "Guest":
        self._wait("the guest has booted", lambda: self._ready, BOOT_S)
        return self

    def counts(self) -> dict[str, int]:
        """How many writes each writer has done, as far as is known now."""
        self._read()
        return {name: len(writes.done_s) for name, writes in self.writes.items()}

    def wait_writes(self, what: str, count: int) -> None:
        """Wait until every writer has done so many more writes than now."""
        goal = {name: done + count for name, done in self.counts().items()}
        self._wait(
            f"{count} more writes of each writer {what}",
            lambda: all(len(self.writes[name].done_s) >= goal[name] for name in goal),
            WRITES_S,
        )

    def wait_failure(self) -> list[str]:
        """Wait until one of its programs says that it failed."""

        def probe() -> list[str]:
            self._read()
            return self.failures

        return wait_for("the guest sees a failure", probe, WRITES_S)

    def finish(self) -> str:
        """Let it stop writing, check all it wrote and power off; returns its verdict."""
        assert self._qemu.stdin is not None
        self._qemu.stdin.write(b"stop\n")
        self._qemu.stdin.flush()
        self._wait("the guest's verdict", lambda: self.verdict, END_S, ends=True)
        self._qemu.wait(END_S)
        self.assert_well()
        return self.verdict

    def close(self) -> None:
        """End it, whatever it does."""
        self._qemu.kill()
        self._qemu.communicate()
        self._program_log.close()


def _qemu_command(
    kernel: Kernel, initramfs: Path, kernel_log: Path, disk: Endpoint, reconnect_delay_s: int
) -> list[str | Path]:
    assert platform.machine() == "x86_64", "the guest's kernel and busybox are those of this machine: it must be x86-64"
    return [
        require("qemu-system-x86_64"), "-accel", "tcg", "-smp", "1", "-m", f"{MEMORY_MIB}M",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", kernel.image, "-initrd", initramfs, "-append", _KERNEL_OPTIONS,
        "-serial", f"file:{kernel_log}",
        "-chardev", "stdio,id=program,signal=off", "-serial", "chardev:program",
        "-blockdev", f"driver=nbd,node-name=disk,server.type=inet,server.host={disk.host},server.port={disk.port}"
        f",export={disk.export},reconnect-delay={reconnect_delay_s}",
        # As hypervisors do that show errors to the guest instead of stopping it.
        "-device", "virtio-blk-pci,drive=disk,werror=report,rerror=report",
    ]  # fmt: skip
