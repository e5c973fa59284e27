"""The progress of a run: a bar and a table of the metrics that matter in a terminal, else a line for each log entry."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import psutil
import torch
from rich import get_console
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.errors import LiveError
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from trl import screen
from trl.methods import METHODS, Method

from .summary import commands, summary

PAUSE_S = 0.1  # the shortest time between two drawings of the bar
SHORTEST, LONGEST = 6, 50  # columns of the bar itself
NARROW = 110  # columns of a terminal below which the table has fewer of its own
NOTEBOOK = "NotebookProgressCallback"  # its module cannot be imported without IPython
OF_RUN = frozenset({"epoch", "total_flos", "step"})


class RichProgressCallback(ProgressCallback, PrinterCallback):
    """Shows how a run goes, on the first process alone.

    In a terminal: a bar, and above it a table of the metrics of `METHODS`' row, with their course; `log_all` in the
    trainer's config shows all. What is printed meanwhile goes above both. Elsewhere, and with `disable_tqdm`, each log
    entry is a line of `key=value`. At the end of training `trl.trainer.summary` sums the run up.

    `trainer` is whose data and method are told of; our trainers set it. `console` is where to draw (default: stdout).
    """

    def __init__(self, trainer: Any = None, console: Console | None = None) -> None:
        super().__init__()
        self.trainer, self._console = trainer, console
        self.history: dict[str, list[float]] = {}
        self.live: Live | None = None
        self.beside_table = False  # whether transformers' table of a notebook shows the metrics
        self.tells_commands = True  # whether the summary says how to go on; the command line says it itself
        self._folded = contextlib.ExitStack()
        self._began = self._drawn = self._since_log = self._stepped = time.monotonic()
        self._first_step = 0
        self._tokens: int | None = None
        self._rate: float | None = None
        self._evaluated: tuple[int, int] | None = None  # batches of the evaluation under way: done, and in all

    @property
    def console(self) -> Console:
        return self._console or get_console()

    def patterns(self) -> tuple[str, ...]:
        """The metrics that matter for the method."""
        return METHODS.get(getattr(self.trainer, "method", ""), _ANY).metrics

    def picked(self, logs: Mapping[str, Any], log_all: bool) -> dict[str, Any]:
        """What is shown of a log entry: the metrics that matter, in training and evaluation; all of an entry that has
        none of them."""
        shown = {name: value for name, value in logs.items() if name not in OF_RUN}
        if log_all:
            return shown
        found: dict[str, Any] = {}
        for pattern in self.patterns():
            names = [name for name in shown if _matches(name, pattern)]
            # One reward function's own mean is the reward.
            if "*" not in pattern or len(names) > 1:
                found |= {name: shown[name] for name in names}
        return found or shown

    # --- events ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._began = self._since_log = self._stepped = time.monotonic()
        self._first_step, self._rate = state.global_step, None
        self._tokens = None if state.global_step else 0
        self.history = {}
        for entry in state.log_history:
            self._remember(entry)
        if screen.is_terminal(self.console) and not args.disable_tqdm and not self.beside_table:
            self._open()
        if self.live is not None:
            self._draw(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = time.monotonic()
        self._draw_in_time(args, state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.live is not None:
            done = self._evaluated[0] + 1 if self._evaluated else 1
            self._evaluated = (done, len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else 0)
            self._draw_in_time(args, state)
        elif screen.is_terminal(self.console) and not args.disable_tqdm and not self.beside_table:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = None
        # Tokens per second are those of training.
        self._since_log += time.monotonic() - max(self._stepped, self._since_log)
        super().on_evaluate(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.beside_table:
            return
        logs = logs or {}
        self._remember(logs)
        trains = "loss" in logs
        if trains:
            self._measure(logs.get("num_tokens"))
        if self.live is None:
            print(screen.key_values(self.line(args, state, logs)), flush=True)
            return
        if not trains and "train_runtime" not in logs:
            print(screen.key_values(self.line(args, state, logs)), flush=True)
        self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.live is not None:
            self._draw(args, state)
            self.close()
            self.console.print()
        seconds = time.monotonic() - self._began
        found = summary(self.trainer, args, state, self.patterns()[0], seconds, state.global_step - self._first_step)
        if self.tells_commands:
            found |= commands(self.trainer, args)
        screen.paragraphs(self.console, found)

    # --- what is shown --------------------------------------------------------------------------------------------

    def line(self, args: Any, state: Any, logs: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a line of `key=value`."""
        steps = f"{state.global_step}/{state.max_steps}" if state.max_steps > 0 else state.global_step
        found = {"step": steps}
        if "epoch" in logs:
            found["epoch"] = logs["epoch"]
        found |= self.picked(logs, getattr(args, "log_all", False))
        if "loss" in logs:
            if self._rate is not None:
                found["tokens_per_second"] = round(self._rate)
            found["memory_gb"] = round(memory_gb(args.device), 2)
            if (left := self._left(state)) is not None:
                found["left"] = screen.duration(left)
        return found

    def _remember(self, logs: Mapping[str, Any]) -> None:
        for name, value in logs.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("train_"):
                self.history.setdefault(name, []).append(float(value))

    def _measure(self, tokens: int | None) -> None:
        """Tokens per second since the last entry."""
        now = time.monotonic()
        if tokens is not None and self._tokens is not None:
            self._rate = (tokens - self._tokens) / max(now - self._since_log, 1e-9)
        self._tokens, self._since_log = tokens, now

    def _left(self, state: Any) -> float | None:
        """Seconds until the last step, if steps take as long as those of this call have."""
        done = state.global_step - self._first_step
        if done < 1 or state.max_steps <= 0:
            return None
        return (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)

    def _draw_in_time(self, args: Any, state: Any) -> None:
        if self.live is not None and time.monotonic() - self._drawn >= PAUSE_S:
            self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        assert self.live is not None
        self._drawn = time.monotonic()
        facts = [f"epoch {state.epoch:.2f}"] if state.epoch is not None else []
        first = next((name for name in self.patterns() if name in self.history), None)
        headline = f"{first} {screen.number(self.history[first][-1])}" if first is not None else ""
        rate = f"{self._rate:,.0f} tokens/s" if self._rate is not None else ""
        left = self._left(state)
        ends = "" if left is None else f"{screen.duration(left)} left"
        if state.global_step >= state.max_steps:
            ends = f"{screen.duration(time.monotonic() - self._began)} in all"
        memory = f"{memory_gb(args.device):.1f} GB"
        bar = Bar(state.global_step, state.max_steps, [*facts, headline, rate, memory, ends], self._evaluated)
        names = self.picked(self.history, getattr(args, "log_all", False)) if self.history else ()
        self.live.update(Group(Courses({name: self.history[name] for name in names}), bar), refresh=True)

    # --- the terminal ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        live = Live(console=self.console, auto_refresh=False)  # a thread of its own would meet the forks of workers
        original = (sys.stdout, sys.stderr)
        try:
            live.start()
        except LiveError:  # up to rich 14: something of the user's own is drawn already
            return
        self.live = live
        self._folded.enter_context(_without_bars())
        self._folded.enter_context(_handlers_above(original))

    def close(self) -> None:
        """Give the terminal back, also where a run was broken off."""
        self._folded.close()
        if self.live is not None:
            self.live.stop()
        self.live = None


