"""Completions to rewards: reward functions of all kinds score the same completions into one table.

Coroutines, endpoints and worker processes are started first and collected last. A reward that is neither a finite
number nor None raises `RewardError`, which names the function, the row and its text.
"""

import contextlib
import difflib
import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl.models.load import ModelError, load_tokenizer
from trl.models.unwrap import unwrap
from trl.notices import notify_once
from trl.rewards import REWARDS
from trl.rewards.calls import (
    RESERVED,
    SHAPE_ERRORS,
    Answer,
    Call,
    Late,
    Log,
    Missing,
    RewardError,
    WorkerError,
    accepted,
    error_text,
    is_async,
    listed,
    name_of,
    shortened,
)
from trl.rewards.judges import Asynchronous, Elsewhere, Endpoint, Here
from trl.rewards.models import ModelJudge, PipelineJudge, is_pipeline, load_judge, model_name
from trl.rewards.named import find, is_function
from trl.rewards.workers import Loop, Pool

CONSTANT_CALLS = 5  # number of calls with one constant reward before a notice
SEARCHED = 5.0  # seconds; a function that took longer to fail is not called again to find the failing row
LARGEST = torch.finfo(torch.float32).max


class RewardFunctions:
    """Several reward functions, called together.

    `functions` is one or a list of: a function (also `async`) with any of the arguments `prompts`, `completions`,
    `completion_ids`, `prompt_ids`, `trainer_state`, `log_extra`, `log_metric` and the columns of the data; a model with
    a scoring head, or its name or path; a text-classification pipeline; the address of an endpoint; the name of one of
    `trl.rewards.REWARDS`, `package.module:function` or `file.py:function`, optionally with arguments in brackets.

    weights               weights of the sum in `combine`; default: 1 each
    processing_classes    tokenizers of the models, None for other functions
    tokenizer             the policy's tokenizer
    chat                  the data are conversations: functions get lists of messages, else strings; a function written
                          for the other shape works too
    timeout               seconds, for each asynchronous function, worker process and request to an endpoint
    retries               number of repeated requests to an endpoint
    workers               number of processes that share the rows of plain functions; 0 (needed to compare rows with
                          each other): this process; a function's attribute `workers` overrides it
    batch_tokens          tokens per forward pass of a model
    model_kwargs, device  for models given by name

    Raises `RewardError` for a function that cannot be found or used.
    """

    def __init__(
        self,
        functions: Any,
        *,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
        tokenizer: Any = None,
        chat: bool = False,
        timeout: float | None = 300.0,
        retries: int = 3,
        workers: int = 0,
        batch_tokens: int = 16384,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: Any = None,
    ):
        functions = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not functions or any(function is None for function in functions):
            raise RewardError("reward_funcs is empty: pass at least one reward function, model, endpoint or name")
        self.weights = _weights(weights, len(functions))
        processing_classes = _tokenizers(processing_classes, len(functions))
        self.chat, self.timeout, self.retries, self.workers = chat, timeout, retries, workers
        self.tokenizer, self.device = tokenizer, device
        self.batch_tokens = batch_tokens
        self.model_kwargs, self.template_kwargs = dict(model_kwargs or {}), dict(chat_template_kwargs or {})
        self._loop, self._pool = Loop(), Pool()
        self.judges = [self._judge(function, own) for function, own in zip(functions, processing_classes, strict=True)]
        self._pool.size = max((judge.parts for judge in self.judges if isinstance(judge, Elsewhere)), default=0)
        self.names = _distinct([judge.name for judge in self.judges])
        self._constant: list[tuple[float, int]] = [(math.nan, 0)] * len(functions)
        self._unscored_notified = False

    # -- the functions ------------------------------------------------------------------------------------------------

    @property
    def functions(self) -> list[Any]:
        """The functions given, with names replaced by the functions and models that they name."""
        kinds = ("function", "model", "pipeline", "url")
        return [next(getattr(judge, kind) for kind in kinds if hasattr(judge, kind)) for judge in self.judges]

    @property
    def models(self) -> list[nn.Module]:
        """The models among the functions."""
        return [judge.model for judge in self.judges if isinstance(judge, ModelJudge)]

    def _judge(self, function: Any, tokenizer: Any) -> Any:
        source: str | None = None
        if isinstance(function, Path):
            function = str(function)
        if isinstance(function, str):
            if function.startswith(("http://", "https://")):
                return Endpoint(function, self._loop, self.timeout, self.retries)
            if _names_function(function):
                source, function = function, _found(function)
            else:
                function, tokenizer = self._model(function, tokenizer)
        options = {
            "template_kwargs": self.template_kwargs,
            "end_of_text": getattr(self.tokenizer, "eos_token_id", None),
        }
        if isinstance(function, nn.Module) and hasattr(unwrap(function), "config"):
            tokenizer = tokenizer or self._tokenizer_of(function)
            return ModelJudge(function, tokenizer, batch_tokens=self.batch_tokens, **options)
        if is_pipeline(function):
            try:
                return PipelineJudge(function, **options)
            except ValueError as error:
                raise RewardError(str(error)) from error
        if not callable(function):
            raise RewardError(
                f"a reward function must be a function, a model, a pipeline, an address or a name, not {function!r}, a "
                f"{type(function).__name__}"
            )
        if is_async(function):
            return Asynchronous(function, self.chat, self._loop, self.timeout)
        parts = getattr(function, "workers", self.workers)
        if parts:
            return Elsewhere(function, self.chat, source, int(parts), self._pool, self.timeout)
        return Here(function, self.chat, self._loop, self.timeout)

    def _model(self, name: str, tokenizer: Any) -> tuple[nn.Module, Any]:
        try:
            model, own = load_judge(name, self.device, self.model_kwargs)
        except (ValueError, RuntimeError) as error:
            raise RewardError(
                f"the reward {name!r} is neither a function ({', '.join(sorted(REWARDS))}, package.module:function, "
                f"file.py:function) nor a reward model: {error}"
            ) from error
        return model, tokenizer or own

    def _tokenizer_of(self, model: nn.Module) -> Any:
        """The tokenizer saved with a model; else the policy's, if it fits the model's vocabulary."""
        base = unwrap(model)
        name = getattr(base.config, "_name_or_path", "")
        try:
            if name:
                return load_tokenizer(name)
            raise ModelError("it was not loaded from a folder")
        except ModelError as error:
            rows = base.get_input_embeddings().weight.shape[0]
            if self.tokenizer is not None and len(self.tokenizer) <= rows:
                notify_once(f"{model_name(base.config, base)} is read with the policy's tokenizer: {error}")
                return self.tokenizer
            raise RewardError(
                f"the reward model {model_name(base.config, base)} has no tokenizer: {error}. Pass it in "
                "reward_processing_classes."
            ) from error

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """The rewards of all rows by all functions, [rows, functions] in fp32; NaN where a function returned None.

        Prompts and completions are strings, or lists of messages if the data are conversations. `columns` holds the
        other columns of the data, one value per row. The functions' logs are passed to `log_extra` and `log_metric`.
        Raises `RewardError`.
        """
        columns = {name: values for name, values in (columns or {}).items() if name not in _OWN_COLUMNS}
        lengths = {"prompts": len(prompts), "completion_ids": len(completion_ids)}
        lengths |= {f"column {name}": len(values) for name, values in columns.items()}
        for name, length in lengths.items():
            if length != len(completions):
                raise RewardError(f"{length} {name} for {len(completions)} completions: give one for each")
        table = torch.full((len(completions), len(self.judges)), math.nan, dtype=torch.float32)
        if not len(completions):
            return table
        base = Call(prompts, completions, completion_ids, columns, trainer_state, prompt_ids)

        begun: list[tuple[Call, Callable[[], Answer]]] = []
        for judge, name in zip(self.judges, self.names, strict=True):
            call = replace(base, messages=judge.messages)
            with _naming(name, call):
                begun.append((call, judge.begin(call)))
        # Functions of this process run while the others are in progress.
        order = sorted(range(len(self.judges)), key=lambda index: self.judges[index].background)
        logs: dict[int, Log] = {}
        for index in order:
            answer = self._finish(index, *begun[index])
            table[:, index] = torch.tensor(_column(self.names[index], base, answer.values), dtype=torch.float32)
            logs[index] = answer.log
        for index in sorted(logs):
            if log_extra is not None:
                for column, values in logs[index].columns:
                    log_extra(column, values)
            if log_metric is not None:
                for metric, value in logs[index].metrics:
                    log_metric(metric, value)
        self._notice(base, table)
        return table

    def _finish(self, index: int, call: Call, finish: Callable[[], Answer]) -> Answer:
        """The answer to a call in progress; if it failed on this shape of rows, the call is repeated in the other."""
        judge, name = self.judges[index], self.names[index]
        began = time.monotonic()
        try:
            answer = finish()
        except Exception as error:
            other = replace(call, messages=not call.messages)
            shape = isinstance(error, SHAPE_ERRORS) or isinstance(error, WorkerError) and error.is_shape
            also = ""
            if judge.reshapes and shape:
                try:
                    answer = judge.begin(other)()
                except Exception as second:
                    also = f" (and as {_SHAPES[other.messages]}: {error_text(second)})"
                else:
                    judge.messages = other.messages
                    notify_once(
                        f"reward function {name!r} fails on {_SHAPES[call.messages]} ({error_text(error)}) and works "
                        f"on {_SHAPES[other.messages]}: it gets {_SHAPES[other.messages]}"
                    )
                    return answer
            with _naming(name, call, also, judge, time.monotonic() - began):
                raise
        if answer.asked and judge.messages:
            notify_once(
                f"reward function {name!r} looks for strings in prompts or completions, which are conversations: their "
                "text is compared"
            )
        elif answer.asked:
            notify_once(
                f"reward function {name!r} reads chat messages, and prompts and completions are strings: each acts as "
                "one message"
            )
        return answer

    def _notice(self, call: Call, table: Tensor) -> None:
        """Print notices about rows without a reward, and about functions with a constant reward."""
        for index, name in enumerate(self.names):
            given = table[:, index][~table[:, index].isnan()]
            if len(given) < 2:
                continue
            low, high = given.min().item(), given.max().item()
            before, count = self._constant[index]
            self._constant[index] = (low, count + 1 if low == before else 1) if low == high else (math.nan, 0)
            if self._constant[index][1] == CONSTANT_CALLS:
                shape = self.judges[index].messages
                hint = " Completions are lists of messages: the text is `completion[-1]['content']`." if shape else ""
                notify_once(
                    f"reward function {name!r} gave {low:g} to every row {CONSTANT_CALLS} times in a row, lately to "
                    f"{shortened(call.completions[0])}: nothing is learnt from a constant reward.{hint}"
                )
        unscored = table.isnan().all(1).nonzero()[:, 0].tolist()
        if unscored and not self._unscored_notified:
            self._unscored_notified = True
            notify_once(
                f"{len(unscored)} of {len(table)} completions have no reward, because {_all_of(self.names)} gave None: "
                f"row {unscored[0]} ({shortened(call.completions[unscored[0]])}) is the first. They are left out; give "
                "a number in at least one function to train on them"
            )

    def combine(self, table: Tensor) -> Tensor:
        """The weighted sum over functions, ignoring NaN: [rows]. NaN for a row without any reward."""
        total = (table * self.weights.to(table.device)).nansum(1)
        return total.masked_fill(table.isnan().all(1), math.nan)

    def close(self) -> None:
        """End the event loop and the worker processes; they start again when needed."""
        self._loop.close()
        self._pool.close()


