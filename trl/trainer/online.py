"""What the methods share that learn from the model's own completions: drawing, judging, and the step itself.

What `transformers.Trainer` takes for a batch is one optimizer step here: it is a ticket, and the step cuts what it
trains on into micro-batches by itself, by a budget of tokens. Hooks of `transformers.Trainer` (5.17 to 5.23) that are
overridden beyond those of `base.py`, and why:

    _get_dataloader     the loader yields tickets: the prompts of a round of drawing, then nothing for its further steps
    get_batch_samples   a ticket is a whole optimizer step; what it trains on is known only once it is drawn
    training_step       draws and judges when a round begins, then runs the micro-batches, syncing gradients on the last
    prediction_step     draws and judges in evaluation
"""

import contextlib
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
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
from trl.data.report import PromptReport
from trl.data.tokenizing.prompts import Prompts
from trl.engine.forest import Batch, computed
from trl.engine.head import TokenStats
from trl.engine.score import score
from trl.losses.advantages import total_reward, without_spread
from trl.losses.tokens import Metric, largest, smallest
from trl.models import offload
from trl.models.shards import without_ddp
from trl.models.unwrap import causal_lm, evaluating
from trl.notices import notify_once
from trl.rewards.functions import RewardFunctions
from trl.rewards.functions import check as check_rewards
from trl.rollout.completions import Table
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.exchange import delivered, gathered, packed, packed_tokens, rehomed, unpacked
from trl.rollout.generate import InProcessSampler, describe, stop_ids
from trl.rollout.rounds import (
    RefillPrompts,
    Replay,
    ScoredTrace,
    StepSampler,
    Tokens,
    TrainingTrace,
    deal,
    evaluation_metrics,
    grouped,
    round_sizes,
    same_prompt,
    split_into_steps,
    trees,
)
from trl.rollout.types import Completion, Request, Sampler, Sampling
from trl.trainer.reference import ReferencedTrainer

from . import overrides
from .attributes import shows
from .base import BatchStream

# Tokens of a forward pass. On a CPU the time of a step is flat from here on (within a tenth), and memory is not.
BUDGET = {"cpu": 1024, "default": 16384}


