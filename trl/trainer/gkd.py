"""Generalised knowledge distillation: a teacher's distributions, on the data's answers and on written ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig

from trl.config import TeacherFields
from trl.data.batching import collate
from trl.data.batching.collate import Branch, Tree
from trl.data.reading.errors import DataError
from trl.data.tokenizing.sequences import SequenceEncoder, Sequences
from trl.engine.forest import Batch, trained
from trl.engine.score import score
from trl.losses.policy import TOKENS
from trl.losses.tokens import Metric, mean_metric
from trl.models.shards import without_ddp
from trl.rollout.filters import as_generation_config
from trl.rollout.generate import InProcessSampler, stop_ids
from trl.rollout.types import Request, Sampling

from .attributes import shows
from .loader import SOURCE, Source
from .sft import SFTConfig, SFTTrainer
from .step import Step
from .teacher import Teacher


@dataclass
class GKDConfig(TeacherFields, SFTConfig):
    """Options of `GKDTrainer`, in addition to those of `SFTConfig`."""

    temperature: float = field(default=0.9, metadata={"help": "Softmax temperature of completions that are sampled."})
    lmbda: float = field(
        default=0.5,
        metadata={"help": "Share of the optimizer steps whose completions the student writes; 0: none, 1: all."},
    )
    beta: float = field(
        default=0.5,
        metadata={"help": "Divergence: 0 forward KL, 1 reverse KL, between them generalised Jensen-Shannon."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of a sampled completion in tokens."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    seq_kd: bool = field(
        default=False, metadata={"help": "In the other steps, the teacher writes the completions (sequence-level KD)."}
    )

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} is not possible: give 0 (forward KL) to 1 (reverse KL)")
        super().__post_init__()

    @property
    def writes(self) -> bool:
        """Whether completions are sampled in some steps."""
        return self.lmbda > 0 or self.seq_kd


@dataclass(frozen=True, kw_only=True)
class Answers(Sequences):
    """Sequences of which answers are trained: completions, and the assistant's turns of conversations."""

    def encoder(self, tokenizer: Any, shape: Any, first_row: int = 0) -> SequenceEncoder:
        turns = self.assistant_only_loss or shape.kind == "messages"
        return SequenceEncoder(tokenizer, shape, replace(self, assistant_only_loss=turns), first_row)


