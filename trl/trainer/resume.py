"""Checkpoints: what is written, and what a resumed run takes up."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from trl import checkpoint
from trl.models import adapters
from trl.models.unwrap import unwrap
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


def identity(trainer: Any) -> dict[str, str | None]:
    """What tells a run from others in the same folder; None for what is not known."""
    base = unwrap(trainer.model)
    name = getattr(base.config, "_name_or_path", "") if hasattr(base, "config") else ""
    own = name and Path(trainer.args.output_dir).resolve() in (Path(name).resolve(), *Path(name).resolve().parents)
    return {
        "method": trainer.method,
        "model": f"{Path(name).name} ({type(base).__name__})" if name and not own else None,
        "data": checkpoint.fingerprint(trainer.train_dataset),
    }


def folder_to_resume(trainer: Any, wanted: str | bool | None) -> Path | None:
    """The checkpoint that a run goes on from, or None for a run from the start. What lies in the output folder is
    said."""
    output_dir = Path(trainer.args.output_dir)
    if not wanted:
        if trainer.is_world_process_zero():
            for sentence in checkpoint.earlier(output_dir, trainer._run):
                notify_once(sentence)
        return None
    folder, passed = checkpoint.resolve(output_dir, wanted, trainer._run)
    for sentence in passed:
        notify_once(sentence)
    adapters.check_resumed(folder, adapters.active_config(trainer.model))
    notify_once(f"resumed from {folder}: {checkpoint.step(folder)} steps are done")
    return folder


def load_between_logs(trainer: Any, folder: Path) -> None:
    """Take up what a checkpoint keeps beyond `Trainer`'s own: totals, and the state of the method."""
    args = trainer.args
    state = rank_state(folder, args.process_index, args.world_size, trainer.joined_state)
    if state is None:
        return
    trainer._tokens_seen = state["tokens_seen"]
    trainer.load_method_state(state["method"])
    trainer._sums["train"].load(state["sums"], args.device)
    trainer._between_logs = state


class BeforeTraining(TrainerCallback):
    """Puts back what `Trainer` resets when a run is resumed. `on_train_begin` is the first call after it has."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore_between_logs()
        self.trainer._check_what_users_made(kwargs.get("train_dataloader"))
        if state.global_step >= state.max_steps:
            done = f"all {state.max_steps:,} steps are done already" if state.max_steps else "max_steps is 0"
            notify_once(f"nothing is trained: {done}. Raise max_steps or num_train_epochs to train on")

    def _restore_between_logs(self) -> None:
        trainer = self.trainer
        if trainer._between_logs is None:
            return
        state, trainer._between_logs = trainer._between_logs, None
        trainer._tr_loss = state["loss_since_log"].to(trainer.args.device)
        # The final summary is of this call's steps alone: what was already earned is taken off.
        trainer._total_loss_scalar -= trainer._tr_loss.item()
        trainer._globalstep_last_logged = state["last_logged_step"]
