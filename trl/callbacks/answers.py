"""Callbacks on what the model answers: a table of answers, and how often a judge prefers them."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trl.models.unwrap import evaluating
from trl.notices import notify_once
from trl.rollout.completions import Table

from .weights import whole


class LogCompletionsCallback(TrainerCallback):
    """Writes what the model answers to prompts of the evaluation set, every `freq` steps (default: every `eval_steps`),
    as a table in the folder `completions` of the run.

    `num_prompts` are asked, the first ones (default: all); `generation_config` is that of `generate`.
    """

    def __init__(
        self, trainer: Any, generation_config: Any = None, num_prompts: int | None = None, freq: int | None = None
    ) -> None:
        self.trainer, self.generation_config, self.freq = trainer, generation_config, freq
        self.prompts = prompts_of(trainer, num_prompts)
        self.table = Table(Path(trainer.args.output_dir) / "completions")
        self._latest = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.freq or state.eval_steps
        if state.global_step == self._latest or not every or state.global_step % every:
            return
        self._latest = state.global_step
        answers = answers_of(self.trainer, self.prompts, self.generation_config)
        if state.is_world_process_zero:
            rows = [
                {"step": state.global_step, "mode": "eval", "prompt": as_text(prompt), "completion": answer}
                for prompt, answer in zip(self.prompts, answers, strict=True)
            ]
            self.table.write(rows, state.global_step, "eval")


class WinRateCallback(TrainerCallback):
    """Logs, at each evaluation, how often a judge prefers the model's answer to its answer before training
    (`eval_win_rate`), with `use_soft_judge` also the mean of the judge's probabilities (`eval_avg_win_prob`).

    `judge` is a pairwise judge (`trl.BasePairwiseJudge`). Where it has no preference, a win counts half. The other
    arguments are those of `LogCompletionsCallback`.
    """

    def __init__(
        self,
        judge: Any,
        trainer: Any,
        generation_config: Any = None,
        num_prompts: int | None = None,
        shuffle_order: bool = True,
        use_soft_judge: bool = False,
    ) -> None:
        self.judge, self.trainer, self.generation_config = judge, trainer, generation_config
        self.shuffle_order, self.use_soft_judge = shuffle_order, use_soft_judge
        self.prompts = prompts_of(trainer, num_prompts)
        self.before: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            notify_once(f"eval_win_rate compares with the answers at step {state.global_step}, where the run goes on")
        self.before = answers_of(self.trainer, self.prompts, self.generation_config)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.before:
            return  # before training there is nothing to compare with
        answers = answers_of(self.trainer, self.prompts, self.generation_config)
        if not state.is_world_process_zero:
            return
        pairs = [list(pair) for pair in zip(self.before, answers, strict=True)]
        texts = [as_text(prompt) for prompt in self.prompts]
        if self.use_soft_judge:
            firsts = self.judge.judge(texts, pairs, self.shuffle_order, return_scores=True)
            wins = [1.0 if each < 0.5 else 0.5 if each == 0.5 else 0.0 for each in firsts]
        else:
            verdicts = self.judge.judge(texts, pairs, self.shuffle_order)
            wins = [0.5 if each == -1 else float(each) for each in verdicts]
        if len(wins) != len(pairs):
            raise ValueError(f"the judge gave {len(wins)} verdicts for {len(pairs)} prompts")
        found = {"eval_win_rate": sum(wins) / len(wins)}
        if self.use_soft_judge:
            found["eval_avg_win_prob"] = 1 - sum(firsts) / len(firsts)
        self.trainer.log(found)


def prompts_of(trainer: Any, count: int | None) -> list[Any]:
    """The first prompts of the trainer's evaluation set, as texts or messages."""
    dataset = trainer.eval_dataset
    names = getattr(dataset, "column_names", None) or ()
    source = next((name for name in ("prompt", "prompt_ids") if name in names), None)
    if source is None:
        raise ValueError("these answers need an eval_dataset with prompts: give the trainer one with a column `prompt`")
    found = list(dataset[: len(dataset) if count is None else count][source])
    return trainer.processing_class.batch_decode(found) if source == "prompt_ids" else found


def as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(each["content"]) for each in prompt)


@torch.no_grad()
def answers_of(trainer: Any, prompts: list[Any], generation_config: Any) -> list[str]:
    """The model's answers, written by this process alone: every rank writes the same ones."""
    model, tokenizer = whole(trainer.model), trainer.processing_class
    size, found = trainer.args.per_device_eval_batch_size, []
    rows = [
        tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)
        if not isinstance(each, str)
        else tokenizer(each)["input_ids"]
        for each in prompts
    ]
    pad = tokenizer.pad_token_id
    how = copy.deepcopy(generation_config or model.generation_config)
    how.pad_token_id = pad
    with evaluating(model), trainer.accelerator.autocast():
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            wide = max(map(len, batch))
            ids = torch.tensor([[pad] * (wide - len(each)) + each for each in batch], device=trainer.args.device)
            mask = torch.tensor([[0] * (wide - len(each)) + [1] * len(each) for each in batch], device=ids.device)
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            found += tokenizer.batch_decode(drawn[:, wide:], skip_special_tokens=True)
    return found
