"""A listening socket, or the reason why there is none in words that help."""

import socket


class ListenError(OSError):
    """The address cannot be listened on; the message says why and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one).

    Raises:
        ListenError: the port is in use or not allowed, or the host is not this machine.
    """
    if not 0 <= port <= 65_535:
        raise ListenError(f"Cannot listen on {host} port {port}: ports go from 0 to 65535. Choose another with --port.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ListenError(f"Cannot listen on {host} port {port}: {reason}. Choose another with --port.") from error
    return listener
