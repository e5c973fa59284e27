"""Dictionaries of tensors and numbers, functions by name, and tables in the terminal."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.compat.words import older_words

WANDB_PADDING = -1  # fills up the shorter ones of stacked statistics

# --- dictionaries of tensors ----------------------------------------------------------------------------------------


def split_tensor_dict(tensor_dict: Mapping[str, Tensor | None], num_chunks: int) -> list[dict[str, Tensor | None]]:
    """Cut the tensors along their first dimension into `num_chunks` parts of equal size; what is left over is dropped.

    None and scalars are in every part.
    """
    rows = next((len(each) for each in tensor_dict.values() if each is not None and each.dim()), None)
    if rows is None:
        raise ValueError("there is no tensor with rows to split")
    size = rows // num_chunks
    return [
        {
            name: each if each is None or not each.dim() else each[part * size : (part + 1) * size]
            for name, each in tensor_dict.items()
        }
        for part in range(num_chunks)
    ]


@older_words(tensor_dict="seq_dict")
def shuffle_sequence_dict(seq_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of tensors and lists, all in one random order of torch's generator; None stays."""
    rows = next((len(each) for each in seq_dict.values() if each is not None), 0)
    order = torch.randperm(rows)

    def shuffled(each: Any) -> Any:
        if each is None:
            return None
        return each[order.to(each.device)] if isinstance(each, Tensor) else [each[row] for row in order.tolist()]

    return {name: shuffled(each) for name, each in seq_dict.items()}


def flatten_dict(nested: Mapping[Any, Any], sep: str = "/") -> dict[str, Any]:
    """A dictionary without inner ones: `{"a": {"b": 1}}` is `{"a/b": 1}`. An empty inner one leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}{sep}{inner}": each for inner, each in flatten_dict(value, sep).items()})
        else:
            flat[str(key)] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """For each key the flattened tensors of all dictionaries, [dictionaries, longest], filled up with -1."""
    rows = torch.nn.utils.rnn.pad_sequence
    return {
        key: rows([each[key].flatten() for each in stats_dicts], batch_first=True, padding_value=WANDB_PADDING)
        for key in stats_dicts[0]
    }


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary with numbers in the place of scalar tensors."""
    return {key: each.item() if isinstance(each, Tensor) and not each.dim() else each for key, each in stats.items()}


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary with numpy arrays in the place of tensors, bfloat16 as float32, and floats in that of scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return float(value) if getattr(value, "ndim", None) == 0 else value

    return {key: plain(value) for key, value in stats_dict.items()}


def remove_none_values(example: Any) -> Any:
    """A list or a mapping without those keys whose value is None, in inner lists and mappings too."""
    if isinstance(example, list):
        return [remove_none_values(each) if isinstance(each, dict | list) else each for each in example]
    if isinstance(example, Mapping):
        return {
            key: remove_none_values(each) if isinstance(each, dict | list) else each
            for key, each in example.items()
            if each is not None
        }
    raise TypeError(f"{type(example).__name__} is neither a list nor a mapping")


# --- small ones -----------------------------------------------------------------------------------------------------


def identity(x: Any) -> Any:
    """What it is given."""
    return x


def exact_div(a: int, b: int, custom_error_message: str = "") -> int:
    """`a // b`. Raises `ValueError` if something is left over."""
    if a % b:
        raise ValueError(f"{custom_error_message + ', ' if custom_error_message else ''}{a} / {b} = {a / b} is inexact")
    return a // b


def strtobool(val: str) -> bool:
    """The meaning of yes, true, t, y, on, 1 and of no, false, f, n, off, 0. Raises `ValueError` for other words."""
    word = val.strip().lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"{val!r} means neither yes nor no: write true or false")


def get_callable_name(func: Callable[..., Any]) -> str:
    """The name of a function, of the function inside a `functools.partial`, or of the class of a callable object."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def is_async_callable(func: Callable[..., Any]) -> bool:
    """Whether a call returns a coroutine: of a function, a `functools.partial` or a callable object."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(type(func), "__call__", None))  # noqa: B004


def compute_accuracy(eval_pred: Any) -> dict[str, float]:
    """The share of right answers, for `compute_metrics` of a reward trainer or of one that classifies tokens.

    Predictions [B, 2] are scores of chosen and rejected: right where the first is higher; equal ones are left out, with
    a notice. Predictions [B, T, classes] are compared with labels [B, T], except where these are -100.
    """
    import numpy

    from trl.notices import notify_once

    predictions, labels = (numpy.asarray(each) for each in eval_pred)
    if predictions.ndim == 3:
        counted = labels != -100
        return {"accuracy": float((predictions.argmax(-1) == labels)[counted].mean())}
    decided = predictions[:, 0] != predictions[:, 1]
    if not decided.all():
        notify_once(f"{(~decided).sum()} of {len(decided)} pairs have equal scores and are left out of the accuracy")
    return {"accuracy": float((predictions.argmax(-1) == labels)[decided].mean())}


# --- tables ---------------------------------------------------------------------------------------------------------


def print_prompt_completions_sample(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float] | None,
    step: int,
    num_samples: int | None = None,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Print prompts, completions (texts or messages), their rewards and advantages as a table in the terminal.

    `num_samples` rows are drawn at random (None: all). `extra` are further columns.
    """
    import random

    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for title in ("Prompt", "Completion", *(extra or {})):
        table.add_column(title, style="bright_yellow" if title == "Prompt" else "bright_green")
    numbers = {**rewards, **({} if advantages is None else {"Advantage": advantages})}
    for title in numbers:
        table.add_column(title, justify="right")
    rows = list(range(len(prompts)))
    if num_samples is not None:
        if num_samples <= 0:
            return
        rows = sorted(random.sample(rows, min(num_samples, len(rows))))
    for row in rows:
        texts = [_text(each[row]) for each in (prompts, completions, *(extra or {}).values())]
        values = [each[row] for each in numbers.values()]
        table.add_row(*map(Text, texts), *("" if value is None else f"{value:.2f}" for value in values))
    Console().print(Panel(table, expand=False, title=f"Step {step}", border_style="bold white"))


def print_rich_table(df: Any) -> None:
    """Print a pandas data frame as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    for column in df.columns:
        table.add_column(str(column))
    for row in df.itertuples(index=False):
        table.add_row(*map(str, row))
    Console().print(table)


def _text(value: Any) -> str:
    """A text, or the messages of a conversation with their roles."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "\n\n".join(f"{message.get('role', '')}\n{_content(message)}" for message in value)
    return str(value)


def _content(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return "\n".join(str(part) for part in (message.get("content"), calls) if part not in (None, "", []))
