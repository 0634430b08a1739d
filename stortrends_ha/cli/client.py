"""Asks a node over its control socket.

Invariant: `status` returns within its timeout, whatever is at the other end of the socket, or raises
`NoAnswer` with the reason in words.
"""

import json
import socket
import time
from pathlib import Path
from typing import Any

from stortrends_ha.errors import StorTrendsError
from stortrends_ha.unix_path import address_of

TIMEOUT_S = 3.0
ANSWER_BYTES_MAX = 64 << 20

# What `node.status` describes: it comes from another process, perhaps of another version.
NodeStatus = dict[str, Any]


class NoAnswer(StorTrendsError):
    """A node does not answer; the text says why, to stand after the socket's path."""


def status(path: Path, timeout_s: float = TIMEOUT_S) -> NodeStatus:
    """The status of the node behind the control socket at `path`."""
    answer = _ask(path, b'{"command": "status"}\n', timeout_s)
    if not isinstance(answer, dict) or not isinstance(answer.get("status"), dict):
        raise NoAnswer(str(answer.get("error", "it gave no status")) if isinstance(answer, dict) else "no status")
    found: NodeStatus = answer["status"]
    return found


def request(path: Path, command: dict[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Give a command to the node behind the control socket at `path`; its answer. A refusal raises StorTrendsError with
    the node's own sentence."""
    answer = _ask(path, json.dumps(command).encode() + b"\n", timeout_s)
    result = answer.get(command["command"]) if isinstance(answer, dict) else None
    if isinstance(result, dict):
        return result
    refusal = answer.get("error") if isinstance(answer, dict) else None
    raise StorTrendsError(str(refusal or "The node gave no answer that can be understood."))


def _ask(path: Path, request: bytes, timeout_s: float) -> Any:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            with address_of(path) as address:
                connection.connect(address)
            connection.sendall(request)
            return json.loads(_line(connection, time.monotonic() + timeout_s))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NoAnswer("it is not running") from error
    except PermissionError as error:
        raise NoAnswer("you are not allowed to ask it; try as root") from error
    except TimeoutError as error:
        raise NoAnswer(f"it did not answer within {timeout_s:g} s") from error
    except ValueError as error:
        raise NoAnswer("what answers there is not a node") from error
    except OSError as error:
        raise NoAnswer(str(error.strerror or error)) from error


def _line(connection: socket.socket, deadline_s: float) -> bytes:
    answer = bytearray()
    while not answer.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        piece = connection.recv(1 << 16)
        if not piece or len(answer) > ANSWER_BYTES_MAX:
            raise ValueError("not a line")
        answer += piece
    return bytes(answer)
