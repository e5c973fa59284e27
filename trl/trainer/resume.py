"""Checkpoints: what is written, and what a resumed run takes up."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import rotate_checkpoints

from trl import checkpoint
from trl.notices import notify_once

RANK_STATE = "trl_state_{rank}.pt"


def save_checkpoint(trainer: Any, trial: Any) -> None:
    """Write a checkpoint beside its place, and publish it when it is whole.

    Every rank takes part. It keeps what `Trainer` keeps, and what it forgets between two log lines.
    """
    run_dir = Path(trainer._get_output_dir(trial))
    final = run_dir / f"checkpoint-{trainer.state.global_step}"
    if trainer.hp_search_backend is None and trial is None:
        trainer.store_flos()
    if trainer.args.should_save:
        checkpoint.begin(final)
    trainer.accelerator.wait_for_everyone()
    staging = str(checkpoint.staging_folder(final))
    os.makedirs(staging, exist_ok=True)  # another node's disk

    trainer.save_model(staging, _internal_call=True)
    if trainer.state.best_global_step:
        best = run_dir / f"checkpoint-{trainer.state.best_global_step}"
        if best == final or best.exists():
            trainer.state.best_model_checkpoint = str(best)
    if not trainer.args.save_only_model:
        trainer._save_optimizer_and_scheduler(staging)
        trainer._save_scaler(staging)
        trainer._save_rng_state(staging)
        torch.save(
            {
                "tokens_seen": trainer._tokens_seen,
                "sums": trainer._sums["train"].state(),
                "loss_since_log": trainer._tr_loss,
                "last_logged_step": trainer._globalstep_last_logged,
                "method": trainer.method_state(),
            },
            os.path.join(staging, RANK_STATE.format(rank=trainer.args.process_index)),
        )
    if trainer.args.should_save:
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if hasattr(callback, "state") and type(callback).__name__ in trainer.state.stateful_callbacks:
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        trainer.state.save_to_json(os.path.join(staging, "trainer_state.json"))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        facts = {"run": trainer._run, "started": trainer._started}
        checkpoint.publish(final, step=trainer.state.global_step, world_size=trainer.args.world_size, **facts)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=False,
        )
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(final))


def rank_state(
    folder: Path, rank: int, ranks: int, joined: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any] | None:
    """The state that this rank goes on with, of those that the ranks wrote into a checkpoint; None where there is none.

    If another number of ranks wrote it, `joined` makes one state of the method out of theirs.
    """
    world = checkpoint.manifest(folder).get("world_size")
    if world is None:
        return None  # another library's checkpoint
    paths = [folder / RANK_STATE.format(rank=each) for each in range(world)]
    if not all(path.exists() for path in paths):
        notify_once(f"{folder.name} holds the model alone: the optimizer, the counters and the data order start afresh")
        return None
    same = world == ranks
    wanted = sorted({0, rank}) if same else range(world)
    states = [torch.load(paths[each], map_location="cpu", weights_only=True) for each in wanted]
    if same:
        state = states[-1]
        state["method"] = {**states[0]["method"], **state["method"]}
        return state
    notify_once(f"{folder.name} was written by {world} processes and is resumed by {ranks}")
    state = states[0]
    state["method"] = joined([each["method"] for each in states])
    state["tokens_seen"] = sum(each["tokens_seen"] for each in states) * (rank == 0)
    state["sums"] = {}
    state["loss_since_log"] = torch.stack([each["loss_since_log"] for each in states]).mean()
    return state