_OWN_COLUMNS = ("prompt", "completion", "completion_ids", "prompts", "completions", "prompt_ids")
_SHAPES = ("strings", "chat messages")


def _weights(weights: Sequence[float] | None, count: int) -> Tensor:
    if weights is None:
        return torch.ones(count)
    weights = [float(weight) for weight in weights]
    if len(weights) != count:
        raise RewardError(f"{len(weights)} reward_weights for {count} reward functions: give one for each")
    if not all(map(math.isfinite, weights)):
        raise RewardError(f"reward_weights={weights} has a weight that is not a finite number")
    return torch.tensor(weights)


def _tokenizers(tokenizers: Any, count: int) -> list[Any]:
    if tokenizers is None:
        return [None] * count
    tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers]
    if len(tokenizers) != count:
        raise RewardError(
            f"{len(tokenizers)} reward_processing_classes for {count} reward functions: give one for each, None where "
            "it is no model"
        )
    return tokenizers


def _names_function(name: str) -> bool:
    """Whether a name is that of a function, or a misspelt one."""
    if is_function(name):
        return True
    return "/" not in name and not Path(name).exists() and bool(difflib.get_close_matches(name, REWARDS, 1))


def check(functions: Any, columns: Iterable[str] | None = None) -> None:
    """Raise `RewardError` if a named function among `functions` (one or a list) cannot be found, or if a function
    requires an argument that is not in `columns`. Loads no model."""
    for function in functions if isinstance(functions, list | tuple) else [functions]:
        if isinstance(function, str) and _names_function(function):
            function = _found(function)
        judges_itself = isinstance(function, nn.Module) or is_pipeline(function)
        if columns is not None and callable(function) and not judges_itself:
            try:
                accepted(function, dict.fromkeys([*columns, *RESERVED]))
            except Missing as error:
                raise RewardError(f"reward function {name_of(function)!r}: {error}") from None


