"""What an online trainer draws with: its sampler, what the sampler is asked for, and who judges."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict

from trl.data.reading import sources
from trl.rewards.functions import RewardFunctions
from trl.rollout.collect import Unjudged
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.generate import InProcessSampler, stop_ids
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


def sampling_of(args: Any, model: Any, tokenizer: Any, **asked: Any) -> Sampling:
    """What the sampler is asked for by default; `asked` are further arguments of `generate`."""
    further = {**(args.generation_kwargs or {}), **asked}
    fields = {
        "max_new_tokens": args.max_completion_length or LONGEST,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
    }
    for name in list(fields):
        if name in further:
            fields[name] = further.pop(name)
    stops = stop_ids(model, tokenizer) | set(_as_list(further.pop("eos_token_id", None)))
    strings = tuple(_as_list(further.pop("stop_strings", None)))
    for name in ("do_sample", "num_return_sequences", "use_cache", "pad_token_id", "bos_token_id"):
        further.pop(name, None)
    return Sampling(**fields, stop_ids=tuple(sorted(stops - {None})), stop_strings=strings, further=further)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]
