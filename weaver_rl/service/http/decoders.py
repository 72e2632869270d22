"""Processes that decode large requests, so that the event loop never does. What decoding is, decoding.py knows.

A thread would not do: numbers become Python objects under the interpreter's lock, and everybody else would wait.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from weaver_rl.errors import ServiceError
from weaver_rl.service.http.decoding import Decoded, DecodeJob, Refusal, decode

PR_SET_PDEATHSIG = 1


class Decoders:
    """Workers that are started ahead, and anew after one died.

    Must be used from one event loop, whose thread lives as long as the workers: the kernel ends them with that thread.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Starts the workers, which takes them a while, without waiting for them."""
        pool = self._started()
        for _ in range(self._num_workers):
            pool.submit(os.getpid)

    async def decode(self, job: DecodeJob) -> Decoded | Refusal:
        """Decodes in this process what is small, elsewhere what is large or compressed.

        Raises:
            ServiceError: 503, retryable: the worker died.
        """
        if not job.takes_long:
            return decode(job)
        pool = self._started()
        try:
            return await asyncio.wrap_future(pool.submit(decode, job))
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = None
            pool.shutdown(wait=False)
            raise ServiceError(
                "decoder_lost",
                "the process that decoded the request died, perhaps for want of memory; send it again, or less at once",
                status=503,
                retryable=True,
            ) from None

    def close(self) -> None:
        """Ends the workers; a request that is being decoded is finished first."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(),),
            )
        return self._pool


def _begin(parent_pid: int) -> None:
    """Ties the worker's life to the server's: one that waits for work would outlive a killed server for ever."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It warns of what clients send, which they are told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
