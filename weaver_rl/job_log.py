"""The log of a job, read over a connection that may break: where the reader is, and what are whole lines.

Every new connection tells the log again from its beginning. It knows no connection.
"""

from __future__ import annotations


class JobLog:
    """Turns what successive connections tell into lines, each exactly once.

    Example:
        log = JobLog()
        log.connect()
        log.tell("one\\ntw")    # ["one"]
        log.connect()           # the connection broke
        log.tell("one\\ntwo\\n")  # ["two"]
    """

    def __init__(self) -> None:
        self._partial = ""
        self._num_told = 0
        """Characters taken so far, of all connections."""
        self._at = 0
        """Characters that this connection has told."""

    @property
    def num_told(self) -> int:
        """How far the reader is, in characters from the beginning of the log."""
        return self._num_told

    def connect(self) -> None:
        """A new connection begins at the beginning."""
        self._at = 0

    def tell(self, text: str) -> list[str]:
        """Takes the next text of this connection; returns the lines that are whole now, without their newlines."""
        known = min(len(text), max(0, self._num_told - self._at))
        self._at += len(text)
        self._num_told = max(self._num_told, self._at)
        *lines, self._partial = (self._partial + text[known:]).split("\n")
        return lines

    def tell_whole(self, text: str) -> list[str]:
        """Takes the whole log, asked for beside the connection, which goes on where it was."""
        at, self._at = self._at, 0
        lines = self.tell(text)
        self._at = at
        return lines

    def end(self) -> list[str]:
        """The last line, if the log ended in the middle of it."""
        rest, self._partial = self._partial, ""
        return [rest] if rest else []
