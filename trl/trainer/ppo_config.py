"""Options of PPO, in the words of both its forms: `train()`, and a loop of one's own."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from trl.rollout.rounds import RoundSizes, round_sizes

from .online_config import OnlineConfig

# What a field is if it is left out: for `trainer.train()`, and for a loop of one's own around `trainer.step`.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "learning_rate": (3e-6, 1.41e-5),
    "temperature": (0.7, 1.0),
    "kl_coef": (0.05, 0.2),
    "adap_kl_ctrl": (False, True),
}


@dataclass
class PPOConfig(OnlineConfig):
    """Options of `PPOTrainer`, in addition to `transformers.TrainingArguments`.

    A round is `per_device_train_batch_size * gradient_accumulation_steps` completions on each device, trained on in
    `num_mini_batches` optimizer steps, `num_iterations` times. `batch_size` and `mini_batch_size`, the words of a loop
    of one's own, say the same another way: `batch_size` completions in a round on each device, an optimizer step for
    each `mini_batch_size * gradient_accumulation_steps` of them.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate. Default: 3e-6; 1.41e-5 in a loop of one's own."}
    )
    temperature: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Softmax temperature. Default: 0.7; 1.0 in a loop of one's own."}
    )
    num_generations: int = field(default=1, metadata={"help": "Number of completions of each prompt."})
    num_iterations: int = field(default=4, metadata={"help": "Number of times that each completion is trained on."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps that a round is cut into."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Completions of a round on each device, for a loop of one's own."}
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Completions of a mini-batch; gradient_accumulation_steps of them make a step."}
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Completions that are sampled in all. Default: num_train_epochs over the data."}
    )
    kl_coef: float | None = field(
        default=None, metadata={"help": "Weight of the KL in the reward. Default: 0.05; 0.2 in a loop of one's own."}
    )
    kl_penalty: str = field(
        default="kl",
        metadata={
            "help": "The divergence of a token: difference of log-probs (kl), its size (abs), half its square (mse), "
            "the k3 estimate, or that of the whole distributions (full).",
            "choices": ["kl", "abs", "mse", "k3", "full"],
        },
    )
    adap_kl_ctrl: bool | None = field(
        default=None, metadata={"help": "Steer kl_coef towards `target`. Default: only in a loop of one's own."}
    )
    target: float = field(
        default=6.0, metadata={"help": "Divergence of a completion that kl_coef is steered to, in nats."}
    )
    horizon: float = field(default=10000.0, metadata={"help": "Completions over which kl_coef is steered."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards, for each token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Range to clip ratios to: 1 - cliprange to 1 + cliprange."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Range of a value's change in a round."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value function's loss."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the rewards of tokens to standard deviation 1."}
    )
    use_score_scaling: bool = field(default=False, metadata={"help": "Divide scores by their running deviation."})
    use_score_norm: bool = field(default=False, metadata={"help": "Subtract their running mean first."})
    score_clip: float | None = field(default=None, metadata={"help": "Largest size of a score."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a completion that did not end by itself."}
    )
    stop_token: str | None = field(
        default=None,
        metadata={
            "help": "`eos`: completions end with the tokenizer's end token alone. Default: as the "
            "model and its chat template end.",
            "choices": ["eos"],
        },  # fmt: skip
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "Token that ends completions, and no other does."}
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "Leave out a round's further steps once the policy is 1.5 * target_kl away."}
    )
    target_kl: float = field(
        default=1.0, metadata={"help": "With early_stopping: divergence from the round's policy, in nats a token."}
    )
    ratio_threshold: float = field(
        default=10.0, metadata={"help": "A step whose mean ratio is above this changes no weights."}
    )
    query_dataset: str = field(
        default="stanfordnlp/imdb",
        metadata={"help": "Texts that a loop of one's own continues where it passes no dataset."},
    )
    query_length: int = field(default=32, metadata={"help": "Tokens of such a text that are kept, from its beginning."})

    def __post_init__(self) -> None:
        if self.dynamic_sampling or self.replay_buffer_size:
            raise ValueError(
                "dynamic_sampling and replay_buffer_size compare the completions of a prompt with each other; PPO "
                "compares each with a value: leave them out"
            )
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id both say where completions end: give one of them")
        if self.mini_batch_size is not None:
            self.per_device_train_batch_size = self.mini_batch_size
        self.max_grad_norm: float = 0.0 if self.max_grad_norm is None else self.max_grad_norm
        super().__post_init__()
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.batch_size is not None:
            if self.batch_size % step:
                raise ValueError(
                    f"batch_size={self.batch_size} is no multiple of an optimizer step, mini_batch_size * "
                    f"gradient_accumulation_steps = {step}"
                )
            self.generation_batch_size = self.batch_size * self.world_size
        elif step % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches={self.num_mini_batches} does not divide the {step} completions of a device's round"
            )

    def resolved(self, in_steps: bool) -> "PPOConfig":
        """A copy in which what was left out has its value."""
        found = copy.copy(self)
        for name, values in DEFAULTS.items():
            if getattr(found, name) is None:
                setattr(found, name, values[in_steps])
        return found


def sizes_of_rounds(args: Any, accumulation: int) -> RoundSizes:
    """The sizes of a round: whole groups, cut into `num_mini_batches` unless another length of a round is set."""
    if args.generation_batch_size is not None or args.steps_per_generation is not None:
        return round_sizes(args, accumulation)
    least = math.lcm(args.num_mini_batches, args.num_generations)
    together = math.ceil(args.train_batch_size * accumulation * args.world_size / least) * least
    parts = args.num_mini_batches
    return RoundSizes(together // parts, together, together // args.num_generations, parts)


def steps_of_episodes(args: Any, sizes: RoundSizes) -> int:
    """Optimizer steps in which `total_episodes` completions, in whole rounds, are trained on."""
    return math.ceil(args.total_episodes / sizes.round) * sizes.parts * args.num_iterations
