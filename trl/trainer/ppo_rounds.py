"""PPO's rounds and steps, which `train()` and a loop of one's own share."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trl.engine.forest import Batch
from trl.engine.head import TokenStats, plain_linear
from trl.engine.measures import Comparison
from trl.engine.score import score
from trl.engine.teacher import predictions
from trl.losses.advantages import total_reward
from trl.losses.policy import TOKENS
from trl.losses.tokens import Metric
from trl.models.unwrap import unwrap, without_value_head
from trl.notices import notify_once
from trl.rollout.collect import Scorer
from trl.rollout.rounds import RoundSizes
from trl.rollout.traces import Columns, ScoredTrace, TrainingTrace
from trl.rollout.types import Sampling

from .kl_control import kl_controller
from .online import OnlineTrainer
from .ppo_config import DEFAULTS, PPOConfig, sizes_of_rounds, steps_of_episodes
from .ppo_guards import Guards
from .ppo_inputs import each_of
from .ppo_losses import clipped_losses
from .ppo_scores import ScoreScaling
from .ppo_stats import round_means
from .returns import Judged, give_returns, token_kl
from .scoring import by_policy
from .step import Step
from .value_function import ValueFunction


class PPORounds(OnlineTrainer):
    """Rewards of completions, spread over their tokens by a value function; a policy that moves by clipped ratios."""

    config_class = PPOConfig
    method = "ppo"
    in_steps = False  # whether the loop is the user's own

    def __init__(
        self,
        args: Any = None,
        processing_class: Any = None,
        model: Any = None,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Any = None,
        peft_config: Any = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        quantization_config: Any = None,
        sampler: Any = None,
        environment: Any = None,
    ) -> None:
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model is the model itself, which moves: leave it out, and its start is the reference")
        judges = [*each_of(reward_model), *each_of(reward_funcs)]
        args = (args if args is not None else PPOConfig(output_dir="PPO")).resolved(self.in_steps)
        self.value_function = ValueFunction(value_model)
        self.kl_ctl = kl_controller(args)
        self.scaling, self.guards = ScoreScaling(args), Guards(args)
        self.learns = True  # whether the round under way is one of training
        self.divergence = 0.0  # the mean of its completions', in nats
        self.round_scores = torch.zeros(0)
        super().__init__(
            without_value_head(model),
            judges or None,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            ref_model=without_value_head(ref_model),
            sampler=sampler,
            environment=environment,
        )
        if args.total_episodes is not None and self.args.max_steps < 0:
            self.args.max_steps = steps_of_episodes(args, self.round_sizes)

    # --- rounds ---------------------------------------------------------------------------------------------------

    @staticmethod
    def sizes_of_rounds(args: Any, accumulation: int) -> RoundSizes:
        return sizes_of_rounds(args, accumulation)

    def parts_of(self) -> tuple[Any, ...]:
        return (*super().parts_of(), self.value_function)

    def sampling_of(self, **asked: Any) -> Sampling:
        found, args = super().sampling_of(**asked), self.args
        end = self.processing_class.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        return found if end is None else replace(found, stop_ids=(end,))

    def kl_in_reward(self) -> bool:
        return True

    def needs_reference(self) -> bool:
        return self.args.kl_coef != 0.0

    def needs_old(self) -> bool:
        return True  # one forward pass gives them with the values

    def is_on_policy(self) -> bool:
        return False

    def scorers(self, model: nn.Module) -> list[Scorer]:
        own = {"old_logps": "logp_N", "values": "value_N"}
        if not self.needs_reference():
            return [self.scorer(functools.partial(by_policy, model, values=True), own)]
        if self.args.kl_penalty == "full":
            both = {**own, "ref_logps": "other_logp_N", "divergences": "divergence_N"}
            return [self.scorer(functools.partial(self._compared, model), both)]
        reference = self.scorer(self.reference.ask(model), {"ref_logps": "logp_N"})
        return [reference, self.scorer(functools.partial(by_policy, model, values=True), own)]

    def _compared(self, model: nn.Module, batch: Batch, temperature: float) -> TokenStats:
        """A batch scored by the policy, its distributions compared with the reference's."""
        assert self.reference.policy is not None
        with self.reference.policy.standing_in(model) as other:
            if other is model and plain_linear(unwrap(model).get_output_embeddings()) is None:
                raise ValueError("kl_penalty='full' cannot switch off an adapter on the head: choose another penalty")
            comparison = Comparison(predictions(other, batch, temperature=temperature), beta=1.0)
        return by_policy(model, batch, temperature=temperature, values=True, comparison=comparison)

    def _columns(self) -> list[str]:
        names = [name for name in super()._columns() if name != "ref_logps"]  # read when rewards are made
        return [*names, "values", "returns", "advantages"]

    def token_kl(self, columns: Columns) -> np.ndarray:
        """The divergence of each token of a trace from the reference, [T]."""
        return token_kl(columns, self.args.kl_penalty)

    def divergence_of(self, columns: Columns) -> float:
        own = columns.get("mask", slice(None))
        return float(self.token_kl(columns)[own].sum(dtype=np.float64))

    def collect(self, rows: list[dict[str, Any]], generations: int, training: bool) -> list[TrainingTrace]:
        self.learns = training
        traces = super().collect(rows, generations, training)
        if training:
            self.end_round(len(traces))
        return traces

    def end_round(self, traces: int) -> None:
        """What is steered from round to round."""
        self.kl_ctl.update(self.divergence, traces)
        self.guards.begin_round()

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        reward_S = total_reward(self.rewards_of(traces), self.rewards.weights).nan_to_num(0.0)
        score_S = self.scaling.scores(reward_S, [each.finished for each in traces], learns=self.learns)
        kl_S = self.kl_of(traces)
        self.divergence = 0.0 if kl_S is None or not len(kl_S) else float(kl_S.mean())
        self.round_scores = score_S
        several = len({each.holder for each in traces}) > 1
        give_returns(
            [
                Judged(each.columns, each.trained, float(one))
                for each, one in zip(traces, score_S, strict=True)
                if each.columns is not None
            ],
            token_kl=self.token_kl,
            kl_coef=self.kl_ctl.value,
            added_up=self._over_ranks if several else lambda numbers: numbers,
            **{name: getattr(self.args, name) for name in ("gamma", "lam", "whiten_rewards")},
        )
        return torch.ones(len(traces))  # those of tokens are a column

    def _over_ranks(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self.args.device)
        torch.distributed.all_reduce(numbers)
        return numbers.cpu()

    def _log_round(self, mode: str, traces: Sequence[ScoredTrace], generations: int) -> None:
        super()._log_round(mode, traces, generations)
        means = round_means(self.round_scores, self.divergence, self.kl_ctl.value, traces)
        self._add(mode, {name: self._known_to_all(each, mode, float(len(traces))) for name, each in means.items()})
        own = [each.columns for each in traces if each.columns is not None]
        surprise = torch.tensor(-sum(float(each["old_logps"].sum()) for each in own), device=self.args.device)
        self._add(mode, {"objective/entropy": Metric(surprise, float(len(own)))})

    # --- the step -------------------------------------------------------------------------------------------------

    def forget_step(self) -> None:
        self.guards.seen = 0.0

    def train_on(self, model: nn.Module, traces: list[TrainingTrace]) -> Tensor:
        args = self.args
        if self.guards.is_over:
            return torch.zeros((), device=args.device)
        loss = super().train_on(model, traces)
        changes = self.guards.end_step(args.device, args.world_size)
        if not changes and self.is_deepspeed_enabled:
            notify_once("a step went further than ratio_threshold or target_kl: DeepSpeed has taken it all the same")
        if not changes:
            model.zero_grad(set_to_none=not args.fp16)
        self._add("train", {"policy/steps_left_out": self._known_to_all(float(not changes))})
        return loss

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        stats = score(model, batch, entropy=True, values=True, temperature=self.args.temperature)
        found = clipped_losses(stats, batch, self.args)
        if step.training:
            self.guards.observe(found.ratio_N, found.log_ratio_N)
        return {TOKENS: (found.policy_N + self.args.vf_coef * found.value_N).sum()}, found.metrics()

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        found = super().derived(means)
        if "val/ratio_squared" in means:
            found["val/ratio_var"] = max(means["val/ratio_squared"] - means["val/ratio"] ** 2, 0.0)
        return found

    def method_state(self) -> dict[str, Any]:
        state = {**super().method_state(), **self.guards.state(), **self.scaling.state()}
        return {**state, "kl_coef": self.kl_ctl.value}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self.guards.load_state(state)
        self.scaling.load_state(state)
        self.kl_ctl.value = state.get("kl_coef", self.kl_ctl.value)

    def report(self) -> list[str]:
        args = self.args
        steers = f", steered to {args.target:g} nats a completion" if args.adap_kl_ctrl else ""
        return [
            *super().report(),
            f"divergence in the reward: {args.kl_penalty}, weighted {self.kl_ctl.value:g}{steers}",
        ]

    def full_rate(self) -> float:
        return DEFAULTS["learning_rate"][self.in_steps]
