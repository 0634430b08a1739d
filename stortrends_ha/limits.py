"""Every fixed bound in one place, with the relations between them asserted (rule 15).

What an operator may change is in ``config.Limits``; what is here follows from how the code is shaped.
Sizes end in ``_bytes`` or ``_BYTES``, counts say what they count.
"""

KIB = 1 << 10
MIB = 1 << 20

# --- NBD requests -----------------------------------------------------------------------------

# The NBD document: a payload up to 32 MiB is not abuse; a longer one closes the connection.
ABUSIVE_PAYLOAD_BYTES = 32 * MIB

# One buffer, shared by all clients of a data process, receives what a socket holds. Large enough for a
# queue of 128 KiB writes, small enough to stay in the cache of a core between receiving and writing.
INPUT_BUFFER_BYTES = 1 * MIB

# A write of more than this is applied in pieces as it arrives, so that a connection never keeps more
# than this of an unfinished request (times the connections: the memory clients can make us hold).
WRITE_WHOLE_BYTES = 256 * KIB
# The pieces are multiples of this: whole pages, and not so large that the page cache makes large
# folios of them, which cost later small writes up to four times the CPU on ext4.
WRITE_PIECE_BYTES = 64 * KIB

# Replies to reads are put together in one shared buffer of this size and sent when it is full: sending eight
# replies of 128 KiB at once costs half the CPU of sending each by itself, as the client is woken once.
OUTPUT_BUFFER_BYTES = 1 * MIB + 64 * KIB
# A read that does not fit is sent in pieces of this size, as fast as its client takes them.
READ_PIECE_BYTES = 512 * KIB
# A longer trim or zeroing is done in pieces of this size, one a turn of the event loop: on a device that can only
# write zeroes a piece takes half a second, and the link must not fall silent.
ZERO_PIECE_BYTES = 64 * MIB
# Requests decoded in one go: bounds what a connection can make of one input buffer of tiny requests.
REQUESTS_PER_BATCH = 1024

# A client with more than this of replies waiting in our memory is not read from.
CLIENT_BACKLOG_BYTES = 256 * KIB

# Reads of one connection that wait for the disk at one time, in threads (those that miss the page cache):
# no more are begun while they are this long together.
DISK_READ_BYTES = 1 * MIB
DISK_THREADS = 8

# Extents in one BLOCK_STATUS reply, about 3 ms of work; the client asks again. (The document: at most 2^20.)
BLOCK_STATUS_EXTENTS = 1024
# What a CACHE request reads ahead at most.
PREFETCH_BYTES = 4 * MIB

# --- The link ---------------------------------------------------------------------------------

# Frames other than changes: hello, digests, results.
LINK_FRAME_BYTES = 64 * KIB
# A frame of changes: at most what one client's input holds, and the headers of the pieces of a long write.
CHANGES_FRAME_BYTES = INPUT_BUFFER_BYTES + 4 * KIB
# The secondary's input: more than one whole frame.
LINK_BUFFER_BYTES = 2 * MIB
# What waits for the link in our memory. Above it, changes are not copied but read again from the store
# when the link has drained.
LINK_BACKLOG_BYTES = 2 * MIB

# Reads are ordered after writes in flight by regions of this size.
ORDER_REGION_BYTES = 64 * KIB
# Above this many remembered regions the table is emptied, and every read waits once.
ORDER_REGIONS = 65536
# A change over more regions than this orders every read after it, instead of being remembered by region.
ORDER_REGIONS_PER_CHANGE = 64

# --- Resync -----------------------------------------------------------------------------------

COMPARE_BLOCK_BYTES = 512 * KIB
# A verify, and a comparison of diverged copies, finds, tells, repairs and keeps what differs in blocks of this size.
COMPARE_GRAIN_BYTES = 64 * KIB
# Comparisons under way at one time.
COMPARE_BLOCKS_IN_FLIGHT = 16
# What is done of a resync between two flushes; what is not flushed is done again if the resync is interrupted.
RESYNC_FLUSH_BYTES = 256 * MIB

# --- Verify -----------------------------------------------------------------------------------

