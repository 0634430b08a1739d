"""Stands in for a data process in tests of the supervisor: speaks the channel, serves nothing.

    fake_data_process.py BEHAVIOUR --config FILE --node NAME --group GROUP --channel FD --parent PID

A process that runs well misbehaves on a signal: SIGUSR1 sends garbage, SIGUSR2 fails with a message.
Its status has, as `why`, what it inherited: the open descriptors, so that a test can see them.
"""

import argparse
import json
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any


def status(arguments: argparse.Namespace, reads: int) -> dict[str, Any]:
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    inherited = sorted(fd for fd in descriptors if os.path.exists(f"/proc/self/fd/{fd}"))
    return {
        "type": "status",
        "group": arguments.group,
        "role": "primary",
        "state": "in-sync",
        "why": json.dumps([os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in inherited]),
        "epoch": 1,
        "owner": arguments.node,
        "in_sync": ["node-a", "node-b"],
        "session": True,
        "joinable": False,
        "peer_unfit": "",
        "owner_lineage": "",
        "fit": {
            "lineage": "0" * 32,
            "blank": False,
            "lost_cache": False,
            "needs_sync": False,
            "settled_epoch": 0,
            "differs": False,
            "failure": "",
        },
        "serving": True,
        "cannot_listen": "",
        "endpoints": [],
        "link": {
            "state": "connected",
            "peer": "node-b",
            "address": "127.0.0.1:7801",
            "why": "",
            "round_trip_ms": 0.25,
            "protocol": 1,
            "peer_version": "0.1.0",
        },
        "resync": None,
        "verify": {"running": None, "last": None, "volumes": {}},
        "window": {"changes": 0, "bytes": 0, "oldest_ms": 0.0},
        "clients": 0,
        "counters": dict.fromkeys(
            (
                "connections_accepted",
                "connections_refused",
                "nbd_bad_input",
                "link_bad_input",
                "link_sessions",
                "disk_errors",
            ),
            0,
        ),
        "volumes": {
            "vm-a": {
                "size_bytes": 1 << 30,
                "read_only": False,
                "in_flight": 0,
                "intent_regions": 0,
                "dirty_bytes": 0,
                "counters": dict.fromkeys(
                    ("read_bytes", "writes", "written_bytes", "flushes", "trims", "zeroes", "errors"), 0
                )
                | {"reads": reads},
            }
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour", choices=["well", "fails", "silent", "mute", "stubborn", "dies", "babbles"])
    for option in ("--config", "--node", "--group"):
        parser.add_argument(option)
    for option in ("--channel", "--parent"):
        parser.add_argument(option, type=int)
    arguments = parser.parse_args()
    channel = socket.socket(fileno=arguments.channel)

    def send(message: dict[str, Any]) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    def babble(_number: int, _frame: FrameType | None) -> None:
        channel.sendall(b"\x00garbage\n")

    def fail(_number: int, _frame: FrameType | None) -> None:
        send({"type": "failed", "message": "/srv/vm-a.img is gone."})
        os._exit(1)

    signal.signal(signal.SIGUSR1, babble)
    signal.signal(signal.SIGUSR2, fail)
    match arguments.behaviour:
        case "fails":
            send({"type": "failed", "message": "127.0.0.1:10809 is in use."})
            return 1
        case "dies":
            return 3
        case "babbles":
            channel.sendall(b"x" * 1000 + b"\n")
        case "silent":
            pass
        case "mute":
            send({"type": "ready"})
        case _:
            send({"type": "ready"})
            send(status(arguments, reads=0))
    while line := channel.recv(4096):
        if b'"stop"' in line and arguments.behaviour != "stubborn":
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
