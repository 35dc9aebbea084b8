"""Ties the life of the engine's processes to the server's.

vLLM's engine and worker processes outlive a server that is killed: they are re-parented, deaf to
SIGTERM and keep their memory. Every process that the server starts therefore watches the server
itself, whose process id it finds in its environment, and ends at once when the server does.
"""

import os
import select
import signal
import threading

SERVER = "_LORAPLEX_SERVER_PID"
_watched: set[int] = set()


def hold() -> None:
    """In the server: mark this process as the one that the others live by."""
    os.environ[SERVER] = str(os.getpid())


def follow() -> None:
    """In a process of the engine: end with SIGKILL as soon as the server is gone.

    Does nothing in the server itself, and outside of one. May be called more than once.
    """
    server = int(os.environ.get(SERVER, 0))
    if server in (0, os.getpid()) or os.getpid() in _watched:
        return
    _watched.add(os.getpid())
    try:
        descriptor = os.pidfd_open(server)
    except ProcessLookupError:  # it ended before this process could look
        os.kill(os.getpid(), signal.SIGKILL)
        return
    threading.Thread(target=_die_with, args=(descriptor,), daemon=True, name="lifeline").start()


def _die_with(descriptor: int) -> None:
    # SIGKILL: an engine busy in a kernel, or one that waits for its workers, hears nothing else.
    select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGKILL)