@dataclass
class OnlineConfig(RolloutFields, ReferenceFields, RouterFields, SequenceFields, BaseConfig):
    """What all methods share that learn from the model's own completions."""

    _VALID_DICT_FIELDS = [
        *BaseConfig._VALID_DICT_FIELDS,
        *("generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: completions are compared with others of their prompt; "
                "give 2 or more"
            )
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation say the same thing: give one of them")
        if self.dynamic_sampling and self.max_refills < 1:
            raise ValueError(f"max_refills={self.max_refills} leaves nothing of dynamic_sampling: give 1 or more")
        if self.replay_buffer_size < 0:
            raise ValueError(f"replay_buffer_size={self.replay_buffer_size}: give a number of groups, 0 for none")
        super().__post_init__()


@shows(
    *("mask_truncated_completions", "log_completions", "log_unique_prompts", "num_completions_to_print"),
    fixed=(
        *("num_generations", "num_iterations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "generation_kwargs", "chat_template_kwargs", "shuffle_dataset"),
        "use_transformers_continuous_batching",
    ),
    continuous_batching_config="transformers_continuous_batching_config",
)
class OnlineTrainer(ReferencedTrainer):
    """A trainer on completions that the model draws itself and reward functions judge."""

    ref_columns = ()
    prepared_columns = frozenset({"prompt", "prompt_ids", "row"})
    takes_lengths = False
    sampler: Sampler

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
    ) -> None:
        if reward_funcs is None or (isinstance(reward_funcs, list | tuple) and not reward_funcs):
            raise ValueError("reward_funcs is missing: give a function, a model, a name, or a list of them")
        check_rewards(reward_funcs)
        train_dataset, eval_dataset = _opened(train_dataset), _opened(eval_dataset)
        renamed = getattr(args, "columns", None) or {}  # the names that the columns get
        for dataset in (train_dataset, *(eval_dataset.values() if type(eval_dataset) is dict else [eval_dataset])):
            if isinstance(columns := getattr(dataset, "column_names", None), list):
                check_rewards(reward_funcs, {*columns, *renamed, *renamed.values()} - self.prepared_columns)
        if args is None:
            args = self.config_class(output_dir=f"{self.method.upper()}")
        # One ticket is one optimizer step: so says this trainer's copy, while the user's own stays as it is.
        args = copy.copy(args)
        self.accumulation, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
        self.numbers = round_sizes(args, self.accumulation)
        self._reward_funcs, self._reward_processing_classes = reward_funcs, reward_processing_classes
        self.round: list[list[TrainingTrace]] = []  # what is left of the round, step by step
        self.rounds_drawn = 0
        self.refill_position = 0  # in the order of `RefillPrompts`
        super().__init__(
            model,
            ref_model,
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

    def advantages(self, rewards_SF: Tensor, weights_F: Tensor, generations: int, kl_S: Tensor | None) -> Tensor:
        """The advantage of each completion, [S], of groups of `generations`; `kl_S` is that to the reference."""
        raise NotImplementedError

    def is_idle(self, sample: TrainingTrace) -> bool:
        """Whether every coefficient of the sample is zero, so that it need not be forwarded."""
        return False

    def kl_in_reward(self) -> bool:
        return False

    def needs_reference(self) -> bool:
        return self.args.beta != 0.0

    def is_on_policy(self) -> bool:
        """Whether the policy that is trained is the one that drew the samples."""
        return self.numbers.parts * self.args.num_iterations == 1 and not self.args.replay_buffer_size

    def is_below_fp32(self) -> bool:
        """Whether products are rounded to less than fp32, so that a sampler's log-probs differ from the engine's."""
        half = (torch.float16, torch.bfloat16)
        return (
            self.accelerator.mixed_precision != "no"
            or getattr(causal_lm(self.model), "is_quantized", False)
            or any(parameter.dtype in half for parameter in self.model.parameters())
        )

    def needs_old(self) -> bool:
        """Whether the trainer computes log-probs of its own for what the sampler drew: where a ratio is taken to them
        and the sampler's would make another one of it before anything has moved."""
        return not self.is_on_policy() and self.is_below_fp32()

    # --- what callers of upstream's trainers read -----------------------------------------------------------------

    use_vllm = False

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
        asked, tokenizer = self.sampling, self.processing_class
        return GenerationConfig(
            max_new_tokens=asked.max_new_tokens,
            do_sample=asked.temperature > 0,
            temperature=asked.temperature if asked.temperature > 0 else None,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            eos_token_id=self.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            stop_strings=list(asked.stop_strings) or None,
            **asked.further,
        )

    # --- data -----------------------------------------------------------------------------------------------------

    def rows(self, dataset: Any, name: str) -> tuple[Dataset, PromptReport]:
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
    def batch(rows: Sequence[Any], lay: Callable[[list[Tree]], Batch]) -> Batch:
        return {"rows": list(rows)}

    def ready(self) -> None:
        args = self.args
        if args.precompute_ref_log_probs:
            raise ValueError("precompute_ref_log_probs is for completions that are known beforehand; leave it out here")
        super().ready()
        talk = any(getattr(report, "conversational", False) for report in self.reports.values())
        self.rewards = RewardFunctions(
            self._reward_funcs,
            weights=args.reward_weights,
            processing_classes=self._reward_processing_classes,
            tokenizer=self.processing_class,
            chat=talk,
            timeout=args.reward_timeout,
        )
        self.sampling = self._sampling()
        self.sampler = self._sampler()
        self.table = Table(Path(args.output_dir) / "completions")
        self._totals: list[tuple[float, list[float]]] = []  # of an evaluation: for each prompt its total rewards
        self.replay = Replay(args.replay_buffer_size, args.seed) if args.replay_buffer_size else None

    def _sampler(self) -> Sampler:
        args = self.args
        if not args.use_transformers_continuous_batching:
            return InProcessSampler(self.processing_class, max_cache_tokens=args.max_cache_tokens)
        sampler = ContinuousSampler(
            args.transformers_continuous_batching_config, max_cache_tokens=args.max_cache_tokens
        )
        sampler.check(self.sampling)
        return sampler

    def _sampling(self) -> Sampling:
        args, tokenizer = self.args, self.processing_class
        further = dict(args.generation_kwargs or {})
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
        numbers, args = self.numbers, self.args
        lines = [line for line in super().report() if not line.startswith("steps: ")]
        lines.append(
            f"rounds: {numbers.prompts} prompts × {args.num_generations} completions each, drawn at once; trained on "
            f"in {numbers.parts} step{'s' if numbers.parts > 1 else ''} of {numbers.step} completions"
            + (f", {args.num_iterations} times" if args.num_iterations > 1 else "")
        )
        if args.dynamic_sampling:
            lines.append(f"prompts whose completions are all worth the same: others instead, {args.max_refills} times")
        if args.replay_buffer_size:
            lines.append(f"then groups of earlier rounds instead, of the last {args.replay_buffer_size} that taught")
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
            stream = StreamBatches(dataset, self.numbers.prompts, drop_last=args.dataloader_drop_last, forever=True)
            tickets = StepSampler(stream, self.numbers.parts * args.num_iterations)
            return DataLoader(BatchStream(tickets), batch_size=None, collate_fn=self._collate)
        rounds = RowBatches(
            len(dataset),
            self.numbers.prompts,
            shuffle=bool(args.shuffle_dataset) and args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        if sampler_fn is not None and overrides.is_overridden(self, "_get_train_sampler"):
            rounds = overrides.in_sampler_order(self, sampler_fn(dataset), rounds)
        self._collate.labels = overrides.reads_batches(self) is not None
        tickets = StepSampler(rounds, self.numbers.parts * args.num_iterations)
        return DataLoader(dataset, batch_sampler=tickets, collate_fn=self._collate)

    # --- drawing and judging --------------------------------------------------------------------------------------

    def _draw(self, rows: list[dict[str, Any]], generations: int, training: bool) -> list[TrainingTrace]:
        """Completions of the rows, judged and ready to be trained on: in training those of the round, whose tokens are
        on the ranks that drew them; in an evaluation, where a rank has rows of its own, its own."""
        mode = "train" if training else "eval"
        drawn = everything = self._judged(rows, generations, training)
        if training and self.args.dynamic_sampling:
            drawn, everything = self._refilled(drawn, generations)
        advantages = self._advantages(drawn, generations).tolist()
        if everything:
            self._log_round(mode, everything, generations)
        if not training and drawn:
            totals = total_reward(*self._rewards(drawn)).view(-1, generations)
            self._totals += [(float(each.nanmean()), each.tolist()) for each in totals]
        if self.args.log_completions:
            self._keep(mode, drawn, advantages)
        samples = [self._sample(*each) for each in zip(drawn, advantages, strict=True)]
        return self._replayed(samples, generations) if training and self.replay is not None else samples

    def _sample(self, each: ScoredTrace, advantage: float) -> TrainingTrace:
        return TrainingTrace(
            each.row, each.prompt_ids, each.length, advantage, self._is_trained(each), each.tokens, each.holder
        )

    def _is_trained(self, each: ScoredTrace) -> bool:
        return each.finished or not self.args.mask_truncated_completions

    def _judged(self, rows: list[dict[str, Any]], generations: int, training: bool) -> list[ScoredTrace]:
        """Completions of the rows, and what they are worth. In training every rank has all rows, draws its part of the
        completions, and learns the numbers of the others'."""
        args = self.args
        # Of sharded weights the wrapper gathers what no layer of its own does. DDP's would wait for the other ranks,
        # which draw other numbers of tokens, or none.
        model = without_ddp(self.model_wrapped) if training or self.is_fsdp_enabled else self.model
        ranks, rank = (args.world_size, args.process_index) if training else (1, 0)
        shares = np.array_split(np.arange(len(rows) * generations), ranks)
        samples: dict[int, list[int]] = {}
        for place, sample in (divmod(number, generations) for number in shares[rank].tolist()):
            samples.setdefault(place, []).append(sample)
        number = self.rounds_drawn if training else -1
        requests = [
            Request(rows[place]["prompt_ids"], len(own), (args.seed, number + 1, int(rows[place]["row"])), own[0])
            for place, own in samples.items()
        ]
        with self.compute_loss_context_manager():
            groups = self.sampler.generate(model, requests, self.sampling)
        completions = [completion for group in groups for completion in group]
        of_row = [rows[place] for place, own in samples.items() for _ in own]
        texts: list[str] = []
        if completions:
            texts = self.processing_class.batch_decode([each.ids for each in completions], skip_special_tokens=True)
        rewards_SF, extra = self._ask_rewards("train" if training else "eval", of_row, completions, texts)
        tokens = [Tokens(*_arrays(each)) for each in completions]
        if self.needs_reference():
            ref = self._logps(self.ask_reference(model), of_row, tokens)
            tokens = [each._replace(ref_logps=logps) for each, logps in zip(tokens, ref, strict=True)]
        if self.needs_old():
            old = self._logps(self.ask_policy(model), of_row, tokens)
            tokens = [each._replace(old_logps=logps) for each, logps in zip(tokens, old, strict=True)]
        numbers = np.zeros((len(tokens), 3 + len(self.rewards.names)))
        for own, (each, completion) in enumerate(zip(tokens, completions, strict=True)):
            numbers[own, :3] = len(each.ids), completion.finished, self._divergence(each)
        numbers[:, 3:] = rewards_SF.numpy()
        if ranks > 1:
            numbers = gathered(numbers, [len(each) for each in shares], args.device)
        shown: list[Any] = [None] * len(tokens)
        if args.log_completions:
            shown = [(row["prompt"], *rest) for row, *rest in zip(of_row, texts, extra, strict=True)]
        prompts = [np.asarray(row["prompt_ids"], dtype=np.int32) for row in rows]
        held = dict(zip(shares[rank].tolist(), zip(tokens, shown, strict=True), strict=True))
        holders = [holder for holder, share in enumerate(shares) for _ in share]
        drawn = []
        for number, ((length, finished, kl, *rewards), holder) in enumerate(
            zip(numbers.tolist(), holders, strict=True)
        ):
            place, own = number // generations, held.get(number, (None, None))
            drawn.append(
                ScoredTrace(
                    int(rows[place]["row"]), prompts[place], int(length), bool(finished), rewards, kl, holder, *own
                )
            )
        return drawn

    def _divergence(self, tokens: Tokens) -> float:
        """The divergence of a completion from the reference, as its own tokens estimate it, where the reward takes it
        off."""
        if not (self.kl_in_reward() and self.needs_reference()):
            return 0.0
        logps = tokens.logps if tokens.old_logps is None else tokens.old_logps
        return float(logps.sum(dtype=np.float64) - tokens.ref_logps.sum(dtype=np.float64))

    def _ask_rewards(self, mode: str, rows: list[dict[str, Any]], completions: list[Completion],
                     texts: list[str]) -> tuple[Tensor, list[dict[str, Any]]]:  # fmt: skip
        """The rewards of this rank's completions, [S, F], and what the functions want to see beside each."""
        extra: list[dict[str, Any]] = [{} for _ in rows]
        if not rows:  # a rank may have none
            return torch.zeros(0, len(self.rewards.names)), extra

        def keep(name: str, values: Sequence[Any]) -> None:
            for own, value in zip(extra, values, strict=True):
                own[name] = value

        logged: dict[str, list[float]] = defaultdict(list)
        prompts = [row["prompt"] for row in rows]
        replies: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        rewards_SF = self.rewards.score(
            prompts,
            replies,
            [each.ids for each in completions],
            {name: [row[name] for row in rows] for name in rows[0] if name not in self.prepared_columns},
            trainer_state=self.state,
            log_extra=keep,
            log_metric=lambda name, value: logged[name].append(float(value)),
        )
        self._add(mode, {name: Metric(torch.tensor(values).sum().to(self.args.device), float(len(values)))
                         for name, values in logged.items()})  # fmt: skip
        return rewards_SF, extra

    def _rewards(self, drawn: Sequence[ScoredTrace]) -> tuple[Tensor, Tensor]:
        """Of each completion by each function, [S, F], and the weights of the functions, [F]."""
        names = len(self.rewards.names)
        return torch.tensor([each.rewards for each in drawn]).view(-1, names), self.rewards.weights

    def _kl(self, drawn: Sequence[ScoredTrace]) -> Tensor | None:
        """The divergence of each completion from the reference, [S]; of what is not trained on, none."""
        if not (self.kl_in_reward() and self.needs_reference()):
            return None
        return torch.tensor([each.kl if self._is_trained(each) else 0.0 for each in drawn])

    def _advantages(self, drawn: Sequence[ScoredTrace], generations: int) -> Tensor:
        return self.advantages(*self._rewards(drawn), generations, self._kl(drawn)) if drawn else torch.zeros(0)

    def _refilled(self, drawn: list[ScoredTrace], generations: int) -> tuple[list[ScoredTrace], list[ScoredTrace]]:
        """The round with further prompts drawn in place of those whose completions all have the same advantage, and
        everything that was drawn. DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476, section 3.2)."""
        args, wanted = self.args, len(drawn) // generations
        everything: list[ScoredTrace] = []
        kept: list[list[ScoredTrace]] = []
        dull: list[list[ScoredTrace]] = []
        prompts = RefillPrompts(len(self.train_dataset), args.seed, self.refill_position)
        for refills in range(args.max_refills + 1):
            everything += drawn
            moves = self._advantages(drawn, generations).view(-1, generations).any(1).tolist()
            for group, moving in zip(grouped(drawn, generations), moves, strict=True):
                (kept if moving else dull).append(group)
            missing = wanted - len(kept) if refills < args.max_refills else 0
            rows = prompts.take(missing, {each.row for each in everything})
            if not rows:
                break
            drawn = self._judged([self.train_dataset[row] for row in rows], generations, training=True)
        self.refill_position = prompts.position
        groups = (kept + dull)[:wanted]
        if len(kept) < wanted:
            notify_once(
                f"dynamic_sampling: {len(kept)} of {wanted} groups have completions of different worth after "
                f"{len(everything) // generations} prompts were drawn; the round goes on with them (see the metric "
                "`groups/idle`)"
            )
        self._add("train", {"groups/drawn": self._once(len(everything) / generations),
                            "groups/idle": self._once(max(0, wanted - len(kept)))})  # fmt: skip
        return [each for group in groups for each in group], everything

    def _replayed(self, samples: list[TrainingTrace], generations: int) -> list[TrainingTrace]:
        assert self.replay is not None
        groups, replaced = self.replay.replace(grouped(samples, generations), self.rounds_drawn)
        self._add("train", {"groups/replayed": self._once(replaced)})
        return [each for group in groups for each in group]

    def _once(self, value: float | Tensor, mode: str = "train", items: float = 1.0) -> Metric:
        """A number that all ranks know in training: only the first adds it. In an evaluation it is the mean of as many
        `items` of this rank's batch."""
        value = torch.as_tensor(value, dtype=torch.float32)
        weight = items if mode == "eval" else float(self.args.process_index == 0)
        weight *= bool(torch.isfinite(value))
        return Metric(value.nan_to_num(0.0).to(self.args.device) * weight, weight)

    def _logps(self, ask: Callable[..., TokenStats], rows: list[Any], drawn: list[Tokens]) -> list[np.ndarray]:
        """Log-probs of every token of the completions under the model that `ask` calls."""
        blank = [
            TrainingTrace(int(row["row"]), row["prompt_ids"], len(each.ids), 0.0, True, each)
            for row, each in zip(rows, drawn, strict=True)
        ]
        found: list[np.ndarray] = []
        for group in self._together(self._micro_batches(blank)):
            batch = self._prepare_inputs(self._collate.lay(trees(group)))
            with torch.no_grad(), self.compute_loss_context_manager():
                stats = ask(batch, temperature=self.args.temperature)
            parts = stats.logp_N.float().cpu().split([each.length for each in group])
            found += [part.numpy().copy() for part in parts]
        return found

    def ask_reference(self, model: nn.Module) -> Callable[..., TokenStats]:
        reference = self.reference
        assert reference is not None
        return lambda batch, **asked: reference.score(model, batch, **asked)

    def ask_policy(self, model: nn.Module) -> Callable[..., TokenStats]:
        def ask(batch: Batch, **asked: Any) -> TokenStats:
            with evaluating(model):
                return score(model, batch, **asked)

        return ask

    def _log_round(self, mode: str, drawn: Sequence[ScoredTrace], generations: int) -> None:
        """Metrics of all that was drawn, under upstream's names: in training of all ranks, in an evaluation of this."""
        rewards_SF, weights_F = self._rewards(drawn)
        total_S = total_reward(rewards_SF, weights_F)
        numbers = {"reward": total_S.nanmean(), "reward_std": _std(total_S)}
        items: dict[str, float] = {"reward": int((~total_S.isnan()).sum())}  # those of the others: completions
        for index, name in enumerate(self.rewards.names):
            numbers[f"rewards/{name}/mean"] = rewards_SF[:, index].nanmean()
            items[f"rewards/{name}/mean"] = int((~rewards_SF[:, index].isnan()).sum())
            numbers[f"rewards/{name}/std"] = _std(rewards_SF[:, index])
        numbers["frac_reward_zero_std"] = without_spread(rewards_SF, weights_F, generations).float().mean()
        lengths = torch.tensor([float(each.length) for each in drawn])
        ended = torch.tensor([each.finished for each in drawn])
        for what, values in (("length", lengths), ("terminated_length", lengths[ended])):
            if len(values):
                numbers[f"completions/mean_{what}"] = values.mean()
                items[f"completions/mean_{what}"] = len(values)
            # Equal on all ranks in training, where it does not matter how often they are looked at.
            values = values.to(self.args.device)
            self._add(mode, {f"completions/min_{what}": smallest(values), f"completions/max_{what}": largest(values)})
        numbers["completions/clipped_ratio"] = (~ended).float().mean()
        kl_S = self._kl(drawn)
        if kl_S is not None:
            numbers["kl"] = kl_S.sum() / lengths.sum().clamp(min=1)
            items["kl"] = float(lengths.sum())
        self._add(mode, {name: self._once(value, mode, items.get(name, len(drawn))) for name, value in numbers.items()})

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Lengths of the completions that ended are 0 where none did, as upstream logs them."""
        names = [f"completions/{what}_terminated_length" for what in ("mean", "min", "max")]
        found = super().derived(means)
        if "completions/mean_length" in means:
            found |= {name: 0.0 for name in names if name not in means}
        return found

    def _keep(self, mode: str, drawn: Sequence[ScoredTrace], advantages: Sequence[float]) -> None:
        """The table of completions, written by the first rank; every rank brings the texts that it has."""
        rows = [
            (place, self._table_row(mode, each, advantage))
            for place, (each, advantage) in enumerate(zip(drawn, advantages, strict=True))
            if each.shown is not None
        ]
        if self.args.world_size > 1:
            every: list[Any] | None = [None] * self.args.world_size if self.is_world_process_zero() else None
            torch.distributed.gather_object(rows, every)
            rows = [row for part in every or [] for row in part]
        if self.is_world_process_zero():
            if mode == "train":  # the places are those of the round
                rows.sort(key=lambda row: row[0])
            table = [row for _, row in rows]
            self.table.write(table, self.state.global_step, mode)
            self.table.show(
                table, self.state.global_step, self.args.num_completions_to_print, self.args.log_unique_prompts
            )

    def _table_row(self, mode: str, each: ScoredTrace, advantage: float) -> dict[str, Any]:
        assert each.shown is not None
        prompt, text, extra = each.shown
        return {
            "step": self.state.global_step,
            "mode": mode,
            "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
            "completion": text,
            **dict(zip(self.rewards.names, each.rewards, strict=True)),
            "advantage": advantage,
            **extra,
        }

    # --- the step -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        tickets = [ticket for _, ticket in zip(range(num_batches), epoch_iterator, strict=False)]
        if any("rows" not in ticket for ticket in tickets):
            raise ValueError(
                f"get_train_dataloader of your own returned batches, but {type(self).__name__} draws its rounds of "
                "prompts itself: override _get_train_sampler for an order of prompts, or sort the data set and set "
                "shuffle_dataset=False"
            )
        return tickets, None

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        started = time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if inputs["rows"]:
            samples = self._draw(inputs["rows"], self.args.num_generations, training=True)
            self.rounds_drawn += 1
            self.round = self._dealt(split_into_steps(samples, self.numbers.parts)) * self.args.num_iterations
        samples, self.round = self.round[0], self.round[1:]
        loss = self._learn(model, samples)
        seconds = torch.tensor(time.perf_counter() - started, device=self.args.device)
        self._add("train", {"step_time": Metric(seconds, 1.0)})
        return loss

    def _dealt(self, steps: list[list[TrainingTrace]]) -> list[list[TrainingTrace]]:
        """The steps with the tokens of each sample on the rank that trains on it."""
        args = self.args
        if args.world_size == 1:
            return steps
        names = ["ids", "logps", *["ref_logps"] * self.needs_reference(), *["old_logps"] * self.needs_old()]
        traces = [each for step in steps for each in step]
        holders = [holder for step in steps for holder in self._holders(step)]
        rest = iter(delivered(traces, holders, names, args.device))
        return [[next(rest) for _ in step] for step in steps]

    def _holders(self, step: Sequence[TrainingTrace]) -> list[int]:
        """The rank that trains on each sample of a step; -1 for those of weight zero, whose tokens nobody reads."""
        moving = [place for place, each in enumerate(step) if not self.is_idle(each)]
        dealt = zip(moving, deal([step[place] for place in moving], self.args.world_size), strict=True)
        found = [-1] * len(step)
        for place, rank in dealt:
            found[place] = rank
        return found

    def _learn(self, model: nn.Module, samples: list[TrainingTrace]) -> Tensor:
        """Forward and backward over this rank's share of the samples, in micro-batches of a token budget."""
        args = self.args
        counts = self.counts_of(samples)
        self._step_counts = {kind: torch.tensor(max(n, 1.0), device=args.device) for kind, n in counts.items()}
        moving = [each for each in samples if not self.is_idle(each)]
        if samples:
            self._add("train", {"frac_samples_skipped": self._once(1 - len(moving) / len(samples))})
        if args.process_index == 0:
            self._tokens_seen += sum(each.length for each in samples)
            prompts = {id(each.prompt_ids): each.prompt_ids for each in samples}
            self._tokens_seen += sum(map(len, {tuple(prompt) for prompt in prompts.values()}))
        self._step_counts[overrides.ROWS] = torch.tensor(max(float(len(moving)), 1.0), device=args.device)
        mine = [each for each in moving if each.holder == args.process_index]
        groups = self._together(self._micro_batches(mine))
        # The step happens even if nothing moves.
        batches = [self.lay(group) for group in groups or [[]]]
        self._step_batches = batches
        for distinct, positions in map(computed, batches):
            self._distinct += distinct
            self._positions += positions
        self.before_step(model, batches, training=True)
        total = torch.zeros((), device=self.args.device)
        # The loss is that of the whole step already; DeepSpeed would divide it by the accumulation it was set up for.
        unscaled = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        saved = offload.on_host(model) if self.args.activation_offloading else contextlib.nullcontext()
        with self._half_products(), saved, overrides.completed(self):
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                self.accelerator.sync_gradients = last  # DeepSpeed's engine steps where it is told so
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, self._prepare_inputs(batch))
                    self.accelerator.backward(loss, **unscaled)
                total += loss.detach()
        return total

    def rows_of_a_step(self) -> int:
        return self.numbers.step

    def counts_of(self, samples: Sequence[TrainingTrace]) -> dict[str, float]:
        """How many items of each kind the loss is averaged over; samples that are not forwarded count too."""
        tokens = sum(each.length for each in samples if each.trained)
        longest = self.args.max_completion_length or LONGEST
        return {"sequences": len(samples), "tokens": tokens, "budget": len(samples) * longest}

    def _micro_batches(self, samples: Sequence[TrainingTrace]) -> list[list[TrainingTrace]]:
        """The samples in their order, cut so that a forward pass has at most the budget's tokens (or one sample)."""
        budget = self.args.max_tokens_per_micro_batch
        if budget is None:
            budget = BUDGET.get(self.args.device.type, BUDGET["default"])
        groups: list[list[TrainingTrace]] = []
        used = 0
        for sample in samples:
            shares = bool(groups) and self.args.share_prompt and same_prompt(groups[-1][-1], sample)
            cost = sample.length + (0 if shares else len(sample.prompt_ids))
            if not groups or used + cost > budget:
                groups.append([])
                used, cost = 0, sample.length + len(sample.prompt_ids)
            groups[-1].append(sample)
            used += cost
        return groups

    def _together(self, groups: list[list[TrainingTrace]]) -> list[list[TrainingTrace]]:
        """As many groups on every rank: sharded weights are gathered by all of them at once. Some may be empty."""
        if self.args.world_size > 1:
            most = torch.tensor(len(groups), device=self.args.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            groups = groups + [[] for _ in range(int(most) - len(groups))]
        return groups

    def lay(self, samples: Sequence[TrainingTrace]) -> Batch:
        """Samples as a batch: under each prompt its completions, with what the loss reads of each token."""
        batch = self._collate.lay(trees(samples))
        kept = [each for each in samples if each.trained]

        def flat(values: Callable[[TrainingTrace], Any]) -> Tensor:
            parts = [np.asarray(values(each), dtype=np.float32) for each in kept]
            return torch.from_numpy(np.concatenate([*parts, np.zeros(0, dtype=np.float32)]))

        batch["advantage_N"] = flat(lambda each: np.full(each.length, each.advantage))
        batch["sampler_logp_N"] = flat(lambda each: each.tokens.logps)
        batch["old_logp_N"] = flat(
            lambda each: each.tokens.logps if each.tokens.old_logps is None else each.tokens.old_logps
        )
        if self.needs_reference():
            batch["ref_logp_N"] = flat(lambda each: each.tokens.ref_logps)
        return batch

    def prediction_step(self, model: nn.Module, inputs: Batch, prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[Tensor, Any, Any]:  # fmt: skip
        generations = self.num_generations_eval
        # Also without rows: other ranks may have some, and wait for this one.
        samples = self._draw(inputs["rows"], generations, training=False)
        found = {kind: float(count) for kind, count in self.counts_of(samples).items()}
        total = torch.zeros((), device=self.args.device)
        batches = [self.lay(group) for group in self._together(self._micro_batches(samples))]
        self.before_step(model, batches, training=False)
        for batch in batches:
            if overrides.has_own_loss(self):
                counts = {**found, overrides.ROWS: float(len(samples))}
                counts = {kind: torch.tensor(max(n, 1.0), device=self.args.device) for kind, n in counts.items()}
                with torch.no_grad(), self.compute_loss_context_manager():
                    batch = self._prepare_inputs(batch)
                    total += self.own_evaluation(model, batch, counts, batch["row_S"].shape[0])
                continue
            with torch.no_grad(), self.compute_loss_context_manager():
                sums, metrics = self.loss(model, self._prepare_inputs(batch))
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
        self._totals = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        judged = gather_object(self._totals)
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
            "rounds_drawn": self.rounds_drawn,
            "refill_position": self.refill_position,
        }

    def joined_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in ("round_tokens", "replay_tokens") if name in states[0]]
        tokens = {name: [each[name] for each in states] for name in names}
        return {**super().joined_state(states), **tokens}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self.rounds_drawn, self.refill_position = state.get("rounds_drawn", 0), state.get("refill_position", 0)
        self.round = self._resumed("round", state, self._holders)
        if self.replay is not None:
            ranks = self.args.world_size
            self.replay.groups.extend(self._resumed("replay", state, lambda group: deal(group, ranks)))

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


def _arrays(completion: Completion) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(completion.ids, dtype=np.int32), np.asarray(completion.logps, dtype=np.float32)


def _std(values: Tensor) -> Tensor:
    good = values[~values.isnan()]
    return good.std() if len(good) > 1 else values.new_zeros(())


def _opened(dataset: Any) -> Any:
    """A data set given by its rows or by a path, opened, so that its columns are known before the model is; each of a
    dictionary of them."""
    if type(dataset) is dict and all(map(sources.is_data_set, dataset.values())):
        return {name: _opened(value) for name, value in dataset.items()}
    return sources.load(dataset) if isinstance(dataset, str | Path | list | dict) else dataset


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]
