"""On-policy distillation: the student writes, and learns the teacher's distribution at each of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.config import TeacherFields
from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.policy import TOKENS
from trl.losses.tokens import Metric, mean_metric
from trl.rollout.traces import ScoredTrace
from trl.rollout.types import Environment, Sampler

from .online import OnlineTrainer
from .online_config import OnlineConfig
from .step import Step
from .teacher import Teacher


@dataclass
class DistillationConfig(TeacherFields, OnlineConfig):
    """Options of `DistillationTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    num_generations: int = field(default=1, metadata={"help": "Number of completions of each prompt."})
    beta: float = field(
        default=1.0,
        metadata={"help": "Divergence: 0 forward KL, 1 reverse KL, between them generalised Jensen-Shannon."},
    )
    loss_top_k: int = field(
        default=0,
        metadata={
            "help": "Compare the k most likely tokens alone (beta=0: the teacher's, 1: the student's, else of either); "
            "0: all."
        },
    )
    loss_add_tail: bool = field(
        default=True,
        metadata={"help": "Compare the probability of all other tokens too, as one outcome (loss_top_k)."},
    )

    _VALID_DICT_FIELDS = [*OnlineConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} is not possible: give 0 (forward KL) to 1 (reverse KL)")
        super().__post_init__()


class DistillationTrainer(OnlineTrainer):
    """Trains a causal language model to predict what a teacher would, on completions that it writes itself.

    `teacher_model` is a model, a name or a path; it has the student's vocabulary. Rows have a `prompt` (a string or
    messages). The loss is the mean over tokens of the generalised Jensen-Shannon divergence between the two
    distributions, both at `temperature` (see `engine.divergence.Divergence`). Agarwal et al. 2023, arXiv:2306.13649.
    """

    config_class = DistillationConfig
    method = "distillation"
    needs_rewards = False
    tools = ()  # read by upstream's callers; there are none yet

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: None = None,  # has its place, and is refused by `compat`
        *,
        sampler: Sampler | None = None,
        environment: Environment | None = None,
    ) -> None:
        self.teacher = Teacher(teacher_model, args, model)
        super().__init__(
            model,
            None,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            sampler=sampler,
            environment=environment,
        )

    @property
    def teacher_model(self) -> nn.Module:
        return self.teacher.model

    def parts_of(self) -> tuple[Any, ...]:
        return (self.teacher,)  # and no reference

    def needs_reference(self) -> bool:
        return False

    def needs_old(self) -> bool:
        return False  # no ratio is taken

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        return torch.ones(len(traces))

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        args, balance = self.args, self.router_aux_loss_coef
        comparison = self.teacher.comparison(
            batch,
            temperature=args.temperature,
            beta=args.beta,
            top_k=args.loss_top_k,
            add_tail=args.loss_add_tail,
        )
        stats = score(
            model,
            batch,
            entropy=True,
            comparison=comparison,
            logp_grad=False,
            temperature=args.temperature,
            router=balance > 0,
        )
        assert stats.divergence_N is not None and stats.entropy_N is not None
        total = stats.divergence_N.sum()
        metrics = {"entropy": mean_metric(stats.entropy_N)}
        if stats.aux is not None:
            total = total + balance * stats.aux * len(stats.logp_N)
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {TOKENS: total}, metrics
