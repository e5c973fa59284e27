"""Traces: what a policy has written after a prompt, and what is known of each of its tokens.

Of a trace every rank knows the prompt, the length, the rewards and the advantage, so that what a step trains on depends
neither on the number of ranks nor on the rank that sampled it. Its columns, arrays with one entry a token, are on one
rank alone, its holder: first the rank that sampled it, then the one that trains on it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl.data.batching.collate import Branch, Tree

# The columns that a trace can have. `mask` is True for tokens that train; without it all of them do.
COLUMNS: Mapping[str, Any] = {
    "ids": np.int32,
    "mask": np.bool_,
    "logps": np.float32,  # of the policy that sampled the token, as the sampler gives it
    "old_logps": np.float32,  # of the same policy, as the engine gives it, where the sampler's differ
    "ref_logps": np.float32,  # of the reference
    "divergences": np.float32,  # of the policy's whole distribution from the reference's
    "advantages": np.float32,  # where the tokens of a trace differ in it
    "values": np.float32,  # what a value function expects from the token on
    "returns": np.float32,  # what came of it: the target of the value function
}
Columns = dict[str, np.ndarray]


class ScoredTrace(NamedTuple):
    """A trace and its rewards. What its holder alone has is None elsewhere."""

    row: int
    prompt_ids: Any  # an int32 array, one for all traces of the prompt
    length: int  # tokens after the prompt
    trained: int  # of them trained on
    finished: bool  # it ended by itself, not because it was cut
    rewards: list[float]  # by each function; NaN where one does not apply
    kl: float  # divergence from the reference, as its own tokens estimate it; 0 where nobody asks
    holder: int
    columns: Columns | None
    version: int = 0  # optimizer steps that the policy had taken when it sampled the trace
    shown: tuple[Any, ...] | None = None  # what the table of completions shows of it, where it is written


class TrainingTrace(NamedTuple):
    """A trace ready to be trained on. What its holder alone has is None elsewhere."""

    row: int
    prompt_ids: Any  # one array for all traces of the prompt
    length: int
    advantage: float  # of every token; where tokens differ, see the column `advantages`, a number that is not 0
    trained: int  # tokens trained on; 0 where it was cut, and cut traces are not trained on
    columns: Columns | None
    holder: int = 0
    version: int = 0


def has_signal(group: Iterable[TrainingTrace]) -> bool:
    """Whether a group moves the policy: not all its advantages are zero."""
    return any(trace.advantage != 0.0 for trace in group)


def grouped(traces: Sequence[Any], generations: int) -> list[list[Any]]:
    """The traces of each prompt, which are `generations` in a row."""
    return [list(traces[start : start + generations]) for start in range(0, len(traces), generations)]


def same_prompt(one: TrainingTrace, other: TrainingTrace) -> bool:
    return one.prompt_ids is other.prompt_ids or np.array_equal(one.prompt_ids, other.prompt_ids)


def token_mask(trace: TrainingTrace) -> np.ndarray:
    """Which tokens of the trace train, [length] bool."""
    assert trace.columns is not None
    mask = trace.columns.get("mask", np.ones(trace.length, dtype=np.bool_))
    return mask & (trace.trained > 0)


def trees(traces: Sequence[TrainingTrace]) -> list[Tree]:
    """One tree for each run of traces of one prompt, in which each trace is a branch."""
    found: list[Tree] = []
    before: TrainingTrace | None = None
    for trace in traces:
        assert trace.columns is not None
        ids: Any = trace.columns["ids"]
        branch = Branch(ids, token_mask(trace).tolist(), trace.row)
        if before is not None and same_prompt(before, trace):
            found[-1] = found[-1]._replace(branches=(*found[-1].branches, branch))
        else:
            root = Branch(trace.prompt_ids, [False] * len(trace.prompt_ids))
            found.append(Tree(root, (branch,), trace.row))
        before = trace
    return found
