"""What the methods share that learn from the model's own completions: rounds, and the optimizer step on them.

The dataloader yields one placeholder per optimizer step; the traces are filled in after the rollout, and cut into
micro-batches by a budget of tokens. Hooks of `transformers.Trainer` (5.17 to 5.23) that are overridden beyond those of
`base.py`, and why:

    _get_dataloader     yields placeholders: the prompts of a round, then nothing for the round's further steps
    get_batch_samples   a placeholder is a whole optimizer step; what it trains on is known only after the rollout
    training_step       collects traces when a round begins, then runs the micro-batches, syncing gradients on the last
    prediction_step     collects traces in evaluation
"""

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trl.data.batching.collate import Tree
from trl.data.mixture import columns_of, is_stream, prepare
from trl.data.tokenizing.prompts import Prompts
from trl.engine.forest import Batch, computed
from trl.engine.head import TokenStats
from trl.losses.advantages import total_reward
from trl.losses.tokens import Metric, largest, smallest
from trl.models import offload
from trl.models.shards import without_ddp
from trl.notices import notify_once
from trl.rewards.functions import check as check_rewards
from trl.rollout.collect import Collected, Collector, Judge, Place, Scorer, refilled
from trl.rollout.completions import Table
from trl.rollout.exchange import delivered
from trl.rollout.generate import sampling_of
from trl.rollout.pack import columns_of_tokens, deal, equally_many, micro_batches
from trl.rollout.rounds import RefillPrompts, Replay, StepSampler, evaluation_metrics, split_into_steps
from trl.rollout.traces import ScoredTrace, TrainingTrace, grouped, trees
from trl.rollout.types import Environment, Sampler, Sampling

from . import evaluation, overrides
from .attributes import shows
from .base import BaseTrainer
from .budget import passes, share_of_traces
from .constant_reward import ConstantReward
from .drawing import LONGEST, judge_of, opened, sampler_of
from .loader import rounds_of, stream_of_rounds
from .online_attributes import OnlineAttributes
from .online_method import OnlineMethod
from .reference import ReferencePolicy
from .report import round_lines
from .round_metrics import of_all_ranks, round_metrics, table_rows
from .round_state import joined_tokens, load_rounds, round_state
from .scoring import by_policy, scored
from .step import Step


