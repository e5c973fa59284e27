"""PPO in a loop of one's own: `generate`, a reward from anywhere, `step`, `log_stats`."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl.engine.reference import create_reference_model
from trl.models.shards import without_ddp
from trl.models.unwrap import without_value_head
from trl.models.vocabulary import vocabulary_size
from trl.rollout.traces import Columns, ScoredTrace, TrainingTrace
from trl.rollout.types import Request

from . import queries as of_queries
from .own_loop import OwnLoop
from .ppo_inputs import given_to_step, sampling_asked, scored_traces, step_inputs
from .ppo_rounds import PPORounds
from .ppo_stats import log_line, step_stats, step_times, table_of
from .queries import Queries, numbers, token_rows


class PPOStepTrainer(PPORounds):
    """`PPOTrainer` for a loop of one's own: what `PPOTrainer(config=..., model=...)` makes.

    `model` is a language model, with or without `AutoModelForCausalLMWithValueHead` around it. `ref_model=None`: its
    start, or with `num_shared_layers` a copy that shares the first layers, which are then frozen. `dataset` holds texts
    or `input_ids`; without one, `dataloader` reads `config.query_dataset`.
    """

    in_steps = True

    def __init__(
        self,
        config: Any = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: Any = None,
        data_collator: Any = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Any = None,
        *,
        value_model: Any = None,
        peft_config: Any = None,
    ) -> None:
        if training_data_collator is not None:
            raise ValueError("training_data_collator: nothing is padded or collated in a step; leave it out")
        if num_shared_layers is not None and ref_model is None:
            ref_model = create_reference_model(without_value_head(model), num_shared_layers)
        self.queries, self.query_collator = dataset, data_collator
        super().__init__(
            config,
            tokenizer,
            model,
            ref_model,
            value_model=value_model,
            optimizers=(optimizer, lr_scheduler),
            peft_config=peft_config,
            reward_funcs=given_to_step,
        )
        if self.args.lr_scheduler_type == "linear" and self.args.max_steps < 1:
            self.args.lr_scheduler_type = "constant"  # a loop of one's own has no end that is known
        self.loop = OwnLoop(self)
        self.steps_taken = self.generated = 0

    @property
    def config(self) -> Any:
        return self.args

    @property
    def tokenizer(self) -> Any:
        return self.processing_class

    @property
    def batch_size(self) -> int:
        """Completions of a step of the loop, on this device."""
        return self.round_sizes.round // self.args.world_size

    # --- queries and responses ------------------------------------------------------------------------------------

    @functools.cached_property
    def dataloader(self) -> Any:
        """Batches of queries: of `dataset`, else of the data set that `query_dataset` names."""
        return self.prepare_dataloader(self.queries, self.query_collator)

    def prepare_dataloader(self, dataset: Any = None, data_collator: Callable | None = None) -> Queries:
        dataset = of_queries.opened(dataset, self.args)
        if hasattr(dataset, "column_names"):
            args = self.args
            dataset = of_queries.of_texts(dataset, self.processing_class, args.query_length, args.dataset_num_proc)
        return Queries(dataset, self.batch_size, self.args, data_collator)

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses to queries, sampled from the policy: 1-D tensors of token ids, after their query unless
        `return_prompt` is False.

        `query_tensor` is a list of 1-D tensors or a padded batch [B, T], both of which give a list, or one 1-D tensor,
        which gives a tensor [1, T]. `generation_kwargs` are arguments of `generate`; without them the policy's own
        distribution is sampled. `length_sampler` returns the longest response of each query, in tokens.
        `generate_ref_response` gives the reference's responses too. `batch_size` has no effect: the sampler sizes its
        batches by its cache.
        """
        prompts = token_rows(query_tensor, "query", self.processing_class.pad_token_id, vocabulary_size(self.model))
        sampling = sampling_asked(generation_kwargs, self.sampling_of, self.args.temperature)
        self.generated += 1
        limits = [None if length_sampler is None else int(length_sampler()) for _ in prompts]
        if length_sampler is not None:
            sampling = dataclasses.replace(sampling, max_new_tokens=max(limit or 1 for limit in limits))
        base = (self.args.seed, self.args.process_index, self.generated)
        asked = [
            Request(ids, 1, (*base, at), 0, limit) for at, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        model = without_ddp(self.model_wrapped)

        def drawn(source: Any) -> Any:
            with self.compute_loss_context_manager():
                self.sampler.sync(source, self.state.global_step)
                found = [group[0].ids for group in self.sampler.generate(asked, sampling)]
            whole = [[*ids, *new] if return_prompt else new for ids, new in zip(prompts, found, strict=True)]
            tensors = [torch.tensor(each, device=self.args.device) for each in whole]
            single = isinstance(query_tensor, Tensor) and query_tensor.dim() == 1
            return tensors[0][None] if single else tensors

        if not generate_ref_response:
            return drawn(model)
        own = drawn(model)
        if self.reference.policy is None:
            raise ValueError("generate_ref_response: with kl_coef=0 there is no reference")
        with self.reference.policy.model_of(model) as other:
            return own, drawn(other)

    # --- a step ---------------------------------------------------------------------------------------------------

    def step(
        self,
        queries: Any,
        responses: Any,
        scores: Any,
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Train on responses to queries, with their scores: all `num_iterations` passes over them.

        `queries` and `responses` are lists of 1-D tensors of token ids, `scores` one number each (tensors, floats or
        one tensor), as many as `config.batch_size`. A response that begins with its query is taken without it.
        `response_masks` are 1 for the tokens of a response that train. Returns statistics of the step. ValueError for
        input that does not fit, before anything is changed.
        """
        began = time.perf_counter()
        prompts, columns, score_S = step_inputs(
            queries,
            responses,
            scores,
            response_masks,
            batch_size=self.batch_size,
            pad=self.processing_class.pad_token_id,
            vocabulary=vocabulary_size(self.model),
        )
        model = without_ddp(self.loop.begin())
        rows = [{"row": place, "prompt_ids": np.asarray(ids, dtype=np.int32)} for place, ids in enumerate(prompts)]
        with self.compute_loss_context_manager():
            for scorer in self.scorers(model):
                for own, further in zip(columns, scorer(rows, columns), strict=True):
                    own.update(further)
        scored = time.perf_counter()
        self.learns, self.guards.is_over = True, False
        traces = self._known_everywhere(rows, columns, score_S)
        kl_coef = self.kl_ctl.value
        self.credit(traces, 1)
        self._sums["train"].clear()
        credited = time.perf_counter()
        self._optimise([TrainingTrace(*each[:3], 1.0, each.trained, each.columns, each.holder) for each in traces])
        trained = time.perf_counter()
        stats = step_stats(traces, self._reduced("train"), score_S=self.round_scores, kl_coef=kl_coef,
                           token_kl=self.token_kl, vf_coef=self.args.vf_coef, prompts=prompts)  # fmt: skip
        self.end_round(len(traces))
        self.steps_taken += 1
        times = step_times(began, scored, credited, trained, time.perf_counter())
        return {**stats, "ppo/learning_rate": self.loop.learning_rate, **times}

    def _known_everywhere(
        self, rows: list[dict[str, Any]], columns: list[Columns], score_S: Tensor
    ) -> list[ScoredTrace]:
        """The traces of all ranks, this rank's with their columns."""
        rank, divergence = self.args.process_index, self.divergence_of if self.needs_reference() else None
        mine = scored_traces(rows, columns, score_S, rank, self.sampling.stop_ids, divergence)
        every = gather_object(mine) if self.args.world_size > 1 else mine
        return [each._replace(columns=columns[each.row]) if each.holder == rank else each for each in every]

    def _optimise(self, traces: list[TrainingTrace]) -> None:
        parts, mine = self.round_sizes.parts, self.batch_size
        for iteration in range(self.args.num_iterations):
            order = np.random.default_rng([self.args.seed, self.steps_taken, iteration]).permutation(mine)
            for part in np.array_split(order, parts):
                chosen = set(part.tolist())
                step = [each for each in traces if each.row in chosen]
                self.loop.step(functools.partial(self.train_on, traces=step))
                if self.guards.is_over:
                    return

    # --- what comes of it -----------------------------------------------------------------------------------------

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Any,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Log the numbers of a step, with the mean and deviation of `rewards`, to the trackers of `report_to`. The
        columns of the batch go to the table of completions, if `log_completions` is set."""
        reward_S = numbers(rewards)
        every = torch.tensor(gather_object(reward_S.tolist()) if self.args.world_size > 1 else reward_S.tolist())
        logged = log_line(stats, every)
        self.log(logged)
        if not self.is_world_process_zero():
            return
        names = [name for name in columns_to_log if name in batch]
        if self.args.log_completions and names:
            columns = {**{name: batch[name] for name in names}, "reward": reward_S.tolist()}
            self.completions.write(table_of(columns, self.steps_taken), self.steps_taken, "train")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The policy (or its adapter), its value function, its tokenizer and a model card."""
        self.save_model(str(save_directory))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "this trainer is for a loop of your own: generate, step, log_stats. For train(), make it with args=, "
            "train_dataset= and reward_funcs="
        )
