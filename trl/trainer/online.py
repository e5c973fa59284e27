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
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trl.config import BaseConfig, ReferenceFields, RolloutFields, RouterFields, SequenceFields
from trl.data.batches import RowBatches
from trl.data.collate import Branch, Tree
from trl.data.prompts import PromptReport, prepare_prompts
from trl.engine.forest import Batch, computed
from trl.engine.head import TokenStats
from trl.engine.score import evaluating, score
from trl.losses.advantages import total_reward, without_spread
from trl.losses.tokens import Metric
from trl.models import offload
from trl.rollout.generate import InProcessSampler, describe
from trl.rollout.score import RewardFunctions
from trl.rollout.table import Table
from trl.rollout.types import Request, Sampler, Sampling

from .preference import ReferencedTrainer

BUDGET = {"cpu": 4096, "default": 16384}


@dataclass
class OnlineConfig(RolloutFields, ReferenceFields, RouterFields, SequenceFields, BaseConfig):
    """What all methods share that learn from the model's own completions."""

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "generation_kwargs", "chat_template_kwargs"]

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: completions are compared with others of their prompt; "
                "give 2 or more"
            )
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation say the same thing: give one of them")
        super().__post_init__()


class Sample(NamedTuple):
    """One completion, ready to be trained on. Plain values: a checkpoint keeps them."""

    row: int
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]  # of the policy that drew it
    advantage: float
    ref_logps: list[float] | None  # of the reference
    trained: bool  # False: it was cut, and cut completions are not trained on
    old_logps: list[float] | None = None  # of the policy that drew it, by the trainer, where the sampler's are others


class Arithmetic(NamedTuple):
    """How many of what."""

    step: int  # completions an optimizer step, on all devices
    round: int  # completions drawn at once, on all devices
    prompts: int  # prompts of a round
    parts: int  # optimizer steps that a round is cut into


