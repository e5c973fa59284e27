"""Callbacks for `transformers.Trainer`."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.models.shards import is_partitioned, is_sharded
from trl.models.unwrap import evaluating
from trl.notices import notify_once
from trl.rollout.completions import Table


class SyncRefModelCallback(TrainerCallback):
    """Moves `ref_model` towards the trained model every `ref_model_sync_steps` steps, with the weight
    `ref_model_mixup_alpha`; both are read from the trainer's arguments (TR-DPO, Gorbatovski et al. 2024,
    arXiv:2404.09656, equation 6).

    For your own training loops: the trainers here do it themselves with `sync_ref_model=True`. `accelerator` unwraps
    the trained model.
    """

    def __init__(self, ref_model: nn.Module, accelerator: Any = None) -> None:
        self.ref_model, self.accelerator = ref_model, accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            model = kwargs["model"]
            model = self.accelerator.unwrap_model(model) if self.accelerator is not None else model
            self.sync_target_model(model, self.ref_model, args.ref_model_mixup_alpha)

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """`target = (1 - alpha) target + alpha model`, parameter by parameter."""
        with torch.no_grad():
            for target, source in zip(target_model.parameters(), model.parameters(), strict=True):
                target.lerp_(source.to(target.device, target.dtype), alpha)


class BEMACallback(TrainerCallback):
    """Keeps a moving average of the trained weights, freed of its lag, and saves it in the folder `bema` at the end.

    With t steps taken, the average moves by `(lag + multiplier t) ** -ema_power` (at least `min_ema_multiplier`) of the
    way to the weights every `update_freq` steps, and the weights' distance from their start is added to it, times
    `(lag + multiplier t) ** -bias_power`. Before the step `update_after` nothing is averaged; there the start is taken.
    The copy is on `device`. Block and Zhang 2025, arXiv:2508.00180, algorithm 1.

    A run that is resumed begins its average anew, and says so. ValueError for sharded weights.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
    ) -> None:
        if update_freq < 1:
            raise ValueError(f"update_freq={update_freq}: give a number of steps, 1 or more")
        self.update_freq, self.ema_power, self.bias_power, self.lag = update_freq, ema_power, bias_power, lag
        self.update_after, self.multiplier, self.min_ema_multiplier = update_after, multiplier, min_ema_multiplier
        self.device = device
        self.running_model: Any = None
        self._start: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = _whole(model)
        if is_sharded(model) or is_partitioned(model):
            raise ValueError("BEMACallback keeps whole weights, and these are sharded: leave it out")
        if state.global_step:
            notify_once(f"the average of BEMACallback begins anew at step {state.global_step}")
        self.running_model = copy.deepcopy(model).to(self.device)
        self._take_start(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        since = state.global_step - self.update_after
        if since == 0:
            self._take_start(_whole(model))
        elif since > 0 and since % self.update_freq == 0:
            self._update(_whole(model), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.running_model.save_pretrained(Path(args.output_dir) / "bema")

    def _trained(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that train, in float32 on the device of the average."""
        return {
            name: weight.detach().to(self.device, torch.float32)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    def _take_start(self, model: nn.Module) -> None:
        self._start = {name: weight.clone() for name, weight in self._trained(model).items()}
        self._average = {name: weight.clone() for name, weight in self._start.items()}

    @torch.no_grad()
    def _update(self, model: nn.Module, step: int) -> None:
        age = self.lag + self.multiplier * step
        share, ahead = max(age**-self.ema_power, self.min_ema_multiplier), age**-self.bias_power
        running = dict(self.running_model.named_parameters())
        for name, weight in self._trained(model).items():
            self._average[name].lerp_(weight, share)
            running[name].copy_(self._average[name] + ahead * (weight - self._start[name]))


def _whole(model: Any) -> Any:
    """The model without wrappers for several processes; an adapter stays on."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "config") else model


class LogCompletionsCallback(TrainerCallback):
    """Writes what the model answers to prompts of the evaluation set, every `freq` steps (default: every `eval_steps`),
    as a table in the folder `completions` of the run.

    `num_prompts` are asked, the first ones (default: all); `generation_config` is that of `generate`.
    """

    def __init__(
        self, trainer: Any, generation_config: Any = None, num_prompts: int | None = None, freq: int | None = None
    ) -> None:
        self.trainer, self.generation_config, self.freq = trainer, generation_config, freq
        self.prompts = _prompts(trainer, num_prompts)
        self.table = Table(Path(trainer.args.output_dir) / "completions")
        self._latest = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.freq or state.eval_steps
        if state.global_step == self._latest or not every or state.global_step % every:
            return
        self._latest = state.global_step
        answers = _answers(self.trainer, self.prompts, self.generation_config)
        if state.is_world_process_zero:
            rows = [
                {"step": state.global_step, "mode": "eval", "prompt": _as_text(prompt), "completion": answer}
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
        self.prompts = _prompts(trainer, num_prompts)
        self.before: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            notify_once(f"eval_win_rate compares with the answers at step {state.global_step}, where the run goes on")
        self.before = _answers(self.trainer, self.prompts, self.generation_config)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.before:
            return  # before training there is nothing to compare with
        answers = _answers(self.trainer, self.prompts, self.generation_config)
        if not state.is_world_process_zero:
            return
        pairs = [list(pair) for pair in zip(self.before, answers, strict=True)]
        texts = [_as_text(prompt) for prompt in self.prompts]
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


def _prompts(trainer: Any, count: int | None) -> list[Any]:
    """The first prompts of the trainer's evaluation set, as texts or messages."""
    dataset = trainer.eval_dataset
    names = getattr(dataset, "column_names", None) or ()
    source = next((name for name in ("prompt", "prompt_ids") if name in names), None)
    if source is None:
        raise ValueError("these answers need an eval_dataset with prompts: give the trainer one with a column `prompt`")
    found = list(dataset[: len(dataset) if count is None else count][source])
    return trainer.processing_class.batch_decode(found) if source == "prompt_ids" else found


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(each["content"]) for each in prompt)


@torch.no_grad()
def _answers(trainer: Any, prompts: list[Any], generation_config: Any) -> list[str]:
    """The model's answers, written by this process alone: every rank writes the same ones."""
    model, tokenizer = _whole(trainer.model), trainer.processing_class
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
