"""Tells the service manager how far a daemon is (the sd_notify protocol of systemd, Type=notify).

Invariants: does nothing, and never fails, when nobody asked to be told; never waits for who did.
"""

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a state such as ``READY=1`` to the socket that NOTIFY_SOCKET names, if it does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), socket.MSG_DONTWAIT, address)
    except OSError as error:
        log.warning("The service manager could not be told %s: %s.", state, error.strerror)
