"""What callers of upstream's online trainers read of them, and what the parts of ours are called there."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from trl.rollout.collect import Collector
from trl.rollout.filters import as_generation_config
from trl.rollout.types import Sampler, Sampling


class OnlineAttributes:
    """Attributes of an online trainer that stand in its collector or its config."""

    collector: Collector
    args: Any
    processing_class: Any
    use_vllm = False

    @property
    def rewards(self) -> Any:
        return self.collector.judge

    @property
    def sampling(self) -> Sampling:
        return self.collector.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.collector.sampling = sampling

    @property
    def sampler(self) -> Sampler:
        return self.collector.sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self.collector.sampler = sampler

    @property
    def reward_funcs(self) -> list[Any]:
        return self.rewards.functions

    @property
    def reward_func_names(self) -> list[str]:
        return list(self.rewards.names)

    @property
    def reward_weights(self) -> Tensor:
        return self.rewards.weights

    @property
    def reward_processing_classes(self) -> list[Any]:
        return [getattr(judge, "tokenizer", None) for judge in self.rewards.judges]

    @property
    def num_generations_eval(self) -> int:
        return self.args.num_generations_eval or self.args.num_generations

    @property
    def eos_token_ids(self) -> list[int]:
        return list(self.sampling.stop_ids)

    @property
    def generation_config(self) -> GenerationConfig:
        """What the sampler is asked for, as transformers writes it."""
        return as_generation_config(self.sampling, self.processing_class)
