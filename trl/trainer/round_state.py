"""What a checkpoint keeps of the rounds: the steps that are still to be taken, the groups to replay, and counters.

The first rank writes what all know of the traces; every rank writes the columns of those that it holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

from trl.rollout.exchange import packed, packed_tokens, rehomed, unpacked
from trl.rollout.pack import deal
from trl.rollout.traces import TrainingTrace

_TOKENS = ("round_tokens", "replay_tokens")


def round_state(trainer: Any) -> dict[str, Any]:
    """This rank's part of the state."""
    rank, replayed = trainer.args.process_index, [] if trainer.replay is None else list(trainer.replay.groups)
    own = {"round_tokens": packed_tokens(trainer.round, rank), "replay_tokens": packed_tokens(replayed, rank)}
    if rank > 0:
        return own
    return {
        **own,
        "round": packed(trainer.round),
        "replay": packed(replayed),
        "rounds_sampled": trainer.rounds_sampled,
        "refill_position": trainer.refills.position,
    }


def joined_tokens(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of every rank, for a run on another number of ranks."""
    return {name: [each[name] for each in states] for name in _TOKENS if name in states[0]}


def load_rounds(trainer: Any, state: dict[str, Any]) -> None:
    """Restore what `round_state` returned."""
    trainer.rounds_sampled, trainer.refills.position = state.get("rounds_sampled", 0), state.get("refill_position", 0)
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    trainer.round = _steps("round", state, trainer.holders, rank)
    if trainer.replay is not None:
        groups = _steps("replay", state, lambda group: deal(group, ranks, trainer.together), rank)
        trainer.replay.groups.extend(groups)


def _steps(
    name: str, state: dict[str, Any], holders: Callable[[Sequence[TrainingTrace]], list[int]], rank: int
) -> list[list[TrainingTrace]]:
    """Steps out of a checkpoint. If another number of ranks wrote it, `holders` gives the ranks of the tokens."""
    if name not in state:
        return []
    tokens = state[f"{name}_tokens"]
    if isinstance(tokens, list):
        return rehomed(unpacked(state[name], dict(enumerate(tokens))), holders, rank)
    return unpacked(state[name], {rank: tokens})
