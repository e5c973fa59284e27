"""What a loop of one's own hands to PPO: arguments of `generate`; queries, responses and scores of a step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.notices import notify_once
from trl.rollout.traces import Columns, ScoredTrace
from trl.rollout.types import Sampling

from .queries import numbers, token_rows


def given_to_step(**_: Any) -> list[float]:
    """Stands for the scores that `step` is given."""
    raise ValueError("scores are an argument of step(queries, responses, scores); train() asks reward_funcs")


def sampling_asked(kwargs: dict[str, Any], sampling: Callable[..., Sampling], temperature: float) -> Sampling:
    """What arguments of `generate` ask for, in our words; `sampling` makes it of them, `temperature` is the one that is
    trained at. ValueError for what has no meaning here."""
    kwargs = {name: each for name, each in kwargs.items() if each is not None}
    if kwargs.pop("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: repeat the query in the list, once for each response")
    if "max_length" in kwargs:
        raise ValueError("max_length counts the query too: give max_new_tokens")
    if not kwargs.pop("do_sample", True):
        kwargs["temperature"] = 0.0
        notify_once("do_sample=False: the most likely response alone is seen, and nothing else is learned about")
    end = kwargs.pop("eos_token_id", None)
    ends = [each for each in (end if isinstance(end, list) else [end]) if each is not None]
    kwargs = {name: each for name, each in kwargs.items() if name not in ("min_length", "attention_mask")}
    if "top_k" in kwargs:
        kwargs["top_k"] = int(kwargs["top_k"])
    found = sampling(**kwargs)
    if found.temperature not in (0.0, temperature):
        notify_once(
            f"responses are sampled at temperature {found.temperature:g} and trained at {temperature:g}: "
            "set temperature in the config to the first"
        )
    return dataclasses.replace(found, stop_ids=tuple(each for each in ends if each >= 0)) if ends else found


def step_inputs(
    queries: Any,
    responses: Any,
    scores: Any,
    masks: Sequence[Tensor] | None,
    *,
    batch_size: int,
    pad: int | None,
    vocabulary: int | None,
) -> tuple[list[list[int]], list[Columns], Tensor]:
    """The token ids of queries, the columns of responses, and scores, [S]. ValueError for what does not fit."""
    prompts = token_rows(queries, "query", pad, vocabulary)
    answers = token_rows(responses, "response", pad, vocabulary)
    score_S = numbers(scores)
    _check_sizes(batch_size, queries=len(prompts), responses=len(answers), scores=len(score_S))
    answers = [_without_query(*pair, place) for place, pair in enumerate(zip(prompts, answers, strict=True))]
    return prompts, _columns_of(answers, masks), score_S


def scored_traces(
    rows: Sequence[dict[str, Any]],
    columns: Sequence[Columns],
    score_S: Tensor,
    rank: int,
    stop_ids: Sequence[int],
    divergence: Callable[[Columns], float] | None,
) -> list[ScoredTrace]:
    """This rank's responses as traces without their columns, which the other ranks do not need."""
    found = []
    for row, own, score in zip(rows, columns, score_S.tolist(), strict=True):
        own["logps"] = own["old_logps"]
        trained = int(own["mask"].sum()) if "mask" in own else len(own["ids"])
        ended = int(own["ids"][-1]) in stop_ids
        kl = divergence(own) if divergence is not None else 0.0
        found.append(
            ScoredTrace(row["row"], row["prompt_ids"], len(own["ids"]), trained, ended, [score], kl, rank, None)
        )
    return found


def _check_sizes(batch_size: int, **counts: int) -> None:
    wrong = [f"{count} {what}" for what, count in counts.items() if count != batch_size]
    if wrong:
        raise ValueError(f"a step takes {batch_size} of each, the config's batch_size: here are {', '.join(wrong)}")


def _without_query(query: list[int], response: list[int], place: int) -> list[int]:
    if response[: len(query)] != query:
        return response
    notify_once("responses begin with their query, which is taken off: generate(return_prompt=False) leaves it out")
    if len(response) == len(query):
        raise ValueError(f"response {place} is its query and nothing more: there is nothing to learn from")
    return response[len(query) :]


def _columns_of(answers: list[list[int]], masks: Sequence[Tensor] | None) -> list[Columns]:
    found: list[Columns] = []
    for place, ids in enumerate(answers):
        own: Columns = {"ids": np.asarray(ids, dtype=np.int32), "logps": np.zeros(len(ids), dtype=np.float32)}
        if masks is not None:
            # Of a response that came with its query, the mask may cover both.
            mask = np.asarray(torch.as_tensor(masks[place]).cpu()).astype(np.bool_)[-len(ids) :]
            if len(mask) != len(ids):
                raise ValueError(f"response_masks: {place} has {len(mask)} entries for {len(ids)} tokens")
            own["mask"] = mask
        found.append(own)
    return found


def each_of(judges: Any) -> list[Any]:
    """One judge, several or none, as a list."""
    return [] if judges is None else list(judges) if isinstance(judges, list | tuple) else [judges]
