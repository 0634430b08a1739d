"""Every command and option of the NBD server by libnbd; after each test both replicas are byte-identical."""

import pytest
from clients import nbdsh
from files import MIB, allocated_bytes
from harness import Cluster


def test_what_is_written_is_read_back_and_on_both_nodes(volumes: Cluster) -> None:
    nbdsh(
        """
h.connect_uri(uri[0])
h.pwrite(b"one" * 1000, 12345)
h.pwrite(b"two" * 1000, 500_000, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(3000, 12345) == b"one" * 1000
assert h.pread(3000, 500_000) == b"two" * 1000
assert h.pread(4096, 1_000_000) == bytes(4096)
h.shutdown()
""",
        volumes.uri(),
    )
    volumes.assert_holds(12345, b"one" * 1000)
    volumes.assert_holds(500_000, b"two" * 1000)


@pytest.mark.parametrize("structured", [True, False])
def test_every_command_with_and_without_structured_replies(volumes: Cluster, structured: bool) -> None:
    nbdsh(
        f"""
structured = {structured}
h.set_request_structured_replies(structured)
h.connect_uri(uri[0])
assert h.get_structured_replies_negotiated() == structured
assert h.can_df() == structured
h.set_strict_mode(0)
data = bytes(range(256)) * 4096
h.pwrite(data, 1 << 20)
h.trim(65536, 1 << 20)
assert h.pread(65536, 1 << 20) == bytes(65536)
h.zero(65536, (1 << 20) + 65536)
h.zero(65536, (1 << 20) + 131072, nbd.CMD_FLAG_NO_HOLE)
h.zero(65536, (1 << 20) + 196608, nbd.CMD_FLAG_FAST_ZERO)
h.zero(4096, (1 << 20) + 262144, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, (1 << 20) + 266240, nbd.CMD_FLAG_FUA)
assert h.pread(270336, 1 << 20) == bytes(270336)
assert h.pread(len(data) - 270336, (1 << 20) + 270336) == data[270336:]
h.cache(1 << 20, 1 << 20)
h.flush()
h.pread(512, 0, nbd.CMD_FLAG_FUA)
""",
        volumes.uri(),
    )


def test_no_hole_keeps_the_range_provisioned_and_a_trim_gives_it_back(volumes: Cluster) -> None:
    nbdsh(
        "h.connect_uri(uri[0]); h.pwrite(b'x' * (8 << 20), 0); h.zero(8 << 20, 0, nbd.CMD_FLAG_NO_HOLE)",
        volumes.uri(),
    )
    assert all(allocated_bytes(path) >= 8 * MIB for path in volumes.backings())
    nbdsh("h.connect_uri(uri[0]); h.trim(8 << 20, 0)", volumes.uri())
    assert all(allocated_bytes(path) < 1 * MIB for path in volumes.backings())


def test_block_status_shows_the_real_extents(volumes: Cluster) -> None:
    nbdsh(
        """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri[0])
h.pwrite(b"x" * (1 << 20), 4 << 20)
found = []
def extents(context, offset, entries, error):
    assert context == nbd.CONTEXT_BASE_ALLOCATION
    found.append((offset, list(entries)))
h.block_status(16 << 20, 0, extents)
[(offset, entries)] = found
assert offset == 0
assert entries == [4 << 20, 3, 1 << 20, 0, 11 << 20, 3], entries
found.clear()
h.block_status(16 << 20, 1 << 20, extents, nbd.CMD_FLAG_REQ_ONE)
assert found == [(1 << 20, [3 << 20, 3])], found
""",
        volumes.uri(),
    )


def test_df_reads_come_in_one_chunk(volumes: Cluster) -> None:
    nbdsh(
        """
h.connect_uri(uri[0])
h.pwrite(b"y" * 65536, 65536)
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
assert h.pread_structured(262144, 0, chunk, nbd.CMD_FLAG_DF) == bytes(65536) + b"y" * 65536 + bytes(131072)
assert chunks == [(0, 262144, nbd.READ_DATA)], chunks
""",
        volumes.uri(),
    )


def test_option_phase(volumes: Cluster) -> None:
    nbdsh(
        """
h.set_opt_mode(True)
h.connect_tcp("127.0.0.1", uri[0])
exports = {}
h.opt_list(lambda name, description: exports.__setitem__(name, description))
assert exports == {"vm-a": "the first volume", "vm-4k": "", "vm-ro": ""}, exports
h.set_export_name("vm-4k")
h.opt_info()
size, minimum = h.get_size(), h.get_block_size(nbd.SIZE_MINIMUM)
assert (size, minimum) == (64 << 20, 4096)
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 1 << 20
h.set_export_name("nonsense")
try:
    h.opt_info()
    assert False, "an unknown export was found"
except nbd.Error as e:
    assert e.errno == "ENOENT", e
contexts = []
h.set_export_name("vm-a")
h.add_meta_context("base:")
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation"], contexts
h.clear_meta_contexts()
h.add_meta_context("base:allocation")
h.add_meta_context("other:thing")
h.opt_go()
assert h.can_meta_context("base:allocation") and not h.can_meta_context("other:thing")
""",
        str(volumes.nbd_port),
    )


