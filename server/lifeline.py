"""Ties the life of the engine's processes to the server's, and to nothing else.

vLLM's engine and worker processes outlive a server that is killed: they are re-parented, deaf to
SIGTERM and keep their memory. Every process that the server starts therefore watches the server
itself, whose process id it finds in its environment, and ends at once when the server does.
"""

import os
import select
import signal
import threading
from contextlib import suppress
from pathlib import Path

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
    # Ctrl-C is for the server, which lets what runs end: the terminal sends it to a whole group.
    with suppress(PermissionError):  # it leads a session
        os.setpgid(0, 0)
    try:
        descriptor = os.pidfd_open(server)
    except ProcessLookupError:  # it ended before this process could look
        os.kill(os.getpid(), signal.SIGKILL)
        return
    threading.Thread(target=_die_with, args=(descriptor,), daemon=True, name="lifeline").start()


class Processes:
    """Processes of the engine, to be sure of their end: one that hangs hears no signal but one."""

    def __init__(self, tops: list[int]) -> None:
        """`tops` are process ids; those that they have started by now belong to them."""
        # By descriptor: an id may be another process's when the time comes.
        self._descriptors = [
            os.pidfd_open(pid) for top in tops for pid in (top, *_children(top)) if _runs(pid)
        ]

    def kill(self) -> None:
        """Ends what is left of them, at once."""
        for descriptor in self._descriptors:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        self._descriptors = []


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_children(child)]
    return found


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _die_with(descriptor: int) -> None:
    # SIGKILL: an engine busy in a kernel, or one that waits for its workers, hears nothing else.
    select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGKILL)
