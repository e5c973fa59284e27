"""Exact match, pass@k, reward, win rate and perplexity of a model on a data set."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from trl.data.batching import collate
from trl.data.reading.errors import DataError
from trl.data.tokenizing.prompts import PREPARED, prepare_prompts
from trl.data.tokenizing.sequences import prepare_sequences
from trl.engine.probe import attach
from trl.engine.score import score
from trl.evaluate.intervals import Estimate, bootstrap, wilson
from trl.evaluate.metrics import METRICS as METRICS
from trl.evaluate.metrics import check_metrics
from trl.models.unwrap import evaluating, unwrap
from trl.rewards.form import get_exact_match_reward
from trl.rewards.functions import RewardFunctions
from trl.rewards.pairwise import judge_of
from trl.rewards.shapes import text_of
from trl.rewards.verdicts import plain
from trl.rollout.generate import InProcessSampler, stop_ids
from trl.rollout.rounds import pass_at_k
from trl.rollout.types import Request, Sampling

BATCH_TOKENS = 4096  # of a forward pass for perplexity


@dataclass
class Evaluation:
    """What was measured.

    Args:
        estimates: each number by its name, such as "exact_match", "pass@4", "reward", "perplexity".
        settings: how it was measured.
        samples: for each prompt its row number, the prompt, its completions and what was found of each.
    """

    estimates: dict[str, Estimate]
    settings: dict[str, Any]
    samples: list[dict[str, Any]]

    def lines(self) -> list[str]:
        """The numbers as plain lines."""
        wide = max(map(len, self.estimates))
        return [f"{name:<{wide}}  {estimate.line()}" for name, estimate in self.estimates.items()]

    def to_dict(self) -> dict[str, Any]:
        """Numbers and settings as plain values, without the samples."""
        estimates = {name: estimate.to_dict() for name, estimate in self.estimates.items()}
        return {"estimates": estimates, "settings": self.settings}


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: datasets.Dataset,
    metrics: Sequence[str],
    *,
    reward_funcs: Any = None,
    judge: Any = None,
    against: Any = None,
    answer_column: str | None = None,
    pattern: str | None = None,
    num_generations: int = 1,
    pass_at: Sequence[int] | None = None,
    pass_threshold: float = 1.0,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Evaluation:
    """Measures a model on a data set. The same arguments give the same numbers.

    Args:
        model: a causal language model, an adapter on it included.
        tokenizer: its tokenizer.
        dataset: a table of prompts (as for GRPO); for "perplexity", of rows as for SFT.
        metrics: some of `METRICS`.
            "exact_match": the share of completions that equal the answer. Wilson's interval over prompts.
            "pass@k": the chance that one of k completions passes, without bias (Chen et al. 2021, arXiv:2107.03374,
            equation 1). Wilson's interval over prompts. A completion passes if its total reward is at least
            `pass_threshold`; without `reward_funcs`, if it equals the answer.
            "reward": the mean of each reward function, and of their sum; bootstrap over prompts.
            "win_rate": how often `judge` prefers the completion to that of `against`, a tie counting half. Wilson's.
            "perplexity": exp of the mean negative log-likelihood of a trained token; bootstrap over rows.
        reward_funcs: as in `GRPOTrainer`: functions, names, models or endpoints.
        judge: a pairwise judge, as in `OnlineDPOTrainer`. None (the default) takes the sum of the `reward_funcs`.
        against: the column that holds the other answers, or another model with the same tokenizer.
        answer_column: the column that holds the right answer; by default `answer`, else `solution`.
        pattern: a regular expression; its last match in a completion is the answer. By default the whole completion.
        num_generations: completions of each prompt.
        pass_at: the k of "pass@k"; by default 1 and `num_generations`.
        max_new_tokens, top_p, top_k: how completions are sampled.
        temperature: 0 takes the most likely tokens. None (the default): 0 with one completion of a prompt, else 1.
        max_length: the most tokens of a row for "perplexity"; longer ones are cut. None (the default): no limit.
        columns, chat_template_kwargs: as in the trainers' options.
        seed: names the samples and the draws of the bootstrap.
        confidence: the coverage of the intervals.

    Raises ValueError (`DataError`, `RewardError`) for options that do not go together, and for rows that cannot be
    read.
    """
    metrics = list(dict.fromkeys(metrics))
    check_metrics(metrics, reward_funcs, judge, against, num_generations, pass_at)
    found: dict[str, Estimate] = {}
    samples: list[dict[str, Any]] = []
    heat = (0.0 if num_generations == 1 else 1.0) if temperature is None else temperature
    settings: dict[str, Any] = {"rows": len(dataset), "seed": seed, "confidence": confidence}
    if set(metrics) - {"perplexity"}:
        sampling = Sampling(
            max_new_tokens, heat, top_k=top_k, top_p=top_p, stop_ids=tuple(sorted(stop_ids(model, tokenizer)))
        )
        settings |= {"num_generations": num_generations, "temperature": heat, "max_new_tokens": max_new_tokens}
        rows, _ = prepare_prompts(
            dataset, tokenizer, name="test", columns=columns, chat_template_kwargs=chat_template_kwargs
        )
        drawn = _Drawn(rows, tokenizer, model, sampling, num_generations, seed)
        samples = drawn.shown()
        exact = "exact_match" in metrics or ("pass@k" in metrics and reward_funcs is None)
        matches = rewards = None
        if exact:
            matches = drawn.rewards(get_exact_match_reward(pattern, column=answer_column), samples)["reward"]
        if reward_funcs is not None:
            table = drawn.rewards(reward_funcs, samples)
            rewards = table["reward"]
        if "exact_match" in metrics and matches is not None:
            found["exact_match"] = _share(matches, confidence)
        if "pass@k" in metrics:
            scores = rewards if rewards is not None else matches
            assert scores is not None
            for k in pass_at or sorted({1, num_generations}):
                found[f"pass@{k}"] = _pass_at(scores, k, pass_threshold, confidence)
        if "reward" in metrics and reward_funcs is not None:
            for name, values in table.items():
                found[name if name == "reward" else f"reward/{name}"] = _mean(values, seed, confidence)
            if len(table) == 2:  # the sum of one function is that function
                found.pop(next(name for name in list(found) if name.startswith("reward/")))
        if "win_rate" in metrics:
            other = drawn.others(against)
            found["win_rate"] = _win_rate(drawn, other, judge, reward_funcs, confidence)
            settings["against"] = against if isinstance(against, str) else type(unwrap(against)).__name__
    if "perplexity" in metrics:
        found["perplexity"] = perplexity(
            model, tokenizer, dataset, max_length=max_length, columns=columns, seed=seed, confidence=confidence
        )
    return Evaluation({name: found[name] for name in _ordered(found, metrics)}, settings, samples)


def _ordered(found: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """The names of the estimates in the order of the metrics."""
    own = {"pass@k": lambda name: name.startswith("pass@"), "reward": lambda name: name.split("/")[0] == "reward"}
    return [name for metric in metrics for name in found if own.get(metric, lambda name, m=metric: name == m)(name)]


class _Drawn:
    """The completions of all prompts, `generations` of each in turn."""

    def __init__(
        self, rows: datasets.Dataset, tokenizer: Any, model: nn.Module, sampling: Sampling, generations: int, seed: int
    ) -> None:
        self.rows = [dict(row) for row in rows]
        self.tokenizer, self.sampling, self.generations, self.seed = tokenizer, sampling, generations, seed
        self.device = _device(model)
        self.conversational = not isinstance(self.rows[0]["prompt"], str)
        self.ids, self.finished = self._by(model, generations)
        self.texts = self._texts(self.ids)

    def _by(self, model: nn.Module, generations: int) -> tuple[list[list[int]], list[bool]]:
        sampler = InProcessSampler(self.tokenizer)
        sampler.sync(model, 0)
        requests = [Request(row["prompt_ids"], generations, (self.seed, int(row["row"]))) for row in self.rows]
        drawn = [each for group in sampler.generate(requests, self.sampling) for each in group]
        return [each.ids for each in drawn], [each.finished for each in drawn]

    def _texts(self, ids: list[list[int]]) -> list[str]:
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))

    def shown(self) -> list[dict[str, Any]]:
        """The samples as plain values."""
        size = self.generations
        return [
            {
                "row": int(row["row"]),
                "prompt": row["prompt"],
                "completions": self.texts[at * size : (at + 1) * size],
                "tokens": [len(ids) for ids in self.ids[at * size : (at + 1) * size]],
                "finished": self.finished[at * size : (at + 1) * size],
            }
            for at, row in enumerate(self.rows)
        ]

    def rewards(self, functions: Any, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The rewards of each function and their sum, as "reward": [prompts, generations], NaN where there is none.
        They are added to `samples`."""
        found = self._scored(functions, self.texts, self.ids)
        for name, values in found.items():
            if name == "reward" and len(found) == 2:
                continue
            for sample, own in zip(samples, values.tolist(), strict=True):
                sample[name] = [None if math.isnan(value) else value for value in own]
        return found

    def _scored(self, functions: Any, texts: list[str], ids: list[list[int]]) -> dict[str, np.ndarray]:
        """The rewards of completions, as many of each prompt as there are: [prompts, completions of each]."""
        size = len(texts) // len(self.rows)
        judges = RewardFunctions(functions, tokenizer=self.tokenizer, chat=self.conversational, device=self.device)
        of_row = [row for row in self.rows for _ in range(size)]
        kept = [name for name in self.rows[0] if name not in PREPARED]
        try:
            table = judges.score(
                [row["prompt"] for row in of_row],
                [self._as_completion(text) for text in texts],
                ids,
                {name: [row[name] for row in of_row] for name in kept},
                prompt_ids=[row["prompt_ids"] for row in of_row],
            )
            total = judges.combine(table)
        finally:
            judges.close()
        shape = (len(self.rows), size)
        found = {name: table[:, at].double().numpy().reshape(shape) for at, name in enumerate(judges.names)}
        return {**found, "reward": total.double().numpy().reshape(shape)}

    def preferences(self, functions: Any, others: list[str]) -> list[int]:
        """The verdicts of a pairwise judge, by the sums of rewards: 0 where the first completion is better, 1 where the
        other one is, -1 where neither is."""
        size = self.generations
        ids = self.tokenizer(others, add_special_tokens=False)["input_ids"]
        mine = self._scored(functions, self.texts[::size], self.ids[::size])["reward"][:, 0]
        ahead = mine - self._scored(functions, others, ids)["reward"][:, 0]
        return [0 if each > 0 else 1 if each < 0 else -1 for each in ahead.tolist()]

    def _as_completion(self, text: str) -> Any:
        return [{"role": "assistant", "content": text}] if self.conversational else text

    def others(self, against: Any) -> list[str]:
        """The other answer of each prompt: of another model, or in a column."""
        if isinstance(against, nn.Module):
            return self._texts(self._by(against, 1)[0])
        if against not in self.rows[0]:
            names = ", ".join(name for name in self.rows[0] if name not in PREPARED) or "none"
            raise DataError(f"against={against!r} is neither a model nor a column; columns are {names}.")
        for row in self.rows:
            if row[against] is None:
                raise DataError(f"row {row['row']}, `{against}`: it is None, and there is nothing to compare with.")
        return [text_of(row[against]) for row in self.rows]


