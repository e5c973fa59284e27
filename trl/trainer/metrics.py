"""Metrics between two log lines: added up on each rank, then over ranks in one collective.

Which metrics a rank has depends on its rows: a share may be empty, and a reward function may log on some ranks alone.
All ranks keep the same list of names, in the same order, and exchange one row for each of them, whether they have the
metric or not; so the table has the same shape everywhere. A first row says how many metrics of a rank are not on the
list. Only when some rank has one are names exchanged, and the list grows on all ranks alike.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import gather, recursively_apply
from torch import Tensor

from trl.losses.tokens import Metric

_FOLD: dict[str, Any] = {"mean": torch.add, "min": torch.minimum, "max": torch.maximum}
_ABSENT = {"mean": 0.0, "min": math.inf, "max": -math.inf}


def sums_device(device: torch.device) -> torch.device:
    """Where float64 sums of what is on a device are kept: Apple's GPUs have no float64, so there on the host."""
    return torch.device("cpu") if device.type == "mps" else device


class Totals:
    """The metrics of this rank since the last log line, and the names that all ranks have agreed on."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.agreed: dict[str, str] = {}  # name -> kind, equal on all ranks

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Totals stay on their device and counts on the host, if that is where they are: nothing waits here."""
        for name, (total, items, kind) in metrics.items():
            before = self.metrics.get(name)
            total = total.to(sums_device(total.device)).double()
            if before is not None:
                _check_kinds(name, {before.kind, kind})
                total, items = _FOLD[kind](before.total, total), before.items + items
            self.metrics[name] = Metric(total, items, kind)

    def clear(self) -> None:
        self.metrics.clear()

    def reduced(self, device: torch.device, ranks: int, **sums: float) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics over all micro-batches and ranks since the last call, and `sums` over ranks. Every rank calls it."""
        own, self.metrics, device = self.metrics, {}, sums_device(device)
        unknown = sorted((name, metric.kind) for name, metric in own.items() if name not in self.agreed)
        first = [(float(len(unknown)), 1.0), *((float(value), 1.0) for value in sums.values())]
        names = list(self.agreed)
        table = _gathered([*first, *self._rows(own, names)], device, ranks)
        if table[:, 0, 0].any():
            if ranks > 1:
                every: list[Any] = [None] * ranks
                torch.distributed.all_gather_object(every, unknown)
                unknown = sorted(set().union(*every))
            for name, kind in unknown:
                _check_kinds(name, {kind, self.agreed.setdefault(name, kind)})
            new = [name for name, _ in unknown]
            table = torch.cat([table, _gathered(self._rows(own, new), device, ranks)], 1)
            names += new
        total_R, items_R = table[:, len(first) :].unbind(2)  # one row a rank, one column a metric
        counts = items_R.sum(0).tolist()
        found = {}
        for place, (name, count) in enumerate(zip(names, counts, strict=True)):
            kind, column = self.agreed[name], total_R[:, place]
            if count:
                found[name] = float(column.sum()) / count if kind == "mean" else float(getattr(column, kind)())
        together = table[:, 1 : len(first), 0].sum(0).tolist()
        return dict(sorted(found.items())), dict(zip(sums, together, strict=True))

    def _rows(self, own: Mapping[str, Metric], names: Iterable[str]) -> list[tuple[Any, Any]]:
        return [own[name][:2] if name in own else (_ABSENT[self.agreed[name]], 0.0) for name in names]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: tuple(metric) for name, metric in self.metrics.items()}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        device = sums_device(device)
        self.metrics.update({name: Metric(total.to(device), *rest) for name, (total, *rest) in state.items()})


def _check_kinds(name: str, kinds: set[str]) -> None:
    if len(kinds) > 1:
        raise ValueError(f"the metric {name} is given as {' and as '.join(sorted(kinds))}: give it one kind")


def _gathered(rows: list[tuple[Any, Any]], device: torch.device, ranks: int) -> Tensor:
    """The rows of every rank, [ranks, rows, 2], on the host."""
    parts = [torch.as_tensor(part, dtype=torch.float64, device=device) for row in rows for part in row]
    table = torch.stack(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)
    if ranks > 1:
        every = [torch.empty_like(table) for _ in range(ranks)]
        torch.distributed.all_gather(every, table)
        table = torch.stack(every)
    return table.cpu().view(ranks, len(rows), 2)


def gather_rows(values: Any) -> Any:
    """Tensors, or containers of them, with the rows of all ranks, in the order of the ranks. Ranks may have different
    numbers of rows, or none."""

    def one(tensor: Tensor) -> Tensor:
        sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        wide = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        wide[: len(tensor)] = tensor
        parts = gather(wide).split(max(sizes)) if max(sizes) else [wide] * len(sizes)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return recursively_apply(one, values, error_on_other_type=True)
