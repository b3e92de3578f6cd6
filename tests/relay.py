"""A wire that can be cut: TCP from a port of its own to a server, refused or held back as a test wants."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType


class Relay:
    """Passes connections on to a port of 127.0.0.1, for use as a context manager.

    :ivar port: where clients connect.
    :ivar held: set once a client's bytes have been held back.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._passing = threading.Event()
        self._passing.set()
        self._open: list[socket.socket] = []
        self._listening = self._listen(0)
        self.port: int = self._listening.getsockname()[1]
        self.held = threading.Event()

    def __enter__(self) -> Relay:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._passing.set()

    def refuse(self) -> None:
        """Hang up on everybody, and let nobody connect."""
        self._stopping.set()
        self._thread.join()
        self._listening.close()
        self.cut()

    def accept(self) -> None:
        """Undo :meth:`refuse`."""
        self._listening = self._listen(self.port)
        self._start()

    def hang(self) -> None:
        """Take connections and what clients say, and answer nothing, until :meth:`go_on`."""
        self._passing.clear()
        self.held.clear()

    def go_on(self) -> None:
        """Undo :meth:`hang`: what was held back goes on its way."""
        self._passing.set()

    def lead_to(self, target: int) -> None:
        """Lead new connections to another port; those that there are end."""
        self._target = target
        self.cut()

    def cut(self) -> None:
        """End the connections that there are."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open = []

    @staticmethod
    def _listen(port: int) -> socket.socket:
        return socket.create_server(("127.0.0.1", port), backlog=64)

    def _start(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            if select.select([self._listening], [], [], 0.02)[0]:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                threading.Thread(target=self._connect, args=(client, server), daemon=True).start()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = threading.Thread(target=self._pass, args=(server, client), daemon=True)
            back.start()
            self._pass(client, server)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if not self._passing.is_set():
                    self.held.set()
                    self._passing.wait()
                sink.sendall(received)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
