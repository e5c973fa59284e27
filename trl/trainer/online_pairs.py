"""What the methods share that sample two completions of each prompt and learn which of them is better."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.advantages import total_reward
from trl.losses.call import call_with_available, named_loss
from trl.losses.online_preference import ONLINE_LOSSES, by_preference
from trl.losses.tokens import Metric, masked_mean_metric, mean_metric, seq_sum
from trl.notices import notify_once
from trl.rewards.verdicts import Verdicts
from trl.rollout.rounds import RoundSizes, round_sizes
from trl.rollout.traces import ScoredTrace, TrainingTrace
from trl.rollout.types import Environment, Sampler

from .attributes import shows
from .online import OnlineTrainer
from .online_config import OnlineConfig


@dataclass
class OnlinePairsConfig(OnlineConfig):
    """What all methods share that compare two completions of a prompt. Batch sizes count prompts."""

    least_generations = 2

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of AdamW."})
    num_generations: int = field(default=2, metadata={"help": "Number of completions of each prompt: always 2."})
    temperature: float = field(default=0.9, metadata={"help": "Softmax temperature for sampling."})
    max_completion_length: int | None = field(default=64, metadata={"help": "Maximum completion length in tokens."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens of prompt and completion; the prompt is cut."},
    )
    beta: list[float] | float = field(
        default=0.1,
        metadata={"help": "Weight of the reference; a list has one for each epoch."},
    )
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": f"Loss of a pair: {', '.join(ONLINE_LOSSES)}, or package.module:function."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the reward of a completion that does not end by itself."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model: a folder or a name, where no reward_funcs are given."}
    )
    judge: str | None = field(
        default=None,
        metadata={"help": "Judge in place of rewards: pair_rm, openai, hf, file.py:name."},
    )

    scheduled: ClassVar[tuple[str, ...]] = ("beta",)  # fields that may have one value for each epoch

    def __post_init__(self) -> None:
        for name in ("num_generations", "num_generations_eval"):
            if getattr(self, name) not in (2, None):
                raise ValueError(f"{name}={getattr(self, name)} is not possible: two completions are compared")
        for name in self.scheduled:
            values = getattr(self, name)
            values = list(values) if isinstance(values, list | tuple) else [values]
            if not values:
                raise ValueError(f"{name} is an empty list: give a number, or one for each epoch")
            if wrong := [each for each in values if not self._is_possible(name, each)]:
                raise ValueError(f"{name}={wrong[0]!r} is not possible: give {self._wanted(name)}")
            setattr(self, name, values if len(values) > 1 else values[0])
        named_loss(self.loss_type, ONLINE_LOSSES)
        if self.missing_eos_penalty is not None and self.missing_eos_penalty < 0:
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} would reward completions that do not end: give a "
                "positive number"
            )
        if self.max_length is not None:
            room = self.max_length - (self.max_completion_length or 0)
            if room < 1:
                raise ValueError(
                    f"max_length={self.max_length} leaves no token for the prompt beside max_completion_length="
                    f"{self.max_completion_length}: raise it, or leave it out"
                )
            self.max_prompt_length = min(self.max_prompt_length or room, room)
        super().__post_init__()

    def _is_possible(self, name: str, value: Any) -> bool:
        return isinstance(value, int | float) and value > 0

    def _wanted(self, name: str) -> str:
        return "numbers above 0"


class Compared(NamedTuple):
    """The pairs of a batch, two completions of a prompt in turn."""

    stats: Any
    logp_S: Tensor
    ref_logp_S: Tensor
    first_is_chosen_P: Tensor
    is_trained_P: Tensor  # whether there is a preference


@shows("loss_type", "missing_eos_penalty")
class OnlinePairsTrainer(OnlineTrainer):
    """A trainer on two completions of each prompt, compared by reward functions or by a judge.

    `reward_funcs` is what other online trainers take; or `judge` is a judge of pairs (`trl.rewards.pairwise`), a
    function or a name. A pair without a preference, as where both rewards are equal, is not trained on.
    """

    config_class: type[OnlinePairsConfig]
    least_generations = together = 2
    whole_groups = True
    asks_probabilities = False  # whether a judge is asked how sure it is

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        # Upstream's place of an argument that is refused by `compat`, as are those below.
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        peft_config: Any = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: None = None,
        *,
        judge: Any = None,
        quantization_config: Any = None,
        sampler: Sampler | None = None,
        environment: Environment | None = None,
    ) -> None:
        if args is None:
            args = self.config_class(output_dir=f"{self.method.upper()}")
        if judge is None and not reward_funcs:
            judge, reward_funcs = args.judge, args.reward_model_path
        if judge is None and not reward_funcs:
            raise ValueError("reward_funcs and judge are missing: give reward functions, a reward model, or a judge")
        if judge is not None and reward_funcs:
            raise ValueError("reward_funcs and judge are both given: give one of them, which decides what is better")
        if judge is not None and args.missing_eos_penalty is not None:
            raise ValueError("missing_eos_penalty is subtracted from rewards, and a judge gives none: leave it out")
        if judge is not None and args.reward_weights is not None:
            notify_once(f"reward_weights={args.reward_weights} has no effect with a judge")
        super().__init__(
            model,
            None if judge is not None else reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            ref_model=ref_model,
            sampler=sampler,
            environment=environment,
            judge=None if judge is None else Verdicts(judge, probabilities=self.asks_probabilities),
        )

    @property
    def beta(self) -> float:
        """The strength of the pull towards the reference in this epoch."""
        return self.of_epoch("beta")

    def of_epoch(self, name: str) -> float:
        """A field that may have one value for each epoch; the last one stays."""
        values = getattr(self.args, name)
        if not isinstance(values, list):
            return float(values)
        return float(values[min(int(self.state.epoch or 0), len(values) - 1)])

    @staticmethod
    def sizes_of_rounds(args: Any, accumulation: int) -> RoundSizes:
        return round_sizes(args, accumulation, completions=2)

    def needs_reference(self) -> bool:
        return True

    def needs_old(self) -> bool:
        return False  # no ratio is taken to the policy that sampled

    @property
    def scoring_temperature(self) -> float:
        return 1.0

    # --- from rewards to preferences ------------------------------------------------------------------------------

    def scores_of(self, traces: Sequence[ScoredTrace]) -> Tensor:
        """The total reward of each trace, less the penalty where it did not end by itself: [S]; NaN if none applies."""
        score_S = total_reward(self.rewards_of(traces), self.rewards.weights)
        penalty, ended_S = self.args.missing_eos_penalty, torch.tensor([each.finished for each in traces])
        return score_S if penalty is None else score_S - penalty * ~ended_S.bool()

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        """1 for the chosen and -1 for the rejected of each pair; 0 for both without a preference, and where one of them
        was cut and cut completions are not trained on."""
        score_P2 = self.scores_of(traces).view(-1, 2)
        trained_P2 = torch.tensor([each.trained > 0 for each in traces]).view(-1, 2)
        sign_P = (score_P2[:, 0] - score_P2[:, 1]).sign().nan_to_num(0.0) * trained_P2.all(1)
        return torch.stack([sign_P, -sign_P], 1).flatten()

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        return trace.advantage == 0.0

    def counts_of(self, traces: Sequence[TrainingTrace]) -> dict[str, float]:
        return {"pairs": sum(each.advantage != 0.0 for each in traces) / 2}

    # --- the loss -------------------------------------------------------------------------------------------------

    def compared(self, model: nn.Module, batch: Batch) -> Compared:
        stats = score(model, batch, router=self.router_aux_loss_coef > 0)
        logp_S = seq_sum(stats.logp_N, stats.seq_N, stats.sequences)
        ref_logp_S = seq_sum(batch["ref_logp_N"], stats.seq_N, stats.sequences)
        # The tokens of a completion share its advantage.
        advantage_S = torch.zeros_like(ref_logp_S).index_copy(0, stats.seq_N, batch["advantage_N"].to(ref_logp_S.dtype))
        first_P = advantage_S.view(-1, 2)[:, 0]
        return Compared(stats, logp_S, ref_logp_S, first_P > 0, first_P != 0)

    def preference_loss(self, pairs: Compared) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of each pair, [P], 0 without a preference; and what is logged of pairs, under upstream's names."""
        beta, trained_P = self.beta, pairs.is_trained_P
        available: dict[str, Any] = {"beta": beta}
        for name, values_S in (
            ("score", pairs.logp_S - pairs.ref_logp_S), ("logp", pairs.logp_S), ("ref_logp", pairs.ref_logp_S)
        ):  # fmt: skip
            both = by_preference(values_S, pairs.first_is_chosen_P)
            available |= {f"chosen_{name}_P": both.chosen_P, f"rejected_{name}_P": both.rejected_P}
        loss_P = call_with_available(named_loss(self.args.loss_type, ONLINE_LOSSES)[1], available) * trained_P
        chosen_P, rejected_P = (beta * available[f"{which}_score_P"].detach() for which in ("chosen", "rejected"))
        kl_S = (pairs.logp_S - pairs.ref_logp_S).detach()
        metrics = {
            "objective/kl": mean_metric(kl_S),
            "objective/entropy": mean_metric(-pairs.logp_S),
            "rewards/chosen": masked_mean_metric(chosen_P, trained_P),
            "rewards/rejected": masked_mean_metric(rejected_P, trained_P),
            "rewards/accuracies": masked_mean_metric((chosen_P > rejected_P).float(), trained_P),
            "rewards/margins": masked_mean_metric(chosen_P - rejected_P, trained_P),
            "logps/chosen": masked_mean_metric(available["chosen_logp_P"], trained_P),
            "logps/rejected": masked_mean_metric(available["rejected_logp_P"], trained_P),
            "beta": Metric(kl_S.new_full((), beta), 1.0),
        }
        return loss_P, metrics

    def with_balance(self, total: Tensor, items: Tensor, stats: Any, metrics: dict[str, Metric]) -> Tensor:
        """The sum of a loss over `items` with the load-balancing term of a mixture of experts."""
        if stats.aux is None:
            return total
        metrics["aux_loss"] = mean_metric(stats.aux)
        return total + self.router_aux_loss_coef * stats.aux * items.sum()

    # --- what is logged of a round --------------------------------------------------------------------------------

    def _log_round(self, mode: str, traces: Sequence[ScoredTrace], generations: int) -> None:
        super()._log_round(mode, traces, generations)
        ended_S = torch.tensor([float(each.finished) for each in traces])
        for name, values in self.metrics_of_round(self.scores_of(traces), ended_S).items():
            known = values[~values.isnan()]
            if len(known):
                self._add(mode, {name: self._known_to_all(known.mean(), mode, float(len(known)))})

    def metrics_of_round(self, score_S: Tensor, ended_S: Tensor) -> dict[str, Tensor]:
        """Values whose means are logged, by name; of each completion, two of a prompt in turn: its reward, and whether
        it ended by itself. NaN is left out."""
        first_P, second_P = score_S.view(-1, 2).unbind(1)
        return {
            "objective/model_scores": first_P,
            "objective/ref_scores": second_P,
            "objective/scores_margin": first_P - second_P,
            "val/model_contain_eos_token": ended_S[::2],
            "val/ref_contain_eos_token": ended_S[1::2],
        }
