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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from trl.config import BaseConfig, ReferenceFields, RolloutFields, RouterFields, SequenceFields
from trl.data.batching.batches import RowBatches, StreamBatches
from trl.data.batching.collate import Tree
from trl.data.mixture import is_stream, prepare
from trl.data.reading import sources
from trl.data.tokenizing.prompts import Prompts
from trl.engine.forest import Batch, computed
from trl.engine.head import TokenStats
from trl.engine.score import score
from trl.losses.advantages import total_reward
from trl.losses.tokens import Metric, largest, smallest
from trl.models import offload
from trl.models.shards import without_ddp
from trl.models.unwrap import evaluating, unwrap
from trl.notices import notify_once
from trl.rewards.functions import RewardFunctions
from trl.rewards.functions import check as check_rewards
from trl.rollout.collect import Collected, Collector, Judge, Place, Scorer, Unjudged, refilled
from trl.rollout.completions import Table
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.exchange import delivered, packed, packed_tokens, rehomed, unpacked
from trl.rollout.filters import as_generation_config, describe
from trl.rollout.generate import InProcessSampler, stop_ids
from trl.rollout.pack import columns_of_tokens, deal, equally_many, micro_batches
from trl.rollout.rounds import (
    RefillPrompts,
    Replay,
    RoundSizes,
    StepSampler,
    evaluation_metrics,
    round_sizes,
    split_into_steps,
)
from trl.rollout.traces import Columns, ScoredTrace, TrainingTrace, grouped, trees
from trl.rollout.types import Environment, Sampler, Sampling

from . import overrides
from .attributes import shows
from .base import BaseTrainer
from .loader import BatchStream
from .reference import ReferencePolicy
from .round_metrics import round_metrics, table_rows
from .step import Step


