"""Group-relative policy optimisation and its family: completions compared with the others of their prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.engine.score import score
from trl.losses.advantages import ADVANTAGES
from trl.losses.call import call_with_available, named_loss
from trl.losses.policy import (
    POLICY_LOSSES,
    TOKENS,
    PolicyLoss,
    correction,
    high_entropy,
    k3,
    off_policy_keep,
    pool,
    quantile,
    ratio,
)
from trl.losses.tokens import Metric, largest, mean_metric, seq_mean, smallest
from trl.models.unwrap import evaluating
from trl.rollout.traces import ScoredTrace, TrainingTrace
from trl.rollout.types import Environment, Sampler

from . import evaluation
from .attributes import shows
from .online import OnlineTrainer
from .online_config import OnlineConfig
from .step import Statistics, Step

LEVELS = ("token", "sequence", "sequence_token")
CORRECTIONS = tuple(f"{level}_{what}" for level in ("token", "sequence", "geometric") for what in ("truncate", "mask"))


@dataclass
class GRPOConfig(OnlineConfig):
    """Options of `GRPOTrainer`, in addition to `transformers.TrainingArguments`."""

    least_generations = 2

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference; 0: no reference model."})
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": f"Surrogate and how tokens are added up: {', '.join(sorted(POLICY_LOSSES))}; or your own loss, "
            "as package.module:function or, in Python, as the function itself (see losses.policy.PolicyLoss)."
        },
    )
    epsilon: float = field(
        default=0.2, metadata={"help": "Lower clipping range: clip ratios below 1 - epsilon (GMPO's paper: 0.4)."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clipping range: clip ratios above 1 + epsilon_high. Default: epsilon."}
    )
    delta: float | None = field(
        default=None,
        metadata={"help": "Hard upper bound on the ratio, including negative advantages (two-sided clipping)."},
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={"help": "Importance ratio per token or per sequence (GSPO: sequence).", "choices": list(LEVELS)},
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Standard deviation used to scale rewards: per group, per batch, or none.",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={"help": "How several rewards are combined into an advantage.", "choices": sorted(ADVANTAGES)},
    )
    sapo_temperature_pos: float = field(default=1.0, metadata={"help": "Temperature of sapo for positive advantages."})
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "Temperature of sapo for advantages <= 0."})
    vespo_k_pos: float = field(default=2.0, metadata={"help": "Exponent k of vespo's weight for advantages >= 0."})
    vespo_lambda_pos: float = field(default=3.0, metadata={"help": "Lambda of vespo's weight for advantages >= 0."})
    vespo_k_neg: float = field(default=3.0, metadata={"help": "Exponent k of vespo's weight for negative advantages."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "Lambda of vespo's weight for negative advantages."})
    top_entropy_quantile: float = field(
        default=1.0, metadata={"help": "Share of the tokens trained on: those with the highest entropy."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    use_adaptive_entropy: bool = field(
        default=False,
        metadata={"help": "Raise the entropy bonus while entropy is below entropy_target, else lower it."},
    )
    entropy_coef_min: float = field(default=0.0, metadata={"help": "Minimum weight of the adaptive entropy bonus."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Maximum weight of the adaptive entropy bonus."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "Change of the adaptive weight per step."})
    entropy_target: float = field(default=0.2, metadata={"help": "Target entropy in nats of the adaptive bonus."})
    off_policy_mask_threshold: float | None = field(
        default=None, metadata={"help": "Maximum drift (mean log-ratio) of completions with a negative advantage."}
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Weigh the KL by the importance ratio, so that its gradient is unbiased."}
    )
    rollout_correction: bool = field(
        default=False,
        metadata={"help": "Weigh tokens by the trainer's over the sampler's probability (importance sampling)."},
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask", metadata={"help": "Kind of rollout correction.", "choices": list(CORRECTIONS)}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Maximum correction weight."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Minimum correction weight."}
    )

    def __post_init__(self) -> None:
        if self.scale_rewards in (True, False):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        policy_loss(self.loss_type)
        for name, known in (
            ("importance_sampling_level", LEVELS),
            ("scale_rewards", ("group", "batch", "none")),
            ("multi_objective_aggregation", ADVANTAGES),
            ("vllm_importance_sampling_mode", CORRECTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        if self.delta is not None and self.delta <= 1 + self.epsilon:
            raise ValueError(
                f"delta={self.delta} would undo the clipping: give more than 1 + epsilon = {1 + self.epsilon}"
            )
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile={self.top_entropy_quantile} is a share of the tokens, above 0, at most 1"
            )
        weighs = self.rollout_correction and not self._corrects_tokens()
        if weighs and policy_loss(self.loss_type).corrects_itself:
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} weighs whole sequences, but "
                f"{self.loss_type} multiplies the weights of their tokens: set it to token_truncate or token_mask"
            )
        super().__post_init__()

    def _corrects_tokens(self) -> bool:
        return self.vllm_importance_sampling_mode.startswith("token")


@shows(
    *("loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation", "epsilon_high"),
    *("top_entropy_quantile", "off_policy_mask_threshold", "use_adaptive_entropy", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    epsilon_low="epsilon",
)
class GRPOTrainer(OnlineTrainer):
    """Trains a causal language model on its own completions, scored by reward functions.

    `reward_funcs` is a function, a model, a name or a list of them: see `rewards.functions.RewardFunctions`. Rows have
    a `prompt` (a string or messages) and whatever columns the functions read. Shao et al. 2024, arXiv:2402.03300; the
    default `loss_type` is that of DAPO, Yu et al. 2025, arXiv:2503.14476.
    """

    config_class = GRPOConfig
    method = "grpo"
    tools, environments, rollout_func = (), None, None  # read by upstream's callers; there are none yet

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        # Three that have their place, and are refused by `compat`.
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
        *,
        ref_model: Any = None,
        sampler: Sampler | None = None,
        environment: Environment | None = None,
    ) -> None:
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
            quantization_config=quantization_config,
            peft_config=peft_config,
            ref_model=ref_model,
            sampler=sampler,
            environment=environment,
        )

    def on_ready(self) -> None:
        super().on_ready()
        self.bonus = EntropyBonus(self.args)

    @property
    def entropy_coef(self) -> float:
        """The present weight of the entropy bonus."""
        return self.bonus.coef

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        return ADVANTAGES[self.args.multi_objective_aggregation](
            rewards_SF=self.rewards_of(traces),
            weights_F=self.rewards.weights,
            num_generations=generations,
            scale_rewards=self.args.scale_rewards,
        )

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        still = trace.advantage == 0.0 and self.args.beta == 0.0 and not self.bonus.is_used
        # Where tokens are chosen by entropy, all of them say what is high.
        alone = self.router_aux_loss_coef == 0.0 and self.args.top_entropy_quantile == 1.0
        return super().has_no_gradient(trace) or (still and alone)

    def needs_old(self) -> bool:
        return super().needs_old() or (self.args.rollout_correction and not self.is_on_policy())

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> Statistics:
        """Which tokens of the step are trained on by their entropy."""
        args = self.args
        if args.top_entropy_quantile == 1.0:
            return Statistics()
        entropies = []
        for batch in batches:
            with torch.no_grad(), self.compute_loss_context_manager(), evaluating(model):
                stats = score(model, self._prepare_inputs(batch), entropy=True, temperature=args.temperature)
            assert stats.entropy_N is not None
            entropies.append(stats.entropy_N.float())
        together = torch.cat(entropies or [torch.zeros(0, device=args.device)])
        if args.world_size > 1 and training:
            together = torch.cat([part.to(together.device) for part in _gathered(together)])
        if not len(together):
            return Statistics()
        threshold = quantile(together, 1 - args.top_entropy_quantile)
        # The same numbers on both sides, so that the token on the threshold is not left to rounding.
        columns = [{"token_weight_N": high_entropy(entropy_N, threshold=threshold)} for entropy_N in entropies]
        counts = {}
        if training and self.bonus.is_used:
            counts[ENTROPY] = high_entropy(together, threshold=threshold).sum()
        return Statistics(columns=columns, counts=counts)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        return self.policy_terms(self.scored(model, batch), batch, step)

    def scored(self, model: nn.Module, batch: Batch, **asked: Any) -> TokenStats:
        """What the surrogate reads of the policy; `asked` are further options of `engine.score.score`."""
        return score(
            model,
            batch,
            entropy=True,
            entropy_grad=self.bonus.is_used,
            temperature=self.args.temperature,
            router=self.router_aux_loss_coef > 0,
            **asked,
        )

    def policy_terms(self, stats: TokenStats, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        """The loss and metrics of the surrogate, as `loss` returns them."""
        args, balance, bonus = self.args, self.router_aux_loss_coef, self.bonus
        chosen = policy_loss(args.loss_type)
        assert stats.entropy_N is not None
        logp_N, seq_N, sequences = stats.logp_N, stats.seq_N, stats.sequences
        advantage_N = batch["advantage_N"]
        # On the policy that sampled them the ratio is one, and no other log-probs are needed.
        old_logp_N = logp_N.detach() if step.on_policy else batch["old_logp_N"]
        log_ratio_N = logp_N - old_logp_N
        pooled_N = pool(
            log_ratio_N, seq_N=seq_N, sequences=sequences, importance_sampling_level=args.importance_sampling_level
        )
        ratio_N = ratio(pooled_N)
        weight_N = None
        if args.rollout_correction:
            weight_N = correction(
                policy_logp_N=old_logp_N,
                sampler_logp_N=batch["sampler_logp_N"],
                seq_N=seq_N,
                sequences=sequences,
                mode=args.vllm_importance_sampling_mode,
                low=args.vllm_importance_sampling_clip_min,
                high=args.vllm_importance_sampling_clip_max,
            )
        available = {
            "log_ratio_N": log_ratio_N,
            "ratio_N": ratio_N,
            "logp_N": logp_N,
            "advantage_N": advantage_N,
            "seq_N": seq_N,
            "sequences": sequences,
            "log_correction_N": None if weight_N is None else weight_N.log(),
            **{name: getattr(args, name) for name in SETTINGS},
        }
        loss_N = call_with_available(chosen.surrogate, available)
        if args.off_policy_mask_threshold is not None:
            loss_N = loss_N * off_policy_keep(
                advantage_N=advantage_N,
                logp_N=logp_N,
                sampler_logp_N=batch["sampler_logp_N"],
                seq_N=seq_N,
                sequences=sequences,
                off_policy_mask_threshold=args.off_policy_mask_threshold,
            )
        token_weight_N = batch["token_weight_N"] if "token_weight_N" in batch else torch.ones_like(logp_N)
        loss_N = loss_N * token_weight_N
        if weight_N is not None and not chosen.corrects_itself:
            loss_N = loss_N * weight_N
        metrics = {"entropy": mean_metric(stats.entropy_N)}
        for name, function in chosen.metrics:
            metrics[name] = mean_metric(seq_mean(call_with_available(function, available), seq_N, sequences))
        if weight_N is not None:
            metrics.update(self._sampler_gap(old_logp_N - batch["sampler_logp_N"], weight_N, seq_N, sequences))
        if args.beta != 0.0:
            kl_N = k3(logp_N=logp_N, ref_logp_N=batch["ref_logp_N"])
            if args.use_bias_correction_kl:
                kl_N = kl_N * ratio_N
            loss_N = loss_N + args.beta * kl_N
            metrics["kl"] = mean_metric(kl_N)
        sums = {chosen.divide_by: chosen.add_up(loss_N, seq_N, sequences)}
        if bonus.is_used:
            if step.training:
                # What one micro-batch counts for, so that the metric is the step's mean.
                share = float(step.count(chosen.divide_by)) / (len(step.batches) * args.world_size)
                metrics["policy_loss"] = Metric(sums[chosen.divide_by].detach(), share)
                bonus.observe(stats.entropy_N.detach(), token_weight_N)
            total = sums.get(ENTROPY, 0.0) - bonus.weight * (stats.entropy_N * token_weight_N).sum()
            sums[ENTROPY] = total
        if stats.aux is not None:
            sums[TOKENS] = sums.get(TOKENS, 0.0) + balance * stats.aux * len(logp_N)
            metrics["aux_loss"] = mean_metric(stats.aux)
        read_N = log_ratio_N if chosen.reads_tokens else pooled_N
        metrics.update(self._clipping(chosen, ratio(read_N.detach()), advantage_N, seq_N, sequences))
        return sums, metrics

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """In an evaluation the part of the loss that is not the bonus; a router's term would be in it too."""
        found = super().derived(means)
        part = evaluation.part(policy_loss(self.args.loss_type).divide_by)
        if self.bonus.is_used and part in means and not self.aux_loss_enabled:
            found["policy_loss"] = means[part]
        return found

    def counts_of(self, traces: Sequence[TrainingTrace]) -> dict[str, float]:
        found = super().counts_of(traces)
        if self.bonus.is_used:
            found[ENTROPY] = found["tokens"] * self.args.top_entropy_quantile
        return found

    def _clipping(
        self, chosen: PolicyLoss, ratio_N: Tensor, advantage_N: Tensor, seq_N: Tensor, sequences: int
    ) -> dict[str, Metric]:
        """How often the surrogate clips, by the ratio that it reads."""
        args = self.args
        if chosen.bounds is None:
            return {}
        low, high = chosen.bounds(args.epsilon, args.epsilon_high)
        if args.importance_sampling_level == "sequence" and not chosen.reads_tokens:
            # One ratio for each sequence, and one voice.
            advantage_N, ratio_N = seq_mean(advantage_N, seq_N, sequences), seq_mean(ratio_N, seq_N, sequences)
            seq_N = torch.arange(sequences, device=ratio_N.device)
        low_N = ((ratio_N < low) & (advantage_N < 0)).float()
        high_N = ((ratio_N > high) & (advantage_N > 0)).float()
        if not low:
            return {f"{args.loss_type}_clip_ratio": mean_metric(high_N)}
        found = {
            "clip_ratio/low_mean": mean_metric(low_N),
            "clip_ratio/high_mean": mean_metric(high_N),
            "clip_ratio/region_mean": mean_metric(torch.maximum(low_N, high_N)),
        }
        if len(ratio_N):
            found["clip_ratio/low_min"] = smallest(seq_mean(low_N, seq_N, sequences))
            found["clip_ratio/high_max"] = largest(seq_mean(high_N, seq_N, sequences))
        return found

    def _sampler_gap(self, gap_N: Tensor, weight_N: Tensor, seq_N: Tensor, sequences: int) -> dict[str, Metric]:
        """How far the sampler's log-probs are from the trainer's, and what is made of that."""
        far_N = gap_N.detach().abs()
        far_N = far_N[~far_N.isnan()]
        weight = weight_N if self.args._corrects_tokens() else seq_mean(weight_N, seq_N, sequences)
        found = {}
        for name, values in (("sampling_logp_difference", far_N), ("importance_sampling_ratio", weight)):
            if len(values):
                found[f"sampling/{name}/mean"] = mean_metric(values)
                found[f"sampling/{name}/max"] = largest(values)
        if len(weight):
            found["sampling/importance_sampling_ratio/min"] = smallest(weight)
        return found

    def forget_step(self) -> None:
        self.bonus.seen = 0.0

    def train_on(self, model: nn.Module, traces: list[TrainingTrace]) -> Tensor:
        loss = super().train_on(model, traces)
        if self.bonus.is_used:
            self.bonus.end_step(self.args.device, self.args.world_size)
            self._add("train", {"entropy_coef": Metric(torch.tensor(self.bonus.coef, device=self.args.device), 1.0)})
        return loss

    def method_state(self) -> dict[str, Any]:
        return {**super().method_state(), **self.bonus.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self.bonus.load_state(state)


class EntropyBonus:
    """The weight of the entropy in the loss, which follows the entropy where that is asked for.

    Adaptive: while the entropy is below its target the coefficient rises, else it falls, and the bonus acts only below
    the target. Skywork-OR1, He et al. 2025, arXiv:2505.22312.
    """

    def __init__(self, args: GRPOConfig) -> None:
        self.args = args
        self.coef, self.last_entropy = args.entropy_coef, float("inf")
        self.seen: Tensor | float = 0.0  # entropy and tokens of the step so far, [2]

    @property
    def is_used(self) -> bool:
        return self.args.use_adaptive_entropy or self.args.entropy_coef != 0.0

    @property
    def weight(self) -> float:
        """The weight of the bonus in this step."""
        acts = not self.args.use_adaptive_entropy or self.last_entropy <= self.args.entropy_target
        return self.coef if acts else 0.0

    def observe(self, entropy_N: Tensor, weight_N: Tensor) -> None:
        """Take in the entropy of a micro-batch of training."""
        if self.args.use_adaptive_entropy:
            self.seen = self.seen + torch.stack([(entropy_N * weight_N).sum(), weight_N.sum()])

    def end_step(self, device: torch.device, ranks: int) -> None:
        """Move the coefficient by the entropy of the step on all ranks."""
        args = self.args
        if not args.use_adaptive_entropy:
            return
        seen, self.seen = torch.zeros(2, device=device) + self.seen, 0.0
        if ranks > 1:
            torch.distributed.all_reduce(seen)
        self.last_entropy = (seen[0] / seen[1].clamp(min=1)).item()
        change = args.entropy_coef_delta if self.last_entropy <= args.entropy_target else -args.entropy_coef_delta
        self.coef = min(max(self.coef + change, args.entropy_coef_min), args.entropy_coef_max)

    def state(self) -> dict[str, float]:
        return {"entropy_coef": self.coef, "last_entropy": self.last_entropy}

    def load_state(self, state: dict[str, Any]) -> None:
        self.coef = state.get("entropy_coef", self.args.entropy_coef)
        self.last_entropy = state.get("last_entropy", float("inf"))


def policy_loss(loss_type: Any) -> PolicyLoss:
    """The loss that `loss_type` names. A function alone is a surrogate that is averaged over tokens."""
    _, found = named_loss(loss_type, POLICY_LOSSES)
    return found if isinstance(found, PolicyLoss) else PolicyLoss(found)


ENTROPY = "entropy_tokens"
# Fields that surrogates may ask for.
SETTINGS = (
    *("epsilon", "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
)


def _gathered(values: Tensor) -> list[Tensor]:
    """The values of all ranks, however many each has."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, values.cpu())
    return found