def test_an_aborted_option_phase_and_the_default_export(volumes: Cluster) -> None:
    nbdsh(
        """
h.set_opt_mode(True)
h.connect_tcp("127.0.0.1", uri[0])
h.opt_abort()
h = nbd.NBD()
h.connect_tcp("127.0.0.1", uri[0])
assert h.get_size() == 64 << 20 and not h.is_read_only()
""",
        str(volumes.nbd_port),
    )


def test_export_name_of_old_clients(volumes: Cluster) -> None:
    nbdsh(
        """
for flags in (nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, 0):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.set_request_structured_replies(False)
    h.connect_uri(uri[0])
    h.pwrite(b"old", 3)
    assert h.pread(3, 3) == b"old"
""",
        volumes.uri(),
    )


def test_a_flush_on_one_connection_covers_and_shows_the_writes_of_others(volumes: Cluster) -> None:
    nbdsh(
        """
handles = [nbd.NBD() for _ in range(8)]
for one in handles:
    one.connect_uri(uri[0])
    assert one.can_multi_conn()
for turn in range(20):
    for number, one in enumerate(handles):
        one.pwrite(bytes([turn * 8 + number]) * 4096, number * 4096)
    handles[turn % 8].flush()
    for one in handles:
        data = one.pread(8 * 4096, 0)
        assert data == b"".join(bytes([turn * 8 + n]) * 4096 for n in range(8))
""",
        volumes.uri(),
    )


def test_many_commands_in_flight(volumes: Cluster) -> None:
    """Each block is read while it is being written: all of the old or all of the new."""
    nbdsh(
        """
h.connect_uri(uri[0])
def done(error):
    assert not error.value
    return 1
before = [bytes(16384)] * 64
for turn in range(6):
    after, reads = [bytes([turn * 40 + block % 40 + 1]) * 16384 for block in range(64)], []
    for block, data in enumerate(after):
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), block * 16384, completion=done)
        reads.append(nbd.Buffer(16384))
        h.aio_pread(reads[-1], block * 16384, completion=done)
    assert h.aio_in_flight() > 32
    while h.aio_in_flight():
        h.poll(-1)
    for read, old, new in zip(reads, before, after):
        assert bytes(read.to_bytearray()) in (old, new)
    assert h.pread(64 * 16384, 0) == b"".join(after)
    before = after
""",
        volumes.uri(),
    )


def test_errors_are_those_of_the_protocol_and_the_connection_lives(volumes: Cluster) -> None:
    nbdsh(
        """
h.connect_uri(uri[0])
h.set_strict_mode(0)
size = h.get_size()
def fails(errno, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errno == errno, (e.errno, errno, call, args)
        return
    assert False, (call, args)
fails("ENOSPC", h.pwrite, b"x" * 512, size)
fails("ENOSPC", h.zero, 512, size - 100)
fails("EINVAL", h.pread, 512, size - 100)
fails("EINVAL", h.trim, 512, size)
fails("EINVAL", h.trim, 512, (1 << 64) - 256)
fails("ENOSPC", h.pwrite, b"x" * 512, (1 << 64) - 256)
fails("EINVAL", h.pwrite, b"x", 0, 1 << 9)
h.pwrite(b"alive", 0)
assert h.pread(5, 0) == b"alive"
h2 = nbd.NBD()
h2.connect_uri(uri[1])
h2.set_strict_mode(0)
assert h2.is_read_only()
for call, args in ((h2.pwrite, (b"x" * 512, 0)), (h2.trim, (512, 0)), (h2.zero, (512, 0))):
    fails("EPERM", call, *args)
assert h2.pread(512, 0) == bytes(512)
h3 = nbd.NBD()
h3.connect_uri(uri[2])
h3.set_strict_mode(0)
fails("EINVAL", h3.pwrite, b"x" * 512, 0)
fails("EINVAL", h3.pread, 4096, 512)
h3.pwrite(b"x" * 4096, 4096)
h3.trim(4096, 4096)
""",
        volumes.uri(), volumes.uri("vm-ro"), volumes.uri("vm-4k"),
    )  # fmt: skip


def test_the_largest_payload_and_longer_zeroes(volumes: Cluster) -> None:
    nbdsh(
        """
import os
h.connect_uri(uri[0])
data = os.urandom(32 << 20)
h.pwrite(data, 1 << 20)
assert h.pread(32 << 20, 1 << 20) == data
h.zero(60 << 20, 0)
assert h.pread(32 << 20, 1 << 20) == bytes(32 << 20)
""",
        volumes.uri(),
    )


def test_unix_socket(volumes: Cluster) -> None:
    nbdsh(
        """
h.connect_uri(uri[0])
h.pwrite(b"over a Unix socket", 0)
h.flush()
assert h.pread(18, 0) == b"over a Unix socket"
other = nbd.NBD()
other.connect_uri(uri[1])
assert other.pread(18, 0) == b"over a Unix socket"
""",
        volumes.unix_uri(), volumes.uri(),
    )  # fmt: skip
    volumes.assert_holds(0, b"over a Unix socket")
