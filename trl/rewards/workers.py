"""The event loop (in a thread) and the worker processes that run reward functions."""

import asyncio
import multiprocessing
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from trl.rewards.calls import (
    Answer,
    Late,
)


class Loop:
    """An event loop in its own thread, so that it works if another loop is running already, as in a notebook."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: Any = None

    def start(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> "Future[Any]":
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(self._loop,), name="trl-rewards", daemon=True)
            thread.start()
            self._end = weakref.finalize(self, _stop, self._loop, thread)
        return asyncio.run_coroutine_threadsafe(_limited(coroutine, timeout), self._loop)

    def close(self) -> None:
        if self._loop is not None:
            self._loop = None
            self._end()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


async def _limited(coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
    """The coroutine's result; `Late` after `timeout` seconds. Not by `wait_for`, whose TimeoutError could also
    come from the function itself."""
    task = asyncio.ensure_future(coroutine)
    done, _ = await asyncio.wait({task}, timeout=timeout)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        raise Late(f"did not answer within {timeout:g} seconds")
    return task.result()


class Pool:
    """Worker processes, started when first needed. They are spawned, since a fork would inherit threads and devices."""

    def __init__(self) -> None:
        self.size = 0
        self._pool: ProcessPoolExecutor | None = None
        self._end: Any = None

    def submit(self, function: Callable[..., Answer], *arguments: Any) -> "Future[Answer]":
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.size, mp_context=multiprocessing.get_context("spawn"))
            self._end = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        return self._pool.submit(function, *arguments)

    def kill(self) -> None:
        """End processes that do not return."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        self._end.detach()
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            self._end.detach()
            pool.shutdown(wait=True, cancel_futures=True)
