#!/bin/busybox sh
# All that the guest runs: two programs which write to its disk until they are told to stop, and check what they wrote.
#
# The first serial port is the kernel's console. The second is this program's; it says, one line each:
#   ready                    the file system is mounted, writing begins
#   write NAME N ok SECONDS  write N of a writer is on stable storage; SECONDS is the guest's uptime
#   verdict ok N             all N slots hold what was written to them last, after the file system was mounted anew
#   failed: WHY              anything went wrong; a writer that says this has stopped
# and it reads one line, whatever it is: stop writing, check everything, power off.
#
# What should be on the disk is remembered in memory, never read back from the disk.

SLOTS=16
BYTES=65536

/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in /modules/*; do
	insmod "$module"
done
exec < /dev/ttyS1 > /dev/ttyS1 2>&1
stty raw -echo
mkdir -p /disk /sums /tmp

fail() {
	echo "failed: $*"
	return 1
}

# Whether a slot holds what was written to it last: read from the disk, not from the page cache.
holds() {
	sum=$(dd if="$1" bs=$BYTES iflag=direct 2> /dev/null | md5sum) && [ "${sum%% *}" = "$(cut -d ' ' -f 1 "$2")" ]
}

# Fill one slot after the other with new bytes, each on stable storage before the next; what a slot held is checked
# before it is written again.
# writer NAME DD_OPTION ...
writer() {
	name=$1 count=0
	shift
	while [ ! -e /stop ]; do
		slot=/disk/$name.$((count % SLOTS)) sum_of=/sums/$name.$((count % SLOTS))
		if [ "$count" -ge "$SLOTS" ]; then
			holds "$slot" "$sum_of" || { fail "$slot does not hold what write $((count - SLOTS)) wrote"; return; }
		fi
		head -c $BYTES /dev/urandom > "/tmp/$name"
		said=$(dd if="/tmp/$name" of="$slot" conv=fsync "$@" 2>&1) || { fail "$name $count:" $said; return; }
		sum=$(md5sum < "/tmp/$name")
		echo "${sum%% *}  $slot" > "$sum_of"
		count=$((count + 1))
		read -r uptime _ < /proc/uptime
		echo "write $name $count ok $uptime"
	done
}

mount -t ext4 /dev/vda /disk || fail "the disk cannot be mounted"
echo ready
# In the page cache first, written by fsync with many requests under way; and past it, one small request after the other.
writer cached bs=$BYTES &
writer direct bs=4096 oflag=direct &
read -r _
touch /stop
wait
umount /disk || fail "the disk cannot be unmounted"
mount -t ext4 -o ro /dev/vda /disk || fail "the disk cannot be mounted again"
if cat /sums/* | md5sum -c > /tmp/checked 2> /dev/null; then
	echo "verdict ok $(grep -c OK /tmp/checked)"
else
	fail $(grep -v OK /tmp/checked)
fi
umount /disk
poweroff -f
