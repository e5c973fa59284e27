"""How long parts of a trainer take, as trackers show it."""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TRACKERS = {"wandb": "log", "mlflow": "log_metrics", "trackio": "log"}


@contextlib.contextmanager
def profiling_context(trainer: Any, name: str) -> Iterator[None]:
    """Measure the block as `profiling/Time taken: <class of the trainer>.<name>`, in seconds.

    The first rank sends it to those of wandb, mlflow and trackio that are in `report_to`. torch.profiler shows the
    block under the same name.
    """
    args, accelerator = getattr(trainer, "args", None), getattr(trainer, "accelerator", None)
    with _measured(
        f"{type(trainer).__name__}.{name}",
        getattr(args, "report_to", None) or (),
        getattr(accelerator, "is_main_process", True),
    ):
        yield


def profiling_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    """`profiling_context` around each call of a trainer's method."""

    @functools.wraps(func)
    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        with profiling_context(self, func.__name__):
            return func(self, *args, **kwargs)

    return measured


@contextlib.contextmanager
def _measured(name: str, report_to: Sequence[str], tells: bool) -> Iterator[None]:
    import torch

    start = time.perf_counter()
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        taken = {f"profiling/Time taken: {name}": time.perf_counter() - start}
        for tracker in TRACKERS.keys() & set(report_to) if tells else ():
            package = importlib.import_module(tracker)
            if tracker != "wandb" or package.run is not None:
                getattr(package, TRACKERS[tracker])(taken)