def _found(name: str) -> Callable[..., Any]:
    try:
        return find(name)
    except ValueError as error:
        raise RewardError(str(error)) from error


def _distinct(names: Sequence[str]) -> list[str]:
    """Unique names for the log: the second `f` becomes `f_2`."""
    found: list[str] = []
    for name in names:
        unique, number = name, 2
        while unique in found:
            unique, number = f"{name}_{number}", number + 1
        found.append(unique)
    return found


def _all_of(names: Sequence[str]) -> str:
    return f"{names[0]!r}" if len(names) == 1 else f"all of {', '.join(map(repr, names))}"


# --- results ------------------------------------------------------------------------------------------------------


def _column(name: str, call: Call, values: Any) -> list[float]:
    """The checked result of a function: one finite number per row, NaN for None."""
    values = listed(values)
    if not isinstance(values, list):
        raise RewardError(
            f"reward function {name!r} returned a {type(values).__name__} ({str(values)[:60]}) instead of a list of "
            f"{len(call)} numbers, one for each completion; the first is {shortened(call.completions[0])}"
        )
    if len(values) != len(call):
        row = min(len(values), len(call) - 1)
        raise RewardError(
            f"reward function {name!r} returned {len(values)} rewards for {len(call)} completions: return one for "
            f"each, None where it does not apply (row {row} is {shortened(call.completions[row])})"
        )
    return [_number(name, call, row, value) for row, value in enumerate(values)]


