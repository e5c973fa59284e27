"""What changes the model's distribution before a token is drawn: penalties, then filters."""

from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from trl.rollout.types import Sampling

# Other arguments of `generate` that are understood.
FURTHER = (
    *("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)


def describe(sampling: Sampling) -> str:
    """What is in force, in one line."""
    if sampling.temperature == 0:
        parts = ["the most likely token is taken"]
    else:
        parts = [f"temperature {sampling.temperature:g}"]
        parts += [f"top_k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"min_p {sampling.min_p:g}"] if sampling.min_p else []
    if sampling.repetition_penalty != 1:
        parts.append(f"repetition_penalty {sampling.repetition_penalty:g}")
    parts += [f"{name} {value}" for name, value in sampling.further.items()]
    parts.append(f"at most {sampling.max_new_tokens} tokens")
    if sampling.stop_ids:
        parts.append(f"stops at {', '.join(map(str, sampling.stop_ids))}")
    parts += [f"stops after {string!r}" for string in sampling.stop_strings]
    return ", ".join(parts)


def as_generation_config(sampling: Sampling, tokenizer: Any) -> GenerationConfig:
    """What a sampler is asked for, as transformers writes it."""
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature if sampling.temperature > 0 else None,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        stop_strings=list(sampling.stop_strings) or None,
        **sampling.further,
    )


def penalties(sampling: Sampling, device: torch.device) -> LogitsProcessorList:
    """transformers' processors that raise, lower or rule out tokens, in the order of its `generate`."""
    further, found = sampling.further, LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if further.get("no_repeat_ngram_size"):
        found.append(NoRepeatNGramLogitsProcessor(further["no_repeat_ngram_size"]))
    if further.get("bad_words_ids"):
        found.append(NoBadWordsLogitsProcessor(further["bad_words_ids"], list(sampling.stop_ids)))
    if further.get("suppress_tokens"):
        found.append(SuppressTokensLogitsProcessor(further["suppress_tokens"], device=device))
    return found


def filters(sampling: Sampling, device: torch.device) -> LogitsProcessorList:
    """transformers' filters of the distribution, in the order of its `generate`."""
    further, found = sampling.further, LogitsProcessorList()
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    if further.get("typical_p", 1.0) < 1:
        found.append(TypicalLogitsWarper(further["typical_p"]))
    if further.get("epsilon_cutoff"):
        found.append(EpsilonLogitsWarper(further["epsilon_cutoff"]))
    if further.get("eta_cutoff"):
        found.append(EtaLogitsWarper(further["eta_cutoff"], device=device))
    return found
