"""Programs that connect to a port of a run and are none of its processes."""

from __future__ import annotations

import socket
import threading
import time


def send_slowly(connection: socket.socket) -> None:
    """Send a byte every 0.2 s in a thread, until the other side closes the connection."""

    def send() -> None:
        try:
            while True:
                connection.sendall(b"x")
                time.sleep(0.2)
        except OSError:  # closed by the other side
            pass

    threading.Thread(target=send, daemon=True).start()
