"""The kinds of reward functions: in this process, as coroutines, in worker processes, behind endpoints."""

import asyncio
import http.client
import inspect
import json
import pickle
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from urllib.parse import urlsplit

from trl.notices import notify_once
from trl.rewards.calls import (
    Answer,
    Call,
    Late,
    Log,
    RewardError,
    WorkerError,
    name_of,
    run,
    run_async,
    run_there,
)
from trl.rewards.workers import Loop, Pool

BACKOFF = 0.5  # seconds before the first retry of an endpoint; doubled each time


class Function:
    """A Python function. `messages`: it gets lists of messages, not strings; `background`: it runs beside others."""

    reshapes = True
    background = True

    def __init__(self, function: Callable[..., Any], messages: bool, timeout: float | None):
        self.function, self.messages, self.timeout = function, messages, timeout
        self.name = name_of(function)


class Here(Function):
    """A function called in this thread."""

    background = False

    def __init__(self, function: Callable[..., Any], messages: bool, loop: Loop, timeout: float | None):
        super().__init__(function, messages, timeout)
        self.loop = loop

    def begin(self, call: Call) -> Callable[[], Answer]:
        return lambda: self._run(call)

    def _run(self, call: Call) -> Answer:
        answer = run(self.function, call)
        if inspect.isawaitable(answer.values):  # a plain function that returned a coroutine

            async def awaited(value: Any = answer.values) -> Any:
                return await value

            return answer._replace(values=self.loop.start(awaited(), self.timeout).result())
        return answer

    def first_failing(self, call: Call) -> int | None:
        """The first row on which the function fails when called on it alone, or None."""
        start, part = 0, call
        while len(part) > 1:
            half = len(part) // 2
            if self._fails(part.rows(0, half)):
                part = part.rows(0, half)
            else:
                start, part = start + half, part.rows(half, len(part))
        return start if self._fails(part) else None

    def _fails(self, call: Call) -> bool:
        try:
            self._run(call)
        except Exception:
            return True
        return False


class Asynchronous(Function):
    """A coroutine function; all of them run concurrently."""

    def __init__(self, function: Callable[..., Any], messages: bool, loop: Loop, timeout: float | None):
        super().__init__(function, messages, timeout)
        self.loop = loop

    def begin(self, call: Call) -> Callable[[], Answer]:
        return self.loop.start(run_async(self.function, call), self.timeout).result


class Elsewhere(Function):
    """A function in worker processes; each process gets a part of the rows."""

    def __init__(
        self,
        function: Callable[..., Any],
        messages: bool,
        source: str | None,
        parts: int,
        pool: Pool,
        timeout: float | None,
    ):
        super().__init__(function, messages, timeout)
        self.parts, self.pool = parts, pool
        self.source: str | bytes = source if source is not None else self._pickled()

    def _pickled(self) -> bytes:
        try:
            return pickle.dumps(self.function)
        except Exception as error:
            raise RewardError(
                f"reward function {self.name!r} cannot be sent to a worker process ({error}). Define it in a file, at "
                "the top level (no lambda, nothing inside a function), or set its attribute `workers` to 0"
            ) from error

    def begin(self, call: Call) -> Callable[[], Answer]:
        call = call.only(self.function)
        share, more = divmod(len(call), self.parts)
        bounds = [0]
        for part in range(min(self.parts, len(call))):
            bounds.append(bounds[-1] + share + (part < more))
        calls = [call.rows(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
        futures = [self.pool.submit(run_there, self.source, part) for part in calls]
        return lambda: self._finish(calls, futures)

    def _finish(self, calls: list[Call], futures: "list[Future[Answer]]") -> Answer:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        answers: list[Answer] = []
        try:
            for future in futures:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                answers.append(future.result(left))
        except (WorkerError, ImportError):
            raise
        except FutureTimeout:
            self.pool.kill()
            raise Late(f"did not come back from its worker process within {self.timeout:g} seconds") from None
        except BrokenProcessPool as error:
            self.pool.kill()
            raise WorkerError(
                "its worker process died. Out of memory? Or the script starts training without "
                "`if __name__ == '__main__':`, which worker processes need"
            ) from error
        except Exception as error:
            raise WorkerError(
                f"its arguments or rewards cannot pass between processes ({type(error).__name__}: {error}). Set its "
                "attribute `workers` to 0"
            ) from error
        finally:
            for future in futures:
                future.cancel()
        return _joined(calls, answers)


def _joined(calls: list[Call], answers: list[Answer]) -> Answer:
    """The answers to parts, joined."""
    values: list[Any] = []
    for call, answer in zip(calls, answers, strict=True):
        if not isinstance(answer.values, list) or len(answer.values) != len(call):
            got = f"{len(answer.values)} rewards" if isinstance(answer.values, list) else f"{answer.values!r:.60}"
            raise WorkerError(
                f"returned {got} for the {len(call)} rows that a worker process gave it: return one for each, None "
                "where it does not apply"
            )
        values += answer.values
    columns: dict[str, list[Any]] = {}
    for answer in answers:
        for column, part in answer.log.columns:
            columns.setdefault(column, []).extend(part)
    log = Log(list(columns.items()), [metric for answer in answers for metric in answer.log.metrics])
    return Answer(values, log, any(answer.asked for answer in answers))


class Endpoint:
    """An HTTP endpoint: it gets a POST of `prompts`, `completions` and `columns` in JSON, and answers `rewards`."""

    reshapes = False
    background = True
    messages = False

    def __init__(self, url: str, loop: Loop, timeout: float | None, retries: int):
        self.url, self.loop, self.timeout, self.retries = url, loop, timeout, retries
        self.name = urlsplit(url).netloc.rsplit("@")[-1] + urlsplit(url).path.rstrip("/")

    def begin(self, call: Call) -> Callable[[], Answer]:
        body = self._body(call)

        async def asked() -> Answer:
            return Answer(await asyncio.to_thread(self._post, body), Log(), False)

        return self.loop.start(asked(), None).result  # each attempt has its own time limit

    def _body(self, call: Call) -> bytes:
        columns = {}
        for name, values in call.columns.items():
            try:
                json.dumps(values)
            except (TypeError, ValueError) as error:
                notify_once(f"the column {name} is not sent to {self.url}: {error}")
            else:
                columns[name] = values
        body = {"prompts": list(call.prompts), "completions": list(call.completions), "columns": columns}
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> list[Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(BACKOFF * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._rewards(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    why = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}".rstrip(": ")
                if error.code < 500 and error.code not in (408, 429):
                    raise WorkerError(f"the endpoint {self.url} refused: {why}") from None
            except (OSError, http.client.HTTPException) as error:  # no connection, an interrupted one, or a timeout
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                why = f"no answer within {self.timeout:g} seconds" if late else f"{reason}"
        raise WorkerError(f"the endpoint {self.url} failed {self.retries + 1} times, last with: {why}")

    def _rewards(self, answer: bytes) -> list[Any]:
        try:
            rewards = json.loads(answer)["rewards"]
            if not isinstance(rewards, list):
                raise TypeError("not a list")
        except (ValueError, KeyError, TypeError):
            beginning = answer[:100].decode(errors="replace")
            raise WorkerError(
                f'the endpoint {self.url} answered {beginning!r} instead of {{"rewards": [...]}}'
            ) from None
        return rewards
