"""Which clients may submit: all of them, or none. Pure.

Rule 15: when a bound of the window is reached all clients are paused, so that one batch more comes at most.
"""

from stortrends_ha.replication.interfaces import Client


class Flow:
    """The clients of an owner; ``stopped`` is what they were told last."""

    def __init__(self) -> None:
        self._clients: dict[Client, None] = {}
        self.stopped = True

    def attach(self, client: Client) -> None:
        """A client has come: it may submit, unless it is paused at once."""
        self._clients[client] = None
        if self.stopped:
            client.pause()

    def detach(self, client: Client) -> None:
        """A client has gone: what it submitted goes on."""
        self._clients.pop(client, None)

    def set(self, stopped: bool) -> None:
        """Pause all clients, or let them go on, when that has changed."""
        if stopped == self.stopped:
            return
        self.stopped = stopped
        for client in list(self._clients):
            if self.stopped != stopped:  # the one before has filled the window
                break
            if stopped:
                client.pause()
            else:
                client.resume()