# Comparisons of a verify under way: few, as each may wait for a disk, on both nodes.
VERIFY_BLOCKS_IN_FLIGHT = 4
# Ranges whose newest change waits for the link are put off, so many at most.
VERIFY_PUT_OFF = 16
# "Is all of this a hole?" costs nothing, however long it is.
HOLE_COMPARE_BYTES = 1024 * MIB
# Parts that a range which differs is cut into, to find where.
VERIFY_PARTS = 16
# What a verify repairs between two flushes.
REPAIR_FLUSH_BYTES = 16 * MIB
# Ranges that are told; of more, only how many bytes they are.
VERIFY_RANGES = 32

# --- Comparing copies that have no common history ---------------------------------------------

# What is read and digested at one time, in a thread.
INSPECT_PIECE_BYTES = 4 * MIB
# Ranges that differ which are told; more are counted.
INSPECT_RANGES = 256

# --- What may differ --------------------------------------------------------------------------

# Regions of the intent log: coarse, so that a look-up is all that most changes cost.
INTENT_REGION_BYTES = 4 * MIB
# In the log of one volume; more wait for a checkpoint. It bounds what is compared after a crash: 256 GiB.
INTENT_REGIONS = 65536
# Logged at once with a region that follows one which is being written.
INTENT_AHEAD = 8
# Between two checkpoints.
CHECKPOINT_S = 5.0
# A region that was written since so many checkpoints, a minute, stays in the log: most will be written again, and to
# log each anew would cost their clients a durable write. After a crash they are compared, not copied.
INTENT_KEPT_CHECKPOINTS = 12

# --- Heartbeats -------------------------------------------------------------------------------

# One UDP datagram, with room below the 65507 bytes that UDP over IPv4 carries.
HEARTBEAT_DATAGRAM_BYTES = 60_000
# Every beat tells of every group.
HEARTBEAT_GROUPS = 64
# What one group, and all that is not groups, can take of a beat: the names, numbers and texts below at their longest.
HEARTBEAT_GROUP_BYTES = 900
HEARTBEAT_FRAME_BYTES = 2_000
# Names are at most as long as the configuration allows.
HEARTBEAT_NAME_CHARACTERS = 64
HEARTBEAT_WORD_BYTES = 32
# Why a node cannot own a group, for people; cut to this.
HEARTBEAT_REASON_BYTES = 200
# Parts of the cluster file, each with a digest.
HEARTBEAT_SECTIONS = 8
# Lives of the peer that it has not proven: a node that has just started, or replays of as many former lives.
HEARTBEAT_GREETS = 16
# Former lives of the peer whose replays are not even greeted.
HEARTBEAT_RETIRED = 1024
# Own beats whose send time is remembered: 20 s of them at the shortest distance.
HEARTBEAT_SENT = 4096
# Between two beats, however often something changes.
HEARTBEAT_GAP_S = 0.005
# Datagrams received on one path in one turn of the event loop: 64 of the longest take about 4 ms.
HEARTBEATS_PER_WAKE_UP = 64

REQUEST_HEADER_BYTES = 28

assert WRITE_WHOLE_BYTES + REQUEST_HEADER_BYTES <= INPUT_BUFFER_BYTES // 2
assert READ_PIECE_BYTES <= OUTPUT_BUFFER_BYTES
assert WRITE_WHOLE_BYTES % WRITE_PIECE_BYTES == 0
assert CHANGES_FRAME_BYTES + LINK_FRAME_BYTES <= LINK_BUFFER_BYTES
assert COMPARE_BLOCK_BYTES <= INPUT_BUFFER_BYTES
assert ABUSIVE_PAYLOAD_BYTES >= INPUT_BUFFER_BYTES
assert COMPARE_BLOCK_BYTES % COMPARE_GRAIN_BYTES == 0
assert INSPECT_PIECE_BYTES % COMPARE_GRAIN_BYTES == 0
assert INSPECT_PIECE_BYTES // COMPARE_GRAIN_BYTES * 32 + 16 <= LINK_FRAME_BYTES
assert INTENT_REGION_BYTES % COMPARE_BLOCK_BYTES == 0
assert HOLE_COMPARE_BYTES % COMPARE_BLOCK_BYTES == 0
assert HEARTBEAT_GROUPS * HEARTBEAT_GROUP_BYTES + HEARTBEAT_FRAME_BYTES <= HEARTBEAT_DATAGRAM_BYTES
