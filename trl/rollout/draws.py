"""Samples under way: their rows, and the tokens drawn of them that the host has not looked at yet.

`K` tokens of `R` rows, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .types import Request

Cached = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [heads, length, D]


class Prompt:
    """A prompt that was prefilled, and what its end predicts [V]."""

    def __init__(self, ids: Sequence[int], cached: Cached, logits_V: Tensor) -> None:
        self.ids, self.cached, self.logits_V = list(ids), cached, logits_V


class Row:
    """A sample under way."""

    def __init__(self, index: int, number: int, request: Request, prompt: Prompt, longest: int) -> None:
        self.request, self.number, self.prompt = index, number, prompt
        self.longest = longest if request.limit is None else min(longest, request.limit)
        self.ids: list[int] = []
        self.logps: list[float] = []
        self.finished = False
        self.uniforms = np.random.Generator(np.random.Philox(np.random.SeedSequence([*request.seed, number]))).random(
            longest
        )

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.ids)


class Draws:
    """Tokens that are drawn of the same rows, and stay on the device until they are read. `K` tokens of `R` rows."""

    def __init__(self, rows: Sequence[Row], steps: int, device: torch.device) -> None:
        self.rows, self.steps, self.device = rows, steps, device
        self.tokens: list[Tensor] = []
        self.logps: list[Tensor] = []
        # What is drawn beyond a row's longest is dropped, whatever its random numbers are.
        table_KR = np.zeros((steps, len(rows)), dtype=np.float32)
        for place, row in enumerate(rows):
            part = row.uniforms[len(row.ids) : len(row.ids) + steps]
            table_KR[: len(part), place] = part
        self.uniform_KR = on(torch.from_numpy(table_KR), device)

    @property
    def done(self) -> int:
        return len(self.tokens)

    def add(self, token_R: Tensor, logp_R: Tensor) -> None:
        self.tokens.append(token_R)
        self.logps.append(logp_R)

    def early_R1(self, least: int) -> Tensor:
        """Which rows have fewer tokens than `least`."""
        early = [[len(row.ids) + self.done < least] for row in self.rows]
        return on(torch.tensor(early), self.device)

    def read(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probs, a list of the rows' for each step. Waits for the device."""
        return torch.stack(self.tokens).tolist(), torch.stack(self.logps).tolist()


def on(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, which is not waited for."""
    return value.to(device, non_blocking=device.type == "cuda")


def by_length(rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
    """Places of the rows of each length, with their prompts and completions, [rows, length]."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.length, []).append(place)
    for group in places.values():
        yield group, torch.tensor([rows[place].prompt.ids + rows[place].ids for place in group])