@shows("beta", "lmbda", "seq_kd", fixed=("temperature", "max_new_tokens"))
class GKDTrainer(SFTTrainer):
    """Trains a causal language model to predict what a teacher would, on the data and on completions of its own.

    In a share `lmbda` of the optimizer steps the student writes the last answer of each row; in the others the data's
    answers stay, or with `seq_kd` the teacher writes them. The loss is the mean over tokens of the generalised
    Jensen-Shannon divergence between the two distributions (see `engine.divergence.Divergence`), at temperature 1.
    Rows are those of `SFTTrainer`; of a conversation the assistant's turns are trained. An evaluation reads the data's
    answers. `teacher_model` is a model, a name or a path; it has the student's vocabulary. Agarwal et al. 2023,
    arXiv:2306.13649, algorithm 1.
    """

    config_class = GKDConfig
    method = "gkd"
    recipe = Answers

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: GKDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        *,
        quantization_config: Any = None,
    ) -> None:
        self.teacher = Teacher(teacher_model, args, model)
        self.components = (self.teacher,)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )

    @property
    def teacher_model(self) -> nn.Module:
        return self.teacher.model

    @property
    def generation_config(self) -> GenerationConfig:
        """What the sampler is asked for, as transformers writes it."""
        return as_generation_config(self.sampling, self.processing_class)

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        return self.generation_config.to_diff_dict()

    def on_ready(self) -> None:
        args, tokenizer = self.args, self.processing_class
        if args.writes and self._collate.users is not None:
            raise ValueError(
                "lmbda and seq_kd replace the answers of rows, which a data_collator of your own does not show: leave "
                "it out, or set lmbda=0 and seq_kd=False"
            )
        self.sampling = Sampling(
            args.max_new_tokens, args.temperature, stop_ids=tuple(sorted(stop_ids(self.model, tokenizer)))
        )
        self.samplers = {who: InProcessSampler(tokenizer) for who in ("student", "teacher")}
        if args.writes and isinstance(self.train_dataset, Dataset) and len(self.train_dataset):
            for tree in collate.sequences([self.train_dataset[0]]):
                prompt_of(tree)

    def report(self) -> list[str]:
        args = self.args
        lines = super().report()
        if args.writes:
            others = "the teacher" if args.seq_kd else "the data"
            lines.append(
                f"answers: by the student in {args.lmbda:.0%} of the steps, by {others} in the others; sampled at "
                f"temperature {args.temperature:g}, at most {args.max_new_tokens} tokens"
            )
        return lines

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        trees = collate.sequences(rows)
        return {**to_batch(trees), "trees": trees}

    def rewritten(self, batches: list[Batch], training: bool) -> list[Batch]:
        forests = [batch.pop("trees", []) for batch in batches]
        writer = self._writer() if training else None
        if writer is None:
            return batches
        prompts = [[(tree.row, prompt_of(tree)) for tree in forest] for forest in forests]
        answers = iter(self._answers(writer, [each for forest in prompts for each in forest]))
        found = []
        for forest in prompts:
            trees = []
            for row, ids in forest:
                answer = next(answers)
                root = Branch(ids, [False] * len(ids))
                trees.append(Tree(root, (Branch(answer, [True] * len(answer), row),), row))
            found.append(self.made_of(trees))
        return found

    def made_of(self, rows: Sequence[Any]) -> Batch:
        """Also of trees: what was sampled in place of the data's completions."""
        if rows and isinstance(rows[0], Tree):
            return {**self._collate.to_batch(list(rows)), SOURCE: Source(rows)}
        batch = super().made_of(rows)
        batch.pop("trees", None)
        return batch

    def _writer(self) -> str | None:
        """Who writes the completions of this step; None: they are the data's. The same on every rank."""
        args, step = self.args, self.state.global_step
        by_student = np.random.default_rng([args.seed, step, 3]).random() < args.lmbda
        return "student" if by_student else "teacher" if args.seq_kd else None

    def _answers(self, writer: str, prompts: Sequence[tuple[int, list[int]]]) -> list[list[int]]:
        """A completion of each prompt, which is given with its row."""
        args, step, window = self.args, self.state.global_step, self.window()
        requests = []
        for row, ids in prompts:
            room = max(1, window - len(ids)) if window else args.max_new_tokens
            requests.append(Request(ids, 1, (args.seed, step, row + 1), limit=min(room, args.max_new_tokens)))
        sampler = self.samplers[writer]
        sampler.sync(self.teacher.model if writer == "teacher" else without_ddp(self.model_wrapped), step)
        with self.compute_loss_context_manager():
            return [list(each.ids) for (each,) in sampler.generate(requests, self.sampling)]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        balance = self.router_aux_loss_coef
        comparison = self.teacher.comparison(batch, beta=self.args.beta)
        stats = score(model, batch, entropy=True, top1=True, comparison=comparison, logp_grad=False, router=balance > 0)
        assert stats.divergence_N is not None and stats.entropy_N is not None and stats.top1_N is not None
        total = stats.divergence_N.sum()
        metrics = {"entropy": mean_metric(stats.entropy_N), "mean_token_accuracy": mean_metric(stats.top1_N)}
        if stats.aux is not None:
            total = total + balance * stats.aux * trained(batch)
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {TOKENS: total}, metrics


def prompt_of(tree: Tree) -> list[int]:
    """The tokens before the last trained span of a sequence. Raises DataError if there is none."""
    mask = np.asarray(tree.root.mask, dtype=bool)
    trained_at = np.flatnonzero(mask)
    before = np.flatnonzero(~mask[: trained_at[-1]]) if len(trained_at) else trained_at
    end = int(before[-1]) + 1 if len(before) else 0
    if end < 2 and mask[1:2].all():
        raise DataError(
            f"row {tree.row}: every token is trained, so there is no prompt that an answer could be written to. Use "
            "prompt and completion columns or messages, or set lmbda=0 and seq_kd=False."
        )
    return list(tree.root.ids[:end])
