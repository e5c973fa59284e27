"""Classes and types of older releases that are something else here."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import PreTrainedModel

from trl.config import ScriptArguments
from trl.trainer.grpo import GRPOConfig

RewardFunc = str | PreTrainedModel | Callable[..., list[float | None]]
RolloutFunc = Callable[..., dict[str, Any]]
EnvironmentFactory = Callable[[], Any]
DatasetType = TypeVar("DatasetType")


@dataclass
class GMPOConfig(GRPOConfig):
    """`GRPOConfig` with the loss of GMPO, Zhao et al. 2025, arXiv:2507.20673."""

    loss_type: str = field(default="gmpo", metadata={"help": "Loss of the policy."})
    epsilon: float = field(default=0.4, metadata={"help": "Bound of the log-ratio, on both sides."})


@dataclass
class GRPOWithReplayBufferConfig(GRPOConfig):
    """`GRPOConfig` that keeps 64 earlier groups, to replace groups with equal rewards."""

    replay_buffer_size: int = field(
        default=64, metadata={"help": "Number of earlier groups kept to replace groups with equal rewards; 0: none."}
    )


@dataclass
class SftScriptArguments(ScriptArguments):
    """The arguments of `trl sft` in 0.8, which a script hands to the trainer."""

    dataset_text_field: str | None = field(default=None, metadata={"help": "Column of the texts."})
    dataset_train_name: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_name: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_seq_length: int = field(default=512, metadata={"help": "Maximum tokens of a row."})
    packing: bool = field(default=False, metadata={"help": "Join rows up to max_seq_length."})


@dataclass
class DpoScriptArguments(ScriptArguments):
    """The arguments of `trl dpo` in 0.8, which a script hands to the trainer."""

    beta: float = field(default=0.1, metadata={"help": "Weight of the divergence from the reference."})
    max_length: int = field(default=512, metadata={"help": "Maximum tokens of a row."})
    max_prompt_length: int = field(default=128, metadata={"help": "Maximum tokens of a prompt."})
    max_target_length: int = field(default=128, metadata={"help": "Not read: it concerned encoder-decoders."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Show completions in evaluations."})


class FDivergenceConstants:
    """Keys of f_divergence_params in 0.9 to 0.28."""

    ALPHA_DIVERGENCE_COEF_KEY = "alpha_divergence_coef"
    ALPHA_DIVERGENCE_COEF_DEFAULT = 1.0


def init_zero_verbose() -> None:
    """Nothing: logging needs no set-up."""


@contextlib.contextmanager
def suppress_experimental_warning() -> Iterator[None]:
    """Nothing: no warning about methods that may change is raised here."""
    yield
