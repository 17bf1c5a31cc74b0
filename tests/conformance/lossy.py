"""A proxy that loses one answer: the first request reaches the service, its reply never returns."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def lossy_proxy(port: int) -> Iterator[int]:
    """Forwards to `port`; yields its own port. Closes its first connection when the reply arrives."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, port), daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def _accept(listener: socket.socket, port: int) -> None:
    loses = True
    with suppress(OSError):  # closing the listener ends this loop
        while True:
            client, _ = listener.accept()
            service = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=_forward, args=(client, service), daemon=True).start()
            threading.Thread(target=_answer, args=(service, client, loses), daemon=True).start()
            loses = False


def _forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _answer(service: socket.socket, client: socket.socket, loses: bool) -> None:
    with suppress(OSError):
        while data := service.recv(65536):
            if loses:
                break
            client.sendall(data)
        client.shutdown(socket.SHUT_RDWR)
    client.close()
    service.close()