@dataclass
class OnlineConfig(RolloutFields, ReferenceFields, RouterFields, SequenceFields, BaseConfig):
    """What all methods share that learn from the model's own completions."""

    least_generations = 1  # completions of each prompt that the method needs

    _VALID_DICT_FIELDS = [
        *BaseConfig._VALID_DICT_FIELDS,
        *("generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    def __post_init__(self) -> None:
        if self.num_generations < self.least_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: completions are compared with others of their prompt; "
                f"give {self.least_generations} or more"
            )
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation say the same thing: give one of them")
        if self.dynamic_sampling and self.max_refills < 1:
            raise ValueError(f"max_refills={self.max_refills} leaves nothing of dynamic_sampling: give 1 or more")
        if self.replay_buffer_size < 0:
            raise ValueError(f"replay_buffer_size={self.replay_buffer_size}: give a number of groups, 0 for none")
        super().__post_init__()


@shows(
    *("beta", "mask_truncated_completions", "log_completions", "log_unique_prompts", "num_completions_to_print"),
    fixed=(
        *("num_generations", "num_iterations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "generation_kwargs", "chat_template_kwargs", "shuffle_dataset"),
        "use_transformers_continuous_batching",
    ),
    continuous_batching_config="transformers_continuous_batching_config",
)
class OnlineTrainer(BaseTrainer):
    """A trainer on completions that the model samples itself and reward functions score."""

    takes_grids = False
    prepared_columns = frozenset({"prompt", "prompt_ids", "row"})
    takes_lengths = False
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
        train_dataset, eval_dataset = _opened(train_dataset), _opened(eval_dataset)
        renamed = getattr(args, "columns", None) or {}  # the names that the columns get
        for dataset in (train_dataset, *(eval_dataset.values() if type(eval_dataset) is dict else [eval_dataset])):
            if isinstance(columns := getattr(dataset, "column_names", None), list):
                check_rewards(reward_funcs, {*columns, *renamed, *renamed.values()} - self.prepared_columns)
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
        self.components = self.parts_of()
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

    # --- what a method supplies -----------------------------------------------------------------------------------

    least_generations = 1  # completions of each prompt that `credit` needs at least
    whole_groups = False  # whether a group is sampled and judged on one rank, and no step cuts it
    together = 1  # traces in turn that the loss reads in one forward pass
    needs_rewards = True  # whether the method learns nothing without reward functions

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        """The advantage of each trace, [S], fp32. Traces come in groups of `generations` of one prompt.

        Where the tokens of a trace differ, the column `advantages` of its holder has them, and the number given here is
        any that is not zero.
        """
        raise NotImplementedError

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        """Whether every coefficient of the trace is zero, so that it need not be forwarded."""
        return not trace.trained

    def parts_of(self) -> tuple[Any, ...]:
        """The parts of the trainer that have a state of their own."""
        return (self.reference,)

    def trains(self, place: int) -> bool:
        """Whether the trace at this place of its group is trained on."""
        return True

    @staticmethod
    def sizes_of_rounds(args: Any, accumulation: int) -> RoundSizes:
        return round_sizes(args, accumulation)

    def kl_in_reward(self) -> bool:
        return False

    def divergence_of(self, columns: Columns) -> float:
        """The divergence of a trace from the reference, where it is a part of the reward."""
        return kl_of_trace(columns)

    @property
    def scoring_temperature(self) -> float:
        """What logits are divided by for the log-probs that the loss reads."""
        return self.args.temperature

    def needs_reference(self) -> bool:
        return self.args.beta != 0.0

    def is_on_policy(self) -> bool:
        """Whether every step trains the policy that sampled its traces: one step a round, and nothing replayed."""
        return self.round_sizes.parts * self.args.num_iterations == 1 and not self.args.replay_buffer_size

    def is_below_fp32(self) -> bool:
        """Whether products are rounded to less than fp32, so that a sampler's log-probs differ from the engine's."""
        half = (torch.float16, torch.bfloat16)
        return (
            self.accelerator.mixed_precision != "no"
            or getattr(unwrap(self.model), "is_quantized", False)
            or any(parameter.dtype in half for parameter in self.model.parameters())
        )

    def needs_old(self) -> bool:
        """Whether the trainer computes log-probs of its own for what the sampler wrote: where a ratio is taken to them
        and the sampler's would make another one of it before anything has moved."""
        return not self.is_on_policy() and self.is_below_fp32()

    # --- what callers of upstream's trainers read -----------------------------------------------------------------

    use_vllm = False

    @property
    def rewards(self) -> Any:
        return self.collector.judge

    @property
    def sampling(self) -> Sampling:
        return self.collector.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.collector.sampling = sampling

    @property
    def sampler(self) -> Sampler:
        return self.collector.sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self.collector.sampler = sampler

    @property
    def reward_funcs(self) -> list[Any]:
        return self.rewards.functions

    @property
    def reward_func_names(self) -> list[str]:
        return list(self.rewards.names)

    @property
    def reward_weights(self) -> Tensor:
        return self.rewards.weights

    @property
    def reward_processing_classes(self) -> list[Any]:
        return [getattr(judge, "tokenizer", None) for judge in self.rewards.judges]

    @property
    def num_generations_eval(self) -> int:
        return self.args.num_generations_eval or self.args.num_generations

    @property
    def eos_token_ids(self) -> list[int]:
        return list(self.sampling.stop_ids)

    @property
    def generation_config(self) -> GenerationConfig:
        """What the sampler is asked for, as transformers writes it."""
        return as_generation_config(self.sampling, self.processing_class)

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

    def is_prepared(self, dataset: Any) -> bool:
        return False if not isinstance(dataset, Dataset) else super().is_prepared(dataset)

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
        sampling = self._sampling()
        self.collector = Collector(
            sampler=sampler or self._sampler(sampling),
            judge=judge or self._judge_of(reward_funcs, processing_classes),
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

    def _judge_of(self, reward_funcs: Any, processing_classes: Any) -> Any:
        if isinstance(reward_funcs, list) and not reward_funcs:
            for name in ("dynamic_sampling", "replay_buffer_size"):
                if getattr(self.args, name):
                    raise ValueError(f"{name} compares rewards, and there are no reward_funcs: leave it out")
            return Unjudged()
        return RewardFunctions(
            reward_funcs,
            weights=self.args.reward_weights,
            processing_classes=processing_classes,
            tokenizer=self.processing_class,
            chat=any(getattr(report, "conversational", False) for report in self.reports.values()),
            timeout=self.args.reward_timeout,
        )

    def _sampler(self, sampling: Sampling) -> Sampler:
        args = self.args
        if not args.use_transformers_continuous_batching:
            return InProcessSampler(self.processing_class, max_cache_tokens=args.max_cache_tokens)
        sampler = ContinuousSampler(
            args.transformers_continuous_batching_config, max_cache_tokens=args.max_cache_tokens
        )
        sampler.check(sampling)
        return sampler

    def _sampling(self, **asked: Any) -> Sampling:
        """What the sampler is asked for by default; `asked` are further arguments of `generate`."""
        args, tokenizer = self.args, self.processing_class
        further = {**(args.generation_kwargs or {}), **asked}
        fields = {
            "max_new_tokens": args.max_completion_length or LONGEST,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
        }
        for name in list(fields):
            if name in further:
                fields[name] = further.pop(name)
        stops = stop_ids(self.model, tokenizer) | set(_as_list(further.pop("eos_token_id", None)))
        strings = tuple(_as_list(further.pop("stop_strings", None)))
        for name in ("do_sample", "num_return_sequences", "use_cache", "pad_token_id", "bos_token_id"):
            further.pop(name, None)
        return Sampling(**fields, stop_ids=tuple(sorted(stops - {None})), stop_strings=strings, further=further)

    def report(self) -> list[str]:
        sizes, args = self.round_sizes, self.args
        lines = [line for line in super().report() if not line.startswith("steps: ")]
        lines.append(
            f"rounds: {sizes.prompts} prompts × {args.num_generations} completions each, drawn at once; trained on "
            f"in {sizes.parts} step{'s' if sizes.parts > 1 else ''} of {sizes.step} completions"
            + (f", {args.num_iterations} times" if args.num_iterations > 1 else "")
        )
        if args.dynamic_sampling:
            lines.append(f"prompts whose completions are all worth the same: others instead, {args.max_refills} times")
        if args.replay_buffer_size:
            lines.append(f"then groups of earlier rounds instead, of the last {args.replay_buffer_size} that taught")
        if self.rewards.names:
            lines.append(f"rewards: {', '.join(self.rewards.names)}")
        by = "; by transformers' continuous batching" if args.use_transformers_continuous_batching else ""
        return [*lines, f"sampling: {describe(self.sampling)}{by}"]

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None,
                        is_training: bool = False, dataloader_key: str | None = None) -> DataLoader:  # fmt: skip
        args = self.args
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        # Every rank gets the prompts of the round: the samples of one prompt may be drawn on several.
        if isinstance(dataset, IterableDataset):
            stream = StreamBatches(dataset, self.round_sizes.prompts, drop_last=args.dataloader_drop_last, forever=True)
            placeholders = StepSampler(stream, self.round_sizes.parts * args.num_iterations)
            return DataLoader(BatchStream(placeholders), batch_size=None, collate_fn=self._collate)
        rounds = RowBatches(
            len(dataset),
            self.round_sizes.prompts,
            shuffle=bool(args.shuffle_dataset) and args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        if sampler_fn is not None and overrides.is_overridden(self, "_get_train_sampler"):
            rounds = overrides.in_sampler_order(self, sampler_fn(dataset), rounds)
        self._collate.labels = overrides.reads_batches(self) is not None
        placeholders = StepSampler(rounds, self.round_sizes.parts * args.num_iterations)
        return DataLoader(dataset, batch_sampler=placeholders, collate_fn=self._collate)

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
        return functools.partial(self._scored, ask, columns)

    def _scored(
        self,
        ask: Callable[..., TokenStats],
        names: Mapping[str, str],
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[Columns],
    ) -> list[Columns]:
        """Results of a forward pass for every token of the traces."""
        blank = []
        for row, own in zip(rows, columns, strict=True):
            length = len(own["ids"])
            blank.append(TrainingTrace(int(row["row"]), row["prompt_ids"], length, 0.0, length, {"ids": own["ids"]}))
        found: list[Columns] = []
        for group in self._micro_batches(blank):
            batch = self._prepare_inputs(self._collate.to_batch(trees(group)))
            with torch.no_grad(), self.compute_loss_context_manager():
                stats = ask(batch, temperature=self.scoring_temperature)
            lengths = [each.length for each in group]
            parts = {name: getattr(stats, of).float().cpu().split(lengths) for name, of in names.items()}
            found += [{name: part[place].numpy().copy() for name, part in parts.items()} for place in range(len(group))]
        return found

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
        if args.world_size > 1:
            every: list[Any] | None = [None] * args.world_size if self.is_world_process_zero() else None
            torch.distributed.gather_object(rows, every)
            rows = [row for part in every or [] for row in part]
        if self.is_world_process_zero():
            if mode == "train":  # the places are those of the round
                rows.sort(key=lambda row: row[0])
            table = [row for _, row in rows]
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
        holders = [holder for step in steps for holder in self._holders(step)]
        rest = iter(delivered(traces, holders, self._columns(), args.device))
        return [[next(rest) for _ in step] for step in steps]

    def _columns(self) -> list[str]:
        """The columns that every trace of a round has."""
        names = ["ids", "logps", *["ref_logps"] * self.needs_reference(), *["old_logps"] * self.needs_old()]
        return [*names, *["mask"] * (self.collector.environment is not None)]

    def _holders(self, step: Sequence[TrainingTrace]) -> list[int]:
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
        groups = self._micro_batches([each for each in active if each.holder == args.process_index])
        # The step happens even if nothing has a gradient.
        batches = [self.to_batch(group) for group in groups or [[]]]
        for distinct, positions in map(computed, batches):
            self._distinct += distinct
            self._positions += positions
        self.under_way = self.begin(batches, counts, on_policy=self.is_on_policy())
        total = torch.zeros((), device=self.args.device)
        # The loss is that of the whole step already; DeepSpeed would divide it by the accumulation it was set up for.
        unscaled = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        saved = offload.on_host(model) if self.args.activation_offloading else contextlib.nullcontext()
        with self._half_products(), saved, overrides.completed(self):
            for number, batch in enumerate(self.under_way.batches):
                last = number == len(batches) - 1
                self.accelerator.sync_gradients = last  # DeepSpeed's engine steps where it is told so
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, self._prepare_inputs(batch))
                    self.accelerator.backward(loss, **unscaled)
                total += loss.detach()
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
        groups = micro_batches(traces, args.max_tokens_per_micro_batch, args.share_prompt, args.device, self.together)
        return equally_many(groups, args.world_size, args.device)

    def to_batch(self, traces: Sequence[TrainingTrace]) -> Batch:
        """Traces as a batch: under each prompt its traces, with what the loss reads of each trained token."""
        return {**self._collate.to_batch(trees(traces)), **columns_of_tokens(traces, self._columns())}

    def prediction_step(self, model: nn.Module, inputs: Batch, prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[Tensor, Any, Any]:  # fmt: skip
        # Also without rows: other ranks may have some, and wait for this one.
        traces = self.collect(inputs["rows"], self.num_generations_eval, training=False)
        found = {kind: float(count) for kind, count in self.counts_of(traces).items()}
        total = torch.zeros((), device=self.args.device)
        batches = [self.to_batch(group) for group in self._micro_batches(traces)]
        statistics = self.before_step(model, batches, training=False)
        counts = {**found, overrides.ROWS: float(len(traces))}
        counts_of_step = {kind: torch.tensor(max(n, 1.0), device=self.args.device) for kind, n in counts.items()}
        shared = {**self._of_evaluation, **statistics.shared}
        step = Step(counts_of_step, batches, False, shared, on_policy=self.is_on_policy())
        for batch in statistics.beside(batches):
            with torch.no_grad(), self.compute_loss_context_manager():
                batch = self._prepare_inputs(batch)
                if overrides.has_own_loss(self):
                    total += self.own_evaluation(model, batch, counts_of_step, batch["row_S"].shape[0])
                    continue
                sums, metrics = self.loss(model, batch, step)
            self._add("eval", {**metrics, **self.parts(sums, dict.fromkeys(sums, 0.0))})
            total += torch.stack([each / max(found[kind], 1.0) for kind, each in sums.items()]).sum()
        zero = torch.zeros((), device=self.args.device)
        if overrides.has_own_loss(self):
            self._add_own(zero, 0)  # also where this rank has no rows
        else:
            self._add("eval", self.parts(dict.fromkeys(found, zero), found))
        return total, None, None

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
        rank, replayed = self.args.process_index, [] if self.replay is None else list(self.replay.groups)
        state = {
            **super().method_state(),
            "round_tokens": packed_tokens(self.round, rank),
            "replay_tokens": packed_tokens(replayed, rank),
        }
        if rank > 0:
            return state
        return {
            **state,
            "round": packed(self.round),
            "replay": packed(replayed),
            "rounds_sampled": self.rounds_sampled,
            "refill_position": self.refills.position,
        }

    def joined_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in ("round_tokens", "replay_tokens") if name in states[0]]
        tokens: dict[str, Any] = {name: [each[name] for each in states] for name in names}
        return {**super().joined_state(states), **tokens}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self.rounds_sampled, self.refills.position = state.get("rounds_sampled", 0), state.get("refill_position", 0)
        self.round = self._resumed("round", state, self._holders)
        if self.replay is not None:
            ranks = self.args.world_size
            self.replay.groups.extend(self._resumed("replay", state, lambda group: deal(group, ranks, self.together)))

    def _resumed(
        self, name: str, state: dict[str, Any], holders: Callable[[Sequence[TrainingTrace]], list[int]]
    ) -> list[list[TrainingTrace]]:
        """Steps out of a checkpoint. If another number of ranks wrote it, `holders` gives the ranks of the tokens."""
        if name not in state:
            return []
        tokens, rank = state[f"{name}_tokens"], self.args.process_index
        if isinstance(tokens, list):
            return rehomed(unpacked(state[name], dict(enumerate(tokens))), holders, rank)
        return unpacked(state[name], {rank: tokens})


LONGEST = 512  # tokens of a completion where nobody says


def kl_of_trace(columns: Columns) -> float:
    """The divergence of a trace from the reference, as the policy's own tokens estimate it."""
    logps, own = columns.get("old_logps", columns["logps"]), columns.get("mask", slice(None))
    return float(logps[own].sum(dtype=np.float64) - columns["ref_logps"][own].sum(dtype=np.float64))


def by_policy(model: nn.Module, batch: Batch, **asked: Any) -> TokenStats:
    """A batch scored by the policy as it samples, without dropout."""
    with evaluating(model):
        return score(model, batch, **asked)


def _opened(dataset: Any) -> Any:
    """A data set given by its rows or by a path, opened, so that its columns are known before the model is; each of a
    dictionary of them."""
    if type(dataset) is dict and all(map(sources.is_data_set, dataset.values())):
        return {name: _opened(value) for name, value in dataset.items()}
    return sources.load(dataset) if isinstance(dataset, str | Path | list | dict) else dataset


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]
