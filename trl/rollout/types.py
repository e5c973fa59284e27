"""What samplers are asked for and what they give: token ids in, token ids and log-probs out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Every field is in force as it stands: a model's own generation config adds nothing.

    Logits are divided by `temperature` (0: the most likely token is taken); then `top_k` (0: all), `top_p`, `min_p` and
    `repetition_penalty` as transformers' logits processors have them. `stop_ids` end a completion and belong to it;
    `stop_strings` end it with the token that completes one of them. `further` holds other arguments of `generate`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    further: dict[str, Any] = field(default_factory=dict)


class Request(NamedTuple):
    """So many completions of one prompt, numbered from `first` on. `seed` and the number name the random numbers of a
    sample, whatever batch it is in, so that ranks can share the samples of a prompt."""

    prompt_ids: Sequence[int]
    samples: int
    seed: tuple[int, ...]
    first: int = 0


class Completion(NamedTuple):
    """One sample: its token ids, and the log-prob of each in the model's distribution at that temperature, as the
    engine gives it: what filters (top-k, top-p, penalties) do to it is not in there.

    `finished` says that it ended by itself, not because `max_new_tokens` was reached.
    """

    ids: list[int]
    logps: list[float]
    finished: bool


class Sampler(Protocol):
    """What draws completions: in this process, or elsewhere."""

    def generate(self, model: nn.Module, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`samples` completions of each request, in the order of the requests."""
        ...
