"""A thing that several checks need, made once. It knows neither checks nor things."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class NotCheckedError(Exception):
    """A check that cannot be made, for the want of something that another check reports."""


class Given(Generic[T]):
    """Makes its thing at the first question, and gives every later one the same answer or the same failure.

    Example:
        tokenizer = Given("the tokenizer", lambda: load_tokenizer(directory))
        tokenizer.get()      # in the check that reports on it: raises what loading raised
        tokenizer.needed()   # in all others: raises NotCheckedError
    """

    def __init__(self, name: str, make: Callable[[], T]) -> None:
        self._name = name
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []
        self._failure: Exception | None = None

    def get(self) -> T:
        # Not waited for: who makes it may hang, and every later check would hang with it.
        if not self._lock.acquire(blocking=False):
            raise NotCheckedError(f"{self._name} is still not there")
        try:
            if self._failure is not None:
                raise self._failure
            if not self._made:
                self._made.append(self._make())
        except Exception as error:  # boundary: cleans up, then raises again
            self._failure = error
            raise
        finally:
            self._lock.release()
        return self._made[0]

    def needed(self) -> T:
        try:
            return self.get()
        except NotCheckedError:
            raise
        except Exception:  # noqa: BLE001  boundary: the check that owns it reports whatever it was
            raise NotCheckedError(f"{self._name} could not be had, see above") from None