def _number(name: str, call: Call, row: int, value: Any) -> float:
    if isinstance(value, list) and len(value) == 1:  # a row of a table with one column
        value = value[0]
    if value is None:
        return math.nan
    where = f"reward function {name!r}, row {row} ({shortened(call.completions[row])})"
    if not isinstance(value, numbers.Real):
        raise RewardError(f"{where}: gave {str(value)[:60]!r}, a {type(value).__name__}, instead of a number")
    if not abs(float(value)) <= LARGEST:
        raise RewardError(f"{where}: gave {value}. Return a finite number, or None where the function does not apply")
    return float(value)


@contextlib.contextmanager
def _naming(name: str, call: Call, also: str = "", judge: Any = None, seconds: float = 0.0) -> Any:
    """Turn an error of a function into a `RewardError` that names the function and the row. ImportError passes, because
    it does not depend on the row."""
    try:
        yield
    except ImportError:
        raise
    except Late as error:
        raise RewardError(
            f"reward function {name!r} {error}; the first of its {len(call)} texts is {shortened(call.completions[0])}"
            ". Make it faster, or raise reward_timeout"
        ) from None
    except Missing as error:
        raise RewardError(f"reward function {name!r}: {error}") from error
    except Exception as error:
        # To find the failing row, the call is repeated on halves of the rows.
        row = judge.first_failing(call) if isinstance(judge, Here) and seconds < SEARCHED else None
        if row is None:
            where = f", one of {len(call)} rows, the first of which is {shortened(call.completions[0])}"
            where = where if len(call) > 1 else f", row 0 ({shortened(call.completions[0])})"
        else:
            where = f", row {row} ({shortened(call.completions[row])})"
        raise RewardError(f"reward function {name!r}{where}: {error_text(error)}{also}") from error
