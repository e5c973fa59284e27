"""The protocols of samplers and environments: token ids in, token ids and log-probs out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. A model's own generation config adds nothing to these fields.

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
    """Completions of one prompt, as many as `samples`, numbered from `first` on.

    `seed` and the number name the random numbers of a sample, whatever batch it is in, so that ranks can share the
    samples of a prompt. `limit` is the longest completion in tokens where it is less than that of the sampling.
    """

    prompt_ids: Sequence[int]
    samples: int
    seed: tuple[int, ...]
    first: int = 0
    limit: int | None = None


class Completion(NamedTuple):
    """One sample: its token ids, and the log-prob of each in the model's distribution at that temperature, as the
    engine gives it: what filters (top-k, top-p, penalties) do to it is not in there.

    `finished` says that it ended by itself, not because `max_new_tokens` was reached.
    """

    ids: list[int]
    logps: list[float]
    finished: bool


class Sampler(Protocol):
    """Writes completions, in this process or elsewhere."""

    def sync(self, model: nn.Module, version: int) -> None:
        """Take over the weights of the policy, which has taken `version` optimizer steps."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`samples` completions of each request, in the order of the requests."""
        ...


class Episode(Protocol):
    """One trace's conversation with an environment."""

    def step(self, ids: list[int]) -> list[int] | None:
        """What follows the tokens written so far (the environment's own among them), as tokens up to where the policy
        goes on; None ends the trace."""
        ...


class Environment(Protocol):
    """Answers the policy. Without an environment, a trace ends with its first turn."""

    def start(self, row: Mapping[str, Any]) -> Episode:
        """A new episode for a row of the data."""
        ...