def _share(values: np.ndarray, confidence: float) -> Estimate:
    """The mean of zeros and ones, [prompts, generations]. The completions of a prompt are one trial."""
    means, left_out = _of_prompts(values)
    return wilson(float(means.sum()), len(means), confidence, left_out=left_out)


def _mean(values: np.ndarray, seed: int, confidence: float) -> Estimate:
    means, left_out = _of_prompts(values)
    return bootstrap(means, confidence=confidence, seed=seed, left_out=left_out)


def _of_prompts(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The mean of each prompt that has a value, and the number of prompts without one."""
    given = ~np.isnan(values)
    some = given.any(axis=1)
    if not some.any():
        raise DataError("no completion has a value: the answers or the rewards are all None.")
    sums = np.where(given, values, 0.0).sum(axis=1)[some]
    return sums / given.sum(axis=1)[some], int((~some).sum())


def _pass_at(values: np.ndarray, k: int, threshold: float, confidence: float) -> Estimate:
    whole = ~np.isnan(values).any(axis=1)
    chances = [pass_at_k(len(each), int((each >= threshold).sum()), k) for each in values[whole]]
    if not chances:
        raise DataError("no prompt has a value for all of its completions: the answers or the rewards are None.")
    return wilson(sum(chances), len(chances), confidence, left_out=int((~whole).sum()))


def _win_rate(drawn: _Drawn, others: list[str], judge: Any, reward_funcs: Any, confidence: float) -> Estimate:
    if judge is None:
        verdicts = drawn.preferences(reward_funcs, others)
    else:
        mine = drawn.texts[:: drawn.generations]
        prompts = [plain(row["prompt"]) for row in drawn.rows]
        verdicts = judge_of(judge).judge(prompts, [list(pair) for pair in zip(mine, others, strict=True)])
    if len(verdicts) != len(others):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts for {len(others)} prompts")
    wins = sum(0.5 if verdict == -1 else float(verdict == 0) for verdict in verdicts)
    return wilson(wins, len(others), confidence)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    dataset: datasets.Dataset,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    **options: Any,
) -> Estimate:
    """Perplexity: exp of the mean negative log-likelihood of the trained tokens (of completions, where rows have them;
    else of all tokens but the first), with the bootstrap's interval over rows. `options` are further fields of the
    recipe of SFT (`trl.data.tokenizing.sequences`)."""
    rows, report = prepare_sequences(dataset, tokenizer, name="test", max_length=max_length, columns=columns, **options)
    attachment = attach(model)
    device = _device(model)
    sums: list[tuple[float, int]] = []
    with evaluating(model):
        for some in _batches(rows):
            trees = collate.sequences(some)
            stats = score(model, send_to_device(attachment.batch(trees), device))
            nll_S = torch.zeros(stats.sequences, dtype=torch.float64, device=stats.logp_N.device)
            nll_S.index_add_(0, stats.seq_N, -stats.logp_N.double())
            count_S = torch.bincount(stats.seq_N, minlength=stats.sequences)
            sums += zip(nll_S.tolist(), count_S.tolist(), strict=True)
    left_out = report.rows_read - report.rows_kept
    return bootstrap(
        np.array(sums),
        lambda rows: float(np.exp(rows[:, 0].sum() / rows[:, 1].sum())),
        confidence,
        seed,
        of="rows",
        left_out=left_out,
    )


def _device(model: nn.Module) -> torch.device:
    return unwrap(model).get_input_embeddings().weight.device


def _batches(rows: datasets.Dataset) -> Any:
    """Rows in their order, as many at once as `BATCH_TOKENS` holds, padding included."""
    some: list[Any] = []
    for row in rows:
        longest = max(len(each["input_ids"]) for each in [*some, row])
        if some and longest * (len(some) + 1) > BATCH_TOKENS:
            yield some
            some = []
        some.append(row)
    if some:
        yield some
