"""One call of a reward function: its arguments, the shape of its rows, and its log. Imports nothing heavy, because
worker processes start here."""

import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from trl.near import near
from trl.rewards import FACTORIES, REWARDS
from trl.rewards.named import find
from trl.rewards.shapes import shaped, text_of

SHAPE_ERRORS = (TypeError, AttributeError, KeyError)  # errors of a function that expects the other shape
RESERVED = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")


@dataclass
class Log:
    """The log of a function while it runs. It is passed on only after success, so that a function that is called again
    with the other shape logs once."""

    columns: list[tuple[str, list[Any]]] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.columns.append((column, list(values)))

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, value))


@dataclass(frozen=True)
class Call:
    """The rows of one call. `messages` says whether the function gets them as lists of messages or as strings."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    trainer_state: Any = None
    prompt_ids: Sequence[Sequence[int]] | None = None
    messages: bool = False

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, start: int, stop: int) -> "Call":
        """The rows from `start` to `stop`."""
        return replace(
            self,
            prompts=self.prompts[start:stop],
            completions=self.completions[start:stop],
            completion_ids=self.completion_ids[start:stop],
            columns={name: values[start:stop] for name, values in self.columns.items()},
            prompt_ids=None if self.prompt_ids is None else self.prompt_ids[start:stop],
        )

    def only(self, function: Callable[..., Any]) -> "Call":
        """The call without columns that `function` does not take, to send less to a worker process."""
        names = accepted(function, {**self.columns, **dict.fromkeys(RESERVED)})
        columns = {name: values for name, values in self.columns.items() if name in names}
        return replace(self, columns=columns, trainer_state=self.trainer_state if "trainer_state" in names else None)

    def arguments(self, function: Callable[..., Any], log: Log, asked: list[str]) -> dict[str, Any]:
        """The arguments of `function`: the available values that its signature accepts."""
        given: dict[str, Any] = {
            **self.columns,
            "prompts": shaped(self.prompts, "user", self.messages, asked),
            "completions": shaped(self.completions, "assistant", self.messages, asked),
            "completion_ids": self.completion_ids,
            "trainer_state": self.trainer_state,
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
        }
        if self.prompt_ids is not None:
            given["prompt_ids"] = self.prompt_ids
        names = accepted(function, given)
        return {name: value for name, value in given.items() if name in names}


class Answer(NamedTuple):
    """The values that a function returned, its log, and whether it used its rows as the other shape (`asked`)."""

    values: Any
    log: Log
    asked: bool


class Missing(ValueError):
    """A reward function requires an argument that is not available."""


class WorkerError(Exception):
    """An error in a worker process. `is_shape`: the other shape of rows may work."""

    def __init__(self, sentence: str, is_shape: bool = False):
        super().__init__(sentence, is_shape)
        self.sentence, self.is_shape = sentence, is_shape

    def __str__(self) -> str:
        return self.sentence


def name_of(function: Any) -> str:
    """The name of a function in logs."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: Any) -> bool:
    """Whether calling `function` returns a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> set[str]:
    """The names in `given` that `function` accepts, without those that a `functools.partial` has fixed. Raises
    `Missing` if it requires another argument."""
    fixed: set[str] = set()
    inner: Any = function
    while isinstance(inner, functools.partial):
        fixed |= set(inner.keywords)
        inner = inner.func
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in function without a signature
        return set(given) - fixed
    named = {each.name: each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    for each in named.values():
        if each.default is each.empty and each.name not in given:
            raise Missing(_missing(inner, each.name, given))
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return set(given) - fixed
    return (set(given) & set(named)) - fixed


def _missing(function: Any, name: str, given: Mapping[str, Any]) -> str:
    own = getattr(function, "__name__", "")
    if own in FACTORIES and REWARDS[own] is function:
        return f"it makes a reward function and is not one itself: pass {own}({name}=...)"
    meant = near(name, given)
    columns = [f"`{column}`" for column in given if column not in RESERVED]
    return (
        f"it requires `{name}`, and the data have no such column{f' (did you mean `{meant}`?)' if meant else ''}. "
        f"Their columns: {', '.join(columns) or 'none'}; it may also take {', '.join(RESERVED)}"
    )


def run(function: Callable[..., Any], call: Call) -> Answer:
    """Call `function` on the rows of `call`."""
    log, asked = Log(), []  # type: ignore[var-annotated]
    values = function(**call.arguments(function, log, asked))
    return Answer(values, log, bool(asked))


async def run_async(function: Callable[..., Any], call: Call) -> Answer:
    """As `run`, for a coroutine function."""
    log, asked = Log(), []  # type: ignore[var-annotated]
    values = await function(**call.arguments(function, log, asked))
    return Answer(values, log, bool(asked))


# --- in worker processes ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _loaded(source: str | bytes) -> Callable[..., Any]:
    return find(source) if isinstance(source, str) else pickle.loads(source)


def run_there(source: str | bytes, call: Call) -> Answer:
    """`run` in a worker process. `source` is the pickled function, or its name. Raises `WorkerError`."""
    try:
        function = _loaded(source)
    except Exception as error:
        raise WorkerError(
            f"a worker process cannot load it ({type(error).__name__}: {error}). Define it in a file that can be "
            "imported, not in a notebook or inside a function, or set its attribute `workers` to 0"
        ) from None
    try:
        answer = run(function, call)
        return answer._replace(values=listed(answer.values))
    except ImportError:
        raise
    except Exception as error:  # a user's own exception may not unpickle in the parent
        raise WorkerError(f"{type(error).__name__}: {error}", isinstance(error, SHAPE_ERRORS)) from None


def listed(values: Any) -> Any:
    """Tensors, arrays and other iterables as lists; anything else as it is."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        return values
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


class RewardError(ValueError):
    """A reward cannot be used; the message names the function, the row, its text and the remedy."""


class Late(Exception):
    """A reward function exceeded its time limit."""


def shortened(completion: Any, length: int = 60) -> str:
    text = text_of(completion)
    return repr(text if len(text) <= length else f"{text[:length]}…")


def error_text(error: BaseException) -> str:
    return str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