def arithmetic(args: Any, accumulation: int) -> Arithmetic:
    """Rounds of whole groups and of whole steps, whatever the batch size and the number of generations."""
    step = args.train_batch_size * accumulation * args.world_size
    wanted = step
    if args.generation_batch_size is not None:
        wanted = args.generation_batch_size
    elif args.steps_per_generation is not None:
        wanted = args.train_batch_size * args.steps_per_generation * args.world_size
    least = math.lcm(step, args.num_generations)
    together = math.ceil(wanted / least) * least
    return Arithmetic(step, together, together // args.num_generations, together // step)


class Tickets:
    """A batch sampler: for each round its prompts, and nothing for the steps that follow on the same round."""

    def __init__(self, rounds: RowBatches, steps: int) -> None:
        self.rounds, self.steps = rounds, steps

    def __len__(self) -> int:
        return len(self.rounds) * self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for prompts in self.rounds:
            yield prompts
            for _ in range(self.steps - 1):
                yield []

    def set_epoch(self, epoch: int) -> None:
        self.rounds.set_epoch(epoch)

    @property
    def batch_sampler(self) -> "Tickets":
        return self


class OnlineTrainer(ReferencedTrainer):
    """A trainer on completions that the model draws itself and reward functions judge."""

    ref_columns = ()
    prepared_columns = frozenset({"prompt", "prompt_ids", "row"})
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
        ref_model: Any = None,
    ) -> None:
        if reward_funcs is None or (isinstance(reward_funcs, list | tuple) and not reward_funcs):
            raise ValueError("reward_funcs is missing: give a function, a model, a name, or a list of them")
        if args is None:
            args = self.config_class(output_dir=f"{self.method.upper()}")
        # One ticket is one optimizer step.
        self.accumulation, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
        self.numbers = arithmetic(args, self.accumulation)
        self._reward_funcs, self._reward_processing_classes = reward_funcs, reward_processing_classes
        self.round: list[list[Sample]] = []  # what is left of the round, step by step
        self.rounds_drawn = 0
        self._later: list[list[Sample]] = []  # the whole round, to be trained on again
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

    def is_idle(self, sample: Sample) -> bool:
        """Whether every coefficient of the sample is zero, so that it need not be forwarded."""
        return False

    def kl_in_reward(self) -> bool:
        return False

    def needs_reference(self) -> bool:
        return self.args.beta != 0.0

    def needs_old(self) -> bool:
        """Whether the trainer computes log-probs of its own for what the sampler drew."""
        return False

    # --- data -----------------------------------------------------------------------------------------------------

    def rows(self, dataset: Any, name: str) -> tuple[Dataset, PromptReport]:
        if isinstance(dataset, IterableDataset):
            raise ValueError("prompts are drawn from a whole data set here, not from a stream: load it whole")
        args = self.args
        return prepare_prompts(
            dataset,
            self.processing_class,
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=args.chat_template_kwargs,
            num_proc=args.dataset_num_proc,
            name=name,
        )

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
        self.sampler = InProcessSampler(self.processing_class, max_cache_tokens=args.max_cache_tokens)
        self.table = Table(Path(args.output_dir) / "completions")
        self._judged: list[tuple[float, list[float]]] = []  # of an evaluation: for each prompt its total rewards

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
        stops = {tokenizer.eos_token_id} | set(_as_list(further.pop("eos_token_id", None)))
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
        lines.append(f"rewards: {', '.join(self.rewards.names)}")
        return [*lines, f"sampling: {describe(self.sampling)}"]

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None,
                        is_training: bool = False, dataloader_key: str | None = None) -> DataLoader:  # fmt: skip
        args = self.args
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        # Every rank gets the prompts of the round: the samples of one prompt may be drawn on several.
        rounds = RowBatches(
            len(dataset),
            self.numbers.prompts,
            shuffle=bool(args.shuffle_dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        tickets = Tickets(rounds, self.numbers.parts * args.num_iterations)
        return DataLoader(dataset, batch_sampler=tickets, collate_fn=self._collate)

    # --- drawing and judging --------------------------------------------------------------------------------------

    def _draw(self, rows: list[dict[str, Any]], generations: int, training: bool) -> list[Sample]:
        """Completions of the rows, judged. In training every rank has all rows and draws its part of the samples; in an
        evaluation a rank has rows of its own."""
        args, model = self.args, self.model_wrapped if training else self.model
        mode = "train" if training else "eval"
        ranks, rank = (args.world_size, args.process_index) if training else (1, 0)
        mine = np.array_split(np.arange(len(rows) * generations), ranks)[rank]
        places, firsts, counts = [], [], []
        for number in mine.tolist():
            place, sample = divmod(number, generations)
            if places and places[-1] == place:
                counts[-1] += 1
            else:
                places.append(place)
                firsts.append(sample)
                counts.append(1)
        number = self.rounds_drawn if training else -1
        requests = [
            Request(rows[place]["prompt_ids"], count, (args.seed, number + 1, int(rows[place]["row"])), first)
            for place, first, count in zip(places, firsts, counts, strict=True)
        ]
        with self.compute_loss_context_manager():
            drawn = self.sampler.generate(model, requests, self.sampling)
        completions = [completion for group in drawn for completion in group]
        of_row = [rows[place] for place, count in zip(places, counts, strict=True) for _ in range(count)]
        texts = self.processing_class.batch_decode([each.ids for each in completions], skip_special_tokens=True)
        prompts = [row["prompt"] for row in of_row]
        replies: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        extra: dict[str, list[Any]] = {}
        logged: dict[str, list[float]] = defaultdict(list)
        known = ("prompt", "prompt_ids", "row")
        columns = {name: [row[name] for row in of_row] for name in (rows[0] if rows else {}) if name not in known}
        own_SF = torch.zeros(0, len(self.rewards.names))
        if completions:  # a rank may have none
            own_SF = self.rewards.score(
                prompts,
                replies,
                [each.ids for each in completions],
                columns,
                trainer_state=self.state,
                log_extra=lambda name, values: extra.__setitem__(name, list(values)),
                log_metric=lambda name, value: logged[name].append(float(value)),
            )
        ref = self._logps(self.ask_reference(model), of_row, completions) if self.needs_reference() else None
        old = self._logps(self.ask_policy(model), of_row, completions) if self.needs_old() else None
        kl_S = None
        if ref is not None and self.kl_in_reward():
            kl_S = torch.tensor([sum(a - b for a, b in zip(each.logps, r, strict=True))
                                 for each, r in zip(completions, ref, strict=True)])  # fmt: skip
        rewards_SF, all_kl_S = own_SF, kl_S
        if ranks > 1:
            together = gather_object([(own_SF, kl_S)])
            rewards_SF = torch.cat([part[0] for part in together])
            all_kl_S = None if kl_S is None else torch.cat([part[1] for part in together])
        weights_F = self.rewards.weights
        advantage_S = torch.zeros(0)
        if len(rewards_SF):
            advantage_S = self.advantages(rewards_SF, weights_F, generations, all_kl_S)
        own_S = advantage_S[torch.from_numpy(mine)] if ranks > 1 else advantage_S
        if len(rewards_SF):
            self._log_round(mode, rewards_SF, weights_F, generations, completions, kl_S, logged)
        if not training and completions:
            totals = total_reward(rewards_SF, weights_F).view(-1, generations)
            self._judged += [(float(each.nanmean()), each.tolist()) for each in totals]
        if args.log_completions:
            self._keep(mode, prompts, texts, own_SF, own_S, extra)
        cut = args.mask_truncated_completions
        return [
            Sample(
                int(row["row"]),
                list(row["prompt_ids"]),
                each.ids,
                each.logps,
                float(own_S[index]),
                None if ref is None else ref[index],
                each.finished or not cut,
                None if old is None else old[index],
            )
            for index, (row, each) in enumerate(zip(of_row, completions, strict=True))
        ]

    def _logps(self, ask: Callable[..., TokenStats], rows: list[Any], completions: list[Any]) -> list[list[float]]:
        """Log-probs of every token of the completions, by whom `ask` asks."""
        blank = [
            Sample(int(row["row"]), list(row["prompt_ids"]), each.ids, each.logps, 0.0, None, True)
            for row, each in zip(rows, completions, strict=True)
        ]
        found: list[list[float]] = []
        for group in self._together(self._micro_batches(blank)):
            batch = self._prepare_inputs(self._collate.lay(trees(group)))
            with torch.no_grad(), self.compute_loss_context_manager():
                stats = ask(batch, temperature=self.args.temperature)
            found += _by_sample(stats, group)
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

    def _log_round(self, mode: str, rewards_SF: Tensor, weights_F: Tensor, generations: int, completions: list[Any],
                   kl_S: Tensor | None, logged: dict[str, list[float]]) -> None:  # fmt: skip
        """Metrics of a round under upstream's names. Rewards are those of all ranks, lengths this rank's own."""
        device, here = self.args.device, self.args.process_index == 0 or mode == "eval"
        total_S = total_reward(rewards_SF, weights_F)

        def once(value: Tensor, count: float = 1.0) -> Metric:
            """A number of all ranks, which one of them adds."""
            good = bool(torch.isfinite(value)) and here
            return Metric(value.nan_to_num(0.0).to(device) * good, count * good)

        metrics = {"reward": once(total_S.nanmean()), "reward_std": once(_std(total_S))}
        for index, name in enumerate(self.rewards.names):
            metrics[f"rewards/{name}/mean"] = once(rewards_SF[:, index].nanmean())
            metrics[f"rewards/{name}/std"] = once(_std(rewards_SF[:, index]))
        alike_S = without_spread(rewards_SF, weights_F, generations)
        metrics["frac_reward_zero_std"] = once(alike_S.float().mean())
        lengths = torch.tensor([float(len(each.ids)) for each in completions])
        ended = torch.tensor([each.finished for each in completions], dtype=torch.bool)
        for what, values in (("length", lengths), ("terminated_length", lengths[ended])):
            if len(values):
                metrics[f"completions/mean_{what}"] = Metric(values.sum().to(device), float(len(values)))
                metrics[f"completions/min_{what}"] = Metric(values.min().to(device), 1.0)
                metrics[f"completions/max_{what}"] = Metric(values.max().to(device), 1.0)
        if len(ended):
            metrics["completions/clipped_ratio"] = Metric((~ended).float().sum().to(device), float(len(ended)))
        if kl_S is not None:
            metrics["kl"] = Metric(kl_S.sum().to(device), max(float(lengths.sum()), 1.0))
        for name, values in logged.items():
            metrics[name] = Metric(torch.tensor(values).sum().to(device), float(len(values)))
        self._add(mode, metrics)

    def _keep(self, mode: str, prompts: list[Any], texts: list[str], rewards_SF: Tensor, advantage_S: Tensor,
              extra: dict[str, list[Any]]) -> None:  # fmt: skip
        rows = [
            {
                "step": self.state.global_step,
                "mode": mode,
                "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
                "completion": text,
                **{name: rewards_SF[index, place].item() for place, name in enumerate(self.rewards.names)},
                "advantage": advantage_S[index].item(),
                **{name: values[index] for name, values in extra.items()},
            }
            for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        rows = gather_object(rows)
        if self.is_world_process_zero():
            self.table.write(rows, self.state.global_step, mode)
            self.table.show(
                rows, self.state.global_step, self.args.num_completions_to_print, self.args.log_unique_prompts
            )

    # --- the step -------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        return [ticket for _, ticket in zip(range(num_batches), epoch_iterator, strict=False)], None

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        if inputs["rows"]:
            samples = self._draw(inputs["rows"], self.args.num_generations, training=True)
            self.rounds_drawn += 1
            parts = [list(part) for part in _split(samples, self.numbers.parts)]
            self.round = parts * self.args.num_iterations
        samples, self.round = self.round[0], self.round[1:]
        return self._learn(model, samples)

    def _learn(self, model: nn.Module, samples: list[Sample]) -> Tensor:
        """Forward and backward over the samples of this rank, in micro-batches of a token budget."""
        self._step_counts = self._count(samples)
        moving = [each for each in samples if not self.is_idle(each)]
        skipped = Metric(torch.tensor(float(len(samples) - len(moving)), device=self.args.device), float(len(samples)))
        self._add("train", {"frac_samples_skipped": skipped} if samples else {})
        groups = self._together(self._micro_batches(moving))
        # The step happens even if nothing moves.
        batches = [self.lay(group) for group in groups or [[]]]
        self._step_batches = batches
        self._tokens_seen += sum(len(each.ids) for each in samples)
        self._tokens_seen += sum(len(ids) for ids in {tuple(each.prompt_ids) for each in samples})
        for distinct, positions in map(computed, batches):
            self._distinct += distinct
            self._positions += positions
        self.before_step(model, batches, training=True)
        total = torch.zeros((), device=self.args.device)
        saved = offload.on_host(model) if self.args.activation_offloading else contextlib.nullcontext()
        with saved:
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, self._prepare_inputs(batch))
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def counts_of(self, samples: Sequence[Sample]) -> dict[str, float]:
        """How many items of each kind the loss is averaged over; samples that are not forwarded count too."""
        tokens = sum(len(each.ids) for each in samples if each.trained)
        longest = self.args.max_completion_length or LONGEST
        return {"sequences": len(samples), "tokens": tokens, "budget": len(samples) * longest}

    def _count(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        found = self.counts_of(samples)
        totals = torch.tensor(list(found.values()), dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        return dict(zip(found, totals.clamp(min=1).float(), strict=True))

    def _micro_batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples in their order, cut so that a forward pass has at most the budget's tokens (or one sample)."""
        budget = self.args.max_tokens_per_micro_batch
        if budget is None:
            budget = BUDGET.get(self.args.device.type, BUDGET["default"])
        groups: list[list[Sample]] = []
        used = 0
        for sample in samples:
            shares = bool(groups) and groups[-1][-1].prompt_ids == sample.prompt_ids and self.args.share_prompt
            cost = len(sample.ids) + (0 if shares else len(sample.prompt_ids))
            if not groups or used + cost > budget:
                groups.append([])
                used, cost = 0, len(sample.ids) + len(sample.prompt_ids)
            groups[-1].append(sample)
            used += cost
        return groups

    def _together(self, groups: list[list[Sample]]) -> list[list[Sample]]:
        """As many groups on every rank: sharded weights are gathered by all of them at once. Some may be empty."""
        if self.args.world_size > 1:
            most = torch.tensor(len(groups), device=self.args.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            groups = groups + [[] for _ in range(int(most) - len(groups))]
        return groups

    def lay(self, samples: Sequence[Sample]) -> Batch:
        """Samples as a batch: under each prompt its completions, with what the loss reads of each token."""
        batch = self._collate.lay(trees(samples))
        kept = [each for each in samples if each.trained]

        def flat(values: Callable[[Sample], Sequence[float]]) -> Tensor:
            return torch.tensor([value for each in kept for value in values(each)], dtype=torch.float32)

        batch["advantage_N"] = flat(lambda each: [each.advantage] * len(each.ids))
        batch["sampler_logp_N"] = flat(lambda each: each.logps)
        batch["old_logp_N"] = flat(lambda each: each.logps if each.old_logps is None else each.old_logps)
        if self.needs_reference():
            batch["ref_logp_N"] = flat(lambda each: each.ref_logps or [])
        return batch

    def prediction_step(self, model: nn.Module, inputs: Batch, prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[Tensor, Any, Any]:  # fmt: skip
        generations = self.args.num_generations_eval or self.args.num_generations
        # Also without rows: other ranks may have some, and wait for this one.
        samples = self._draw(inputs["rows"], generations, training=False)
        found = {kind: float(count) for kind, count in self.counts_of(samples).items()}
        total = torch.zeros((), device=self.args.device)
        for group in self._micro_batches(samples):
            batch = self.lay(group)
            with torch.no_grad(), self.compute_loss_context_manager():
                self.before_step(model, [batch], training=False)
                sums, metrics = self.loss(model, self._prepare_inputs(batch))
            self._add("eval", {**metrics, **self.parts(sums, dict.fromkeys(sums, 0.0))})
            total += torch.stack([each / max(found[kind], 1.0) for kind, each in sums.items()]).sum()
        zero = torch.zeros((), device=self.args.device)
        self._add("eval", self.parts(dict.fromkeys(found, zero), found))
        return total, None, None

    def evaluation_loop(self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
                        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> Any:  # fmt: skip
        self._judged = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        judged = gather_object(self._judged)
        for name, value in judgement(judged, self.args.pass_threshold).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        left = [[list(sample) for sample in part] for part in self.round]
        return {**super().method_state(), "round": left, "rounds_drawn": self.rounds_drawn}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self.round = [[Sample(*sample) for sample in part] for part in state.get("round", [])]
        self.rounds_drawn = state.get("rounds_drawn", 0)


LONGEST = 512  # tokens of a completion where nobody says


def trees(samples: Sequence[Sample]) -> list[Tree]:
    """One tree for each run of samples of one prompt. One that is not trained on is a branch without trained tokens."""
    found: list[Tree] = []
    prompt: list[int] | None = None
    for sample in samples:
        branch = Branch(sample.ids, [sample.trained] * len(sample.ids), sample.row)
        if found and sample.prompt_ids == prompt:
            found[-1] = found[-1]._replace(branches=(*found[-1].branches, branch))
        else:
            prompt = sample.prompt_ids
            found.append(Tree(Branch(prompt, [False] * len(prompt)), (branch,), sample.row))
    return found


def judgement(judged: Sequence[tuple[float, list[float]]], threshold: float) -> dict[str, float]:
    """The mean reward over prompts with half the width of its 95 % interval, and pass@k: the chance that one of k
    completions passes, without bias (Chen et al. 2021, arXiv:2107.03374, equation 1)."""
    means = np.array([mean for mean, _ in judged], dtype=np.float64)
    means = means[np.isfinite(means)]
    if not len(means):
        return {}
    spread = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    found = {"reward": float(means.mean()), "reward_ci95": float(1.96 * spread)}
    drawn = min(len(rewards) for _, rewards in judged)
    for k in sorted({1, drawn}):
        chances = []
        for _, rewards in judged:
            count, passed = len(rewards), sum(reward >= threshold for reward in rewards)
            chances.append(1.0 - math.comb(count - passed, k) / math.comb(count, k))
        found[f"pass@{k}"] = float(np.mean(chances))
    return found


def _split(samples: list[Sample], parts: int) -> list[list[Sample]]:
    bounds = np.linspace(0, len(samples), parts + 1).round().astype(int)
    return [samples[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _by_sample(stats: TokenStats, samples: Sequence[Sample]) -> list[list[float]]:
    values = stats.logp_N.float().cpu().tolist()
    found, start = [], 0
    for sample in samples:
        found.append(values[start : start + len(sample.ids)])
        start += len(sample.ids)
    return found


def _std(values: Tensor) -> Tensor:
    good = values[~values.isnan()]
    return good.std() if len(good) > 1 else values.new_zeros(())


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]
