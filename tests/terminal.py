"""A pseudo-terminal with a program in it, as a person would sit before one."""

import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from fcntl import ioctl
from types import TracebackType

WAIT_S = 60
_CONTROL = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>()][0-9A-B]?)")


class Terminal:
    """`loraplex …` in a terminal of `columns` × `rows` characters; a context manager.

    With `code`, it is Python of that text instead; `more` are environment variables.
    """

    def __init__(
        self, *arguments: str, columns: int = 100, rows: int = 30, code: str = "", **more: str
    ) -> None:
        sizes = {"COLUMNS": str(columns), "LINES": str(rows), "TERM": "xterm-256color"}
        program = ["-c", code] if code else ["-m", "server.cli"]
        command = [sys.executable, *program, *arguments]
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, os.environ | sizes | more)
        ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.raw = ""
        self._seen = 0
        self._status: int | None = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._end)

    @property
    def text(self) -> str:
        """All that was printed so far, without what moves and colours it."""
        return _CONTROL.sub("", self.raw).replace("\r", "")

    @property
    def modes(self) -> list[int]:
        """The terminal's local modes: whether it echoes, and waits for whole lines."""
        return [termios.tcgetattr(self._end)[3] & each for each in (termios.ECHO, termios.ICANON)]

    def see(self, what: str, within_s: float = WAIT_S) -> str:
        """Waits until `what` was printed since the last time, and gives what came until then."""
        deadline = time.monotonic() + within_s
        while (found := self.text.find(what, self._seen)) < 0:
            assert time.monotonic() < deadline, f"no {what!r} in:\n{self.text[self._seen :]}"
            assert self._read(0.1), f"ended without {what!r}:\n{self.text[self._seen :]}"
        before, self._seen = self._seen, found + len(what)
        return self.text[before : self._seen]

    def type(self, keys: str) -> None:
        """Presses keys; \\x03 is Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._end, keys.encode())

    def end(self, within_s: float = WAIT_S) -> int:
        """Waits for the program's end: its exit code."""
        deadline = time.monotonic() + within_s
        while self._read(0.1):
            assert time.monotonic() < deadline, f"it goes on:\n{self.text[self._seen :]}"
        _, status = os.waitpid(self.pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def _read(self, within_s: float) -> bool:
        """Takes what was printed; False once nothing will be any more."""
        ready, _, _ = select.select([self._end], [], [], within_s)
        if not ready:
            return True
        try:
            data = os.read(self._end, 65536)
        except OSError:  # what Linux says of a terminal that nobody has open any more
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)