@shows(
    *("beta", "mask_truncated_completions", "log_completions", "log_unique_prompts", "num_completions_to_print"),
    fixed=(
        *("num_generations", "num_iterations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "generation_kwargs", "chat_template_kwargs", "shuffle_dataset"),
        "use_transformers_continuous_batching",
    ),
    continuous_batching_config="transformers_continuous_batching_config",
)
class OnlineTrainer(OnlineAttributes, OnlineMethod, BaseTrainer):
    """A trainer on completions that the model samples itself and reward functions score."""

    collector: Collector

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        ref_model: Any = None,
        sampler: Sampler | None = None,
        environment: Environment | None = None,
        judge: Judge | None = None,
    ) -> None:
        is_judged = reward_funcs is not None and not (isinstance(reward_funcs, list | tuple) and not reward_funcs)
        if judge is None and self.needs_rewards and not is_judged:
            raise ValueError("reward_funcs is missing: give a function, a model, a name, or a list of them")
        reward_funcs = reward_funcs if is_judged and judge is None else []
        check_rewards(reward_funcs)
        skip = getattr(args, "skip_bad_rows", False)
        train_dataset, eval_dataset = opened(train_dataset, skip), opened(eval_dataset, skip)
        renamed = getattr(args, "columns", None) or {}  # the names that the columns get
        trains = train_dataset.get("train") if isinstance(train_dataset, dict) else train_dataset
        for dataset in (trains, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            if (columns := columns_of(dataset, renamed)) is not None:
                check_rewards(reward_funcs, columns - self.prepared_columns)
        if args is None:
            args = self.config_class(output_dir=f"{self.method.upper()}")
        # A placeholder is one optimizer step: so says this trainer's copy, while the user's own stays as it is.
        args = copy.copy(args)
        self.accumulation, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
        self.round_sizes = self.sizes_of_rounds(args, self.accumulation)
        self._given = reward_funcs, reward_processing_classes, sampler, environment, judge
        self.round: list[list[TrainingTrace]] = []  # the steps of the round that are still to be taken
        self.rounds_sampled = 0
        self.refills = RefillPrompts(0, args.seed)
        self.reference = ReferencePolicy(ref_model, model, is_needed=self.needs_reference)
        self.constant_reward = ConstantReward()
        self.components = (*self.parts_of(), self.constant_reward)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    # --- data -----------------------------------------------------------------------------------------------------

    def rows(self, dataset: Any, name: str) -> tuple[Any, Any]:
        args = self.args
        if is_stream(dataset) and args.dynamic_sampling and name.startswith("train"):
            raise ValueError(
                "dynamic_sampling draws further prompts from the whole data set, which a stream does not have: load it "
                "whole, or set dynamic_sampling=False"
            )
        recipe = Prompts(
            columns=args.columns,
            skip_bad_rows=args.skip_bad_rows,
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        return prepare(recipe, dataset, self.processing_class, name, args.dataset_num_proc)

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        return {"rows": list(rows)}  # a placeholder

    def on_ready(self) -> None:
        args = self.args
        if args.precompute_ref_log_probs:
            raise ValueError("precompute_ref_log_probs is for completions that are known beforehand; leave it out here")
        reward_funcs, processing_classes, sampler, environment, judge = self._given
        if environment is not None and args.use_transformers_continuous_batching:
            raise ValueError("use_transformers_continuous_batching has single turns alone: leave it out")
        sampling = self.sampling_of()
        conversational = any(getattr(each, "conversational", False) for each in self.reports.values())
        self.collector = Collector(
            sampler=sampler or sampler_of(args, self.processing_class, sampling),
            judge=judge or judge_of(args, reward_funcs, processing_classes, self.processing_class, conversational),
            sampling=sampling,
            decode=functools.partial(self.processing_class.batch_decode, skip_special_tokens=True),
            seed=args.seed,
            own_columns=self.prepared_columns,
            environment=environment,
            mask_truncated=args.mask_truncated_completions,
            divergence=self.divergence_of if self.kl_in_reward() and self.needs_reference() else None,
            keeps_texts=bool(args.log_completions),
            whole_groups=self.whole_groups,
        )
        if hasattr(self.train_dataset, "__len__"):
            self.refills.rows = len(self.train_dataset)
        self.completions = Table(Path(args.output_dir) / "completions")
        self._evaluated: list[tuple[float, list[float]]] = []  # for each prompt its mean reward and its rewards
        self.replay = Replay(args.replay_buffer_size, args.seed) if args.replay_buffer_size else None

    def sampling_of(self, **asked: Any) -> Sampling:
        """What the sampler is asked for by default; `asked` are further arguments of `generate`."""
        longest = self.args.max_completion_length or LONGEST
        return sampling_of(self.args, self.model, self.processing_class, longest, **asked)

    def report(self) -> list[str]:
        lines = [line for line in super().report() if not line.startswith("steps: ")]
        return [*lines, *round_lines(self.args, self.round_sizes, self.rewards.names, self.sampling)]

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None,
                        is_training: bool = False, dataloader_key: str | None = None) -> DataLoader:  # fmt: skip
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        prompts, turns = self.round_sizes.prompts, self.round_sizes.parts * self.args.num_iterations
        if isinstance(dataset, IterableDataset):
            return stream_of_rounds(dataset, prompts, turns, self._collate, self.args)
        rounds = rounds_of(dataset, prompts, self.args)
        if sampler_fn is not None and overrides.is_overridden(self, "_get_train_sampler"):
            rounds = overrides.in_sampler_order(self, sampler_fn(dataset), rounds)
        self._collate.labels = overrides.reads_batches(self) is not None
        return DataLoader(dataset, batch_sampler=StepSampler(rounds, turns), collate_fn=self._collate)

    # --- rounds ---------------------------------------------------------------------------------------------------

    def collect(self, rows: list[dict[str, Any]], generations: int, training: bool) -> list[TrainingTrace]:
        """Traces of the rows, judged and ready to be trained on: in training those of the round, whose columns are on
        the ranks that sampled them; in an evaluation, where a rank has rows of its own, its own."""
        mode = "train" if training else "eval"
        found = self._collected(rows, generations, training)
        if training and self.args.dynamic_sampling:
            found = self._refilled(found, generations)
        logged = {name: Metric(torch.tensor(values).sum().to(self.args.device), float(len(values)))
                  for name, values in found.logged.items()}  # fmt: skip
        self._add(mode, logged)
        advantages = self.credit(found.traces, generations).tolist() if found.traces else []
        if training:
            self.constant_reward.look(self, found.sampled)
        if found.sampled:
            self._log_round(mode, found.sampled, generations)
        if not training and found.traces and self.rewards.names:
            totals = total_reward(self.rewards_of(found.traces), self.rewards.weights).view(-1, generations)
            self._evaluated += [(float(each.nanmean()), each.tolist()) for each in totals]
        if self.args.log_completions:
            self._show(mode, found.traces, advantages)
        traces = [
            TrainingTrace(
                *(each.row, each.prompt_ids, each.length, advantage),
                each.trained if self.trains(place % generations) else 0,
                *(each.columns, each.holder, each.version),
            )
            for place, (each, advantage) in enumerate(zip(found.traces, advantages, strict=True))
        ]
        if not training or self.replay is None:
            return traces
        groups, replaced = self.replay.replace(grouped(traces, generations), self.rounds_sampled)
        self._add("train", {"groups/replayed": self._known_to_all(replaced)})
        return [each for group in groups for each in group]

    def _collected(self, rows: list[dict[str, Any]], generations: int, training: bool) -> Collected:
        """Traces by the policy as it is. Whoever samples ahead of training gives a future in place of this result."""
        args = self.args
        # Of sharded weights the wrapper gathers what no layer of its own does. DDP's would wait for the other ranks,
        # which sample other numbers of tokens, or none.
        model = without_ddp(self.model_wrapped) if training or self.is_fsdp_enabled else self.model
        ranks, rank = (args.world_size, args.process_index) if training else (1, 0)
        with self.compute_loss_context_manager():
            return self.collector.collect(
                model,
                rows,
                generations,
                version=self.state.global_step,
                number=self.rounds_sampled if training else -1,
                place=Place(rank, ranks, args.device),
                scorers=self.scorers(model),
                context={"trainer_state": self.state},
            )

    def _refilled(self, first: Collected, generations: int) -> Collected:
        def has_signal(traces: Sequence[ScoredTrace]) -> list[bool]:
            return self.credit(traces, generations).view(-1, generations).any(1).tolist()

        found, idle = refilled(
            first,
            generations,
            self.args.max_refills,
            self.refills,
            lambda rows: self._collected([self.train_dataset[row] for row in rows], generations, training=True),
            has_signal,
        )
        prompts, wanted = len(found.sampled) // generations, len(found.traces) // generations
        if idle:
            notify_once(
                f"dynamic_sampling: {wanted - idle} of {wanted} groups have completions of different worth after "
                f"{prompts} prompts were drawn; the round goes on with them (see the metric `groups/idle`)"
            )
        self._add("train", {"groups/drawn": self._known_to_all(len(found.sampled) / generations),
                            "groups/idle": self._known_to_all(idle)})  # fmt: skip
        return found

    def scorers(self, model: nn.Module) -> list[Scorer]:
        """Forward passes that give every trace further columns: log-probs of the reference, and of the policy where
        those of the sampler are not the engine's."""
        found = []
        if self.needs_reference():
            found.append(self.scorer(self.reference.ask(model), {"ref_logps": "logp_N"}))
        if self.needs_old():
            found.append(self.scorer(functools.partial(by_policy, model), {"old_logps": "logp_N"}))
        return found

    def scorer(self, ask: Callable[..., TokenStats], columns: Mapping[str, str]) -> Scorer:
        """A forward pass by `ask`; `columns` says which of its results becomes which column."""
        return functools.partial(scored, self, ask, columns)

    def rewards_of(self, traces: Sequence[ScoredTrace]) -> Tensor:
        """The reward of each trace by each function, [S, F]; NaN where one does not apply."""
        return torch.tensor([each.rewards for each in traces]).view(len(traces), len(self.rewards.names))

    def kl_of(self, traces: Sequence[ScoredTrace]) -> Tensor | None:
        """The divergence of each trace from the reference, [S], where rewards take it off; 0 of what does not train."""
        if self.collector.divergence is None:
            return None
        return torch.tensor([each.kl if each.trained else 0.0 for each in traces])

    def _known_to_all(self, value: float | Tensor, mode: str = "train", items: float = 1.0) -> Metric:
        """A metric identical on all ranks: only rank 0 contributes it in training. In an evaluation it is the mean of
        `items` of this rank's batch."""
        value = torch.as_tensor(value, dtype=torch.float32)
        weight = items if mode == "eval" else float(self.args.process_index == 0)
        weight *= bool(torch.isfinite(value))
        return Metric(value.nan_to_num(0.0).to(self.args.device) * weight, weight)

    def _log_round(self, mode: str, traces: Sequence[ScoredTrace], generations: int) -> None:
        names, device = self.rewards.names, self.args.device
        means, ranges = round_metrics(
            traces, self.rewards_of(traces), self.rewards.weights, names, generations, self.kl_of(traces)
        )
        self._add(mode, {f"completions/{end}_{what}": fold(values.to(device)) for what, values in ranges.items()
                         for end, fold in (("min", smallest), ("max", largest))})  # fmt: skip
        self._add(mode, {name: self._known_to_all(value, mode, items) for name, (value, items) in means.items()})

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Lengths of the completions that ended are 0 where none did, as upstream logs them."""
        names = [f"completions/{what}_terminated_length" for what in ("mean", "min", "max")]
        found = super().derived(means)
        if "completions/mean_length" in means:
            found |= {name: 0.0 for name in names if name not in means}
        return found

    def _show(self, mode: str, traces: Sequence[ScoredTrace], advantages: Sequence[float]) -> None:
        """The table of completions, written by the first rank; every rank brings the texts that it has."""
        args, step = self.args, self.state.global_step
        rows = table_rows(traces, advantages, self.rewards.names, step, mode)
        table = of_all_ranks(rows, args.world_size, in_order=mode == "train")  # the places are those of the round
        if self.is_world_process_zero():
            self.completions.write(table, step, mode)
            weights = dict(zip(self.rewards.names, self.rewards.weights.tolist(), strict=True))
            self.completions.show(table, step, args.num_completions_to_print, args.log_unique_prompts, weights)

    # --- the step -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        placeholders = [each for _, each in zip(range(num_batches), epoch_iterator, strict=False)]
        if any("rows" not in each for each in placeholders):
            raise ValueError(
                f"get_train_dataloader of your own returned batches, but {type(self).__name__} draws its rounds of "
                "prompts itself: override _get_train_sampler for an order of prompts, or sort the data set and set "
                "shuffle_dataset=False"
            )
        return placeholders, None

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        started = time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if inputs["rows"]:
            traces = self.collect(inputs["rows"], self.args.num_generations, training=True)
            self.rounds_sampled += 1
            group = self.args.num_generations if self.whole_groups else 1
            steps = split_into_steps(traces, self.round_sizes.parts, group)
            self.round = self._dealt(steps) * self.args.num_iterations
        traces, self.round = self.round[0], self.round[1:]
        loss = self.train_on(model, traces)
        seconds = torch.tensor(time.perf_counter() - started, device=self.args.device)
        self._add("train", {"step_time": Metric(seconds, 1.0)})
        return loss

    def _dealt(self, steps: list[list[TrainingTrace]]) -> list[list[TrainingTrace]]:
        """The steps with the columns of each trace on the rank that trains on it."""
        args = self.args
        if args.world_size == 1:
            return steps
        traces = [each for step in steps for each in step]
        holders = [holder for step in steps for holder in self.holders(step)]
        rest = iter(delivered(traces, holders, self._columns(), args.device))
        return [[next(rest) for _ in step] for step in steps]

    def _columns(self) -> list[str]:
        """The columns that every trace of a round has."""
        names = ["ids", "logps", *["ref_logps"] * self.needs_reference(), *["old_logps"] * self.needs_old()]
        return [*names, *["mask"] * (self.collector.environment is not None)]

    def holders(self, step: Sequence[TrainingTrace]) -> list[int]:
        """The rank that trains on each trace of a step; -1 for those of weight zero, whose columns nobody reads."""
        active = [place for place, each in enumerate(step) if not self.has_no_gradient(each)]
        holders = deal([step[place] for place in active], self.args.world_size, self.together)
        found = [-1] * len(step)
        for place, rank in zip(active, holders, strict=True):
            found[place] = rank
        return found

    def train_on(self, model: nn.Module, traces: list[TrainingTrace]) -> Tensor:
        """The backward passes of one optimizer step over this rank's share of the traces, in micro-batches of a token
        budget. The loss of the step: scalar."""
        args = self.args
        counts = {kind: torch.tensor(max(n, 1.0), device=args.device) for kind, n in self.counts_of(traces).items()}
        active = [each for each in traces if not self.has_no_gradient(each)]
        if traces:
            self._add("train", {"frac_samples_skipped": self._known_to_all(1 - len(active) / len(traces))})
        if args.process_index == 0:
            self._tokens_seen += sum(each.length for each in traces)
            prompts = {id(each.prompt_ids): each.prompt_ids for each in traces}
            self._tokens_seen += sum(map(len, {tuple(prompt) for prompt in prompts.values()}))
        counts[overrides.ROWS] = torch.tensor(max(float(len(active)), 1.0), device=args.device)
        mine = [each for each in active if each.holder == args.process_index]

        def take(alone: bool) -> Tensor:
            # The step happens even if nothing has a gradient.
            batches = [self.made_of(group) for group in self._micro_batches(mine) or [[]]]
            self.under_way = self.begin(batches, counts, on_policy=self.is_on_policy())
            return passes(self, model, self.under_way.batches, None, alone)

        saved = offload.on_host(model) if self.args.activation_offloading else contextlib.nullcontext()
        with self._half_products(), saved, overrides.completed(self):
            total = self.budget.whole(self, model, take)
        assert self.under_way is not None
        for distinct, positions in map(computed, self.under_way.batches):
            self._distinct += distinct
            self._positions += positions
        return total

    def rows_of_a_step(self) -> int:
        return self.round_sizes.step

    def counts_of(self, traces: Sequence[TrainingTrace]) -> dict[str, float]:
        """How many items of each kind the loss is averaged over; traces that are not forwarded count too."""
        longest = self.args.max_completion_length or LONGEST
        tokens = sum(each.trained for each in traces)
        return {"sequences": len(traces), "tokens": tokens, "budget": len(traces) * longest}

    def _micro_batches(self, traces: Sequence[TrainingTrace]) -> list[list[TrainingTrace]]:
        """Traces of one forward pass each; as many groups on every rank, empty ones among them."""
        args = self.args
        groups = micro_batches(traces, self.budget.tokens, args.share_prompt, args.device, self.together)
        self.budget.shares = [share_of_traces(group, self.together) for group in groups]
        return equally_many(groups, args.world_size, args.device)

    def made_of(self, traces: Sequence[TrainingTrace]) -> Batch:
        """Traces as a batch: under each prompt its traces, with what the loss reads of each trained token."""
        return {**self._collate.to_batch(trees(traces)), **columns_of_tokens(traces, self._columns())}

    def prediction_step(self, model: nn.Module, inputs: Batch, prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[Tensor, Any, Any]:  # fmt: skip
        # Also without rows: other ranks may have some, and wait for this one.
        traces = self.collect(inputs["rows"], self.num_generations_eval, training=False)
        found = {kind: float(count) for kind, count in self.counts_of(traces).items()}
        total = self.budget.fitted(self, "eval", lambda: self._evaluated_on(model, traces, found))
        zero = torch.zeros((), device=self.args.device)
        if overrides.has_own_loss(self):
            evaluation.add_own(self, zero, 0)  # also where this rank has no rows
        else:
            self._add("eval", evaluation.parts(dict.fromkeys(found, zero), found))
        return total, None, None

    def _evaluated_on(self, model: nn.Module, traces: list[TrainingTrace], found: dict[str, float]) -> Tensor:
        """The loss of the traces, `found` of each kind, which is also added to the sums of the evaluation."""
        total = torch.zeros((), device=self.args.device)
        batches = [self.made_of(group) for group in self._micro_batches(traces)]
        statistics = self.before_step(model, batches, training=False)
        counts = {**found, overrides.ROWS: float(len(traces))}
        counts_of_step = {kind: torch.tensor(max(n, 1.0), device=self.args.device) for kind, n in counts.items()}
        shared = {**self._of_evaluation, **statistics.shared}
        step = Step(counts_of_step, batches, False, shared, on_policy=self.is_on_policy())
        for batch in statistics.beside(batches):
            with torch.no_grad(), self.compute_loss_context_manager():
                batch = self._prepare_inputs(batch)
                if overrides.has_own_loss(self):
                    total += evaluation.own_evaluation(self, model, batch, counts_of_step, batch["row_S"].shape[0])
                    continue
                sums, metrics = self.loss(model, batch, step)
            self._add("eval", {**metrics, **evaluation.parts(sums, dict.fromkeys(sums, 0.0))})
            total += torch.stack([each / max(found[kind], 1.0) for kind, each in sums.items()]).sum()
        return total

    def evaluation_loop(self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
                        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> Any:  # fmt: skip
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        judged = gather_object(self._evaluated)
        for name, value in evaluation_metrics(judged, self.args.pass_threshold).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return {**super().method_state(), **round_state(self)}

    def joined_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().joined_state(states), **joined_tokens(states)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        load_rounds(self, state)