class Bar:
    """The last line: steps, a bar, and those of the facts that the width has room for. Facts at the front go first."""

    def __init__(self, step: int, steps: int, facts: list[str], evaluated: tuple[int, int] | None) -> None:
        self.step, self.steps, self.facts, self.evaluated = step, steps, [each for each in facts if each], evaluated

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        start = f"step {self.step:,}/{self.steps:,}"
        if self.evaluated is not None:
            done, batches = self.evaluated
            start += f", evaluating {done:,}" + (f"/{batches:,}" if batches else "")
        facts = list(self.facts)
        room = options.max_width - len(start) - 2
        while facts and room - sum(len(each) + 2 for each in facts) < SHORTEST:
            facts.pop(0)
        width = min(max(room - sum(len(each) + 2 for each in facts), 0), LONGEST)
        bar = ProgressBar(max(self.steps, 1), self.step, width=width)
        grid = Table.grid(*([""] * (len(facts) + 2)), padding=(0, 2, 0, 0))
        grid.add_row(Text(start, style="bold"), bar, *facts)
        yield grid


class Courses:
    """The table of metrics: the first and the last value, the change, and a sparkline."""

    def __init__(self, metrics: Mapping[str, list[float]]) -> None:
        self.metrics = metrics

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.metrics:
            return
        wide = options.max_width >= NARROW
        blocks = screen.blocks_of(options)
        columns = ["first", "last", "change", *(["lowest", "highest"] if wide else [])]
        room = max(console.height - 6, 3)
        shown = dict(list(self.metrics.items())[:room])
        name_width = min(max(map(len, ["", *shown])), options.max_width // 2)
        course = max(min(options.max_width - name_width - 11 * len(columns) - 4, 80), 4)
        grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        grid.add_column("", max_width=name_width, no_wrap=True, overflow="ellipsis")
        for name in columns:
            grid.add_column(name, justify="right", min_width=9, no_wrap=True)
        grid.add_column("trend", no_wrap=True)
        for name, values in shown.items():
            numbers = [screen.number(values[0]), screen.number(values[-1]), screen.change(values[-1] - values[0])]
            if wide:
                known = [each for each in values if math.isfinite(each)] or [math.nan]
                numbers += [screen.number(min(known)), screen.number(max(known))]
            grid.add_row(name, *numbers, Text(screen.sparkline(values, course, blocks), style="cyan"))
        yield grid
        if len(self.metrics) > room:
            yield Text(f"and {len(self.metrics) - room} more, for which the window is too low", style="dim")


_ANY = Method("", "", "", "")


def _matches(name: str, pattern: str) -> bool:
    """Whether a metric is of the pattern, in training or in an evaluation, also of a named set of rows."""
    return any(fnmatchcase(name, each) for each in (pattern, f"eval_{pattern}", f"eval_*_{pattern}"))


def memory_gb(device: torch.device) -> float:
    """The most memory that this process has held on the accelerator; on a CPU, what it holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The bars of transformers (a checkpoint written) would stand in ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _handlers_above(streams: tuple[Any, Any]) -> Iterator[None]:
    """Log handlers write to today's stdout and stderr, which are above the bar, and not to those they have kept."""
    stdout, stderr = streams
    names = [*logging.root.manager.loggerDict]
    handlers = [each for name in [None, *names] for each in logging.getLogger(name).handlers]
    moved = []
    for handler in handlers:
        if type(handler) is logging.StreamHandler and handler.stream in streams:
            moved.append((handler, handler.stream))
            handler.setStream(sys.stdout if handler.stream is stdout else sys.stderr)
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def install(trainer: Any) -> RichProgressCallback:
    """Put our progress in the place of transformers' own; callbacks that users gave stay.

    In a notebook transformers' table stays, and ours sums the run up alone.
    """
    handler = trainer.callback_handler
    default = handler.callbacks[-1]  # `Trainer` adds it last
    ours = next((each for each in handler.callbacks if isinstance(each, RichProgressCallback)), None)
    if type(default) in (ProgressCallback, PrinterCallback):
        handler.callbacks.pop()
    if ours is None:
        ours = RichProgressCallback()
        handler.add_callback(ours)
    ours.trainer, ours.beside_table = trainer, type(default).__name__ == NOTEBOOK
    return ours
