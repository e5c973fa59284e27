"""What an online trainer draws with: its sampler, what the sampler is asked for, and who judges."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict

from trl.data.reading import sources
from trl.rewards.functions import RewardFunctions
from trl.rollout.collect import Unjudged
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Sampler, Sampling

LONGEST = 512  # tokens of a completion where nobody says


def opened(dataset: Any, skip_bad_rows: bool) -> Any:
    """A data set given by its rows or by a path, opened, so that its columns are known before the model is; each of a
    dictionary of them."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        return dataset
    if type(dataset) is dict and all(map(sources.is_data_set, dataset.values())):
        return {name: opened(value, skip_bad_rows) for name, value in dataset.items()}
    if isinstance(dataset, str | Path | list | dict):
        return sources.load(dataset, skip_bad_rows=skip_bad_rows)
    return dataset


def judge_of(args: Any, reward_funcs: Any, processing_classes: Any, tokenizer: Any, conversational: bool) -> Any:
    """The reward functions, asked together. `conversational`: completions are shown to them as messages."""
    if isinstance(reward_funcs, list) and not reward_funcs:
        for name in ("dynamic_sampling", "replay_buffer_size"):
            if getattr(args, name):
                raise ValueError(f"{name} compares rewards, and there are no reward_funcs: leave it out")
        return Unjudged()
    return RewardFunctions(
        reward_funcs,
        weights=args.reward_weights,
        processing_classes=processing_classes,
        tokenizer=tokenizer,
        chat=conversational,
        timeout=args.reward_timeout,
    )


def sampler_of(args: Any, tokenizer: Any, sampling: Sampling) -> Sampler:
    """The sampler of this process, or transformers' continuous batching where it is asked for."""
    if not args.use_transformers_continuous_batching:
        return InProcessSampler(tokenizer, max_cache_tokens=args.max_cache_tokens)
    sampler = ContinuousSampler(args.transformers_continuous_batching_config, max_cache_tokens=args.max_cache_tokens)
    sampler.check(sampling)
    return sampler
