"""MiniLLM: the reverse KL to a teacher as a reward, with the part of it that needs no sampling as a loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.config import TeacherFields
from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.distillation import teacher_advantage
from trl.losses.policy import TOKENS
from trl.losses.tokens import Metric, mean_metric
from trl.rollout.traces import ScoredTrace, TrainingTrace

from .grpo import GRPOConfig, GRPOTrainer
from .step import Step
from .teacher import Teacher


@dataclass
class MiniLLMConfig(TeacherFields, GRPOConfig):
    """Options of `MiniLLMTrainer`, in addition to those of `GRPOConfig`."""

    least_generations = 1

    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    rkl_advantage: bool = field(
        default=True, metadata={"help": "Add the teacher's log-prob minus the student's to the advantage of a token."}
    )
    single_step_decomposition: bool = field(
        default=True, metadata={"help": "Add the reverse KL of each token's distribution to the loss."}
    )
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions when they are compared."}
    )
    gamma: float = field(
        default=0.0, metadata={"help": "Discount of the rewards of later tokens in a token's advantage; 0: none."}
    )
    length_normalization: bool = field(
        default=True, metadata={"help": "Divide the discounted rewards by the sum of their discounts."}
    )

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        if self.num_generations == 1:
            self.scale_rewards = "none"  # a group of one has no deviation
        if not (self.rkl_advantage or self.single_step_decomposition):
            raise ValueError(
                "rkl_advantage=False and single_step_decomposition=False leave nothing to learn from the teacher: set "
                "one of them (GRPOTrainer learns from rewards alone)"
            )
        super().__post_init__()


class MiniLLMTrainer(GRPOTrainer):
    """Trains a causal language model on completions of its own, rewarded by a teacher's log-probs.

    The gradient of the reverse KL to the teacher is a policy gradient: each token is rewarded by how much more likely
    the teacher finds it than the student. The first term of the sum, the divergence of the token's own distribution, is
    taken in full (`single_step_decomposition`). `reward_funcs` add rewards of their own, as in GRPO; none are needed.
    `teacher_model` is a model, a name or a path; it has the student's vocabulary. Gu et al. 2023, arXiv:2306.08543.
    """

    config_class = MiniLLMConfig
    method = "minillm"
    needs_rewards = False

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        reward_funcs: Any = None,
        args: MiniLLMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        rollout_func: None = None,  # has its place, and is refused by `compat`
        **further: Any,
    ) -> None:
        self.teacher = Teacher(teacher_model, args, model)
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            **further,
        )

    @property
    def teacher_model(self) -> nn.Module:
        return self.teacher.model

    def parts_of(self) -> tuple[Any, ...]:
        return (*super().parts_of(), self.teacher)

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        if not self.rewards.names:
            return torch.zeros(len(traces))  # the teacher gives it, where the traces are trained on
        return super().credit(traces, generations)

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        return not trace.trained

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        args = self.args
        comparison = self.teacher.comparison(batch, temperature=args.kd_temperature, beta=1.0)
        if args.kd_temperature == args.temperature:
            stats = compared = self.scored(model, batch, comparison=comparison)
        else:
            stats = self.scored(model, batch)
            compared = score(model, batch, comparison=comparison, temperature=args.kd_temperature)
        assert compared.divergence_N is not None and compared.other_logp_N is not None
        metrics = {"teacher_divergence": mean_metric(compared.divergence_N)}
        if args.rkl_advantage:
            reward_N = teacher_advantage(
                logp_N=compared.logp_N,
                teacher_logp_N=compared.other_logp_N,
                seq_N=compared.seq_N,
                sequences=compared.sequences,
                gamma=args.gamma,
                length_normalization=args.length_normalization,
            )
            batch = {**batch, "advantage_N": batch["advantage_N"] + reward_N}
            metrics["teacher_advantage"] = mean_metric(reward_N)
        sums, policy_metrics = self.policy_terms(stats, batch, step)
        if args.single_step_decomposition:
            sums[TOKENS] = sums.get(TOKENS, 0.0) + compared.divergence_N.sum()
        return sums, {**policy_metrics, **metrics}
