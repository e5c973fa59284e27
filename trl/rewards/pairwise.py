"""Judges: which of two completions of a prompt is better, or whether a completion meets a condition.

The classes have upstream's names and methods. `rewards.verdicts` makes rewards of what they say.
"""

import inspect
import json
import os
import string
import threading
import urllib.error
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from trl.near import near
from trl.notices import notify_once
from trl.rewards.calls import RewardError, name_of
from trl.rewards.functions import RewardFunctions
from trl.rewards.named import find

REQUESTS = 8  # that are under way at once

PAIRWISE_PROMPT = """\
Two assistants were given the same instruction. Decide which of their answers is better: more correct, more helpful, and
closer to what was asked for. Length and order do not count.

Instruction:
{prompt}

Answer 0:
{response0}

Answer 1:
{response1}

Reply with one character, the number of the better answer: 0 or 1."""


class BaseJudge(ABC):
    """A judge of completions."""

    @abstractmethod
    def judge(self, prompts: list[str], completions: list[Any], shuffle_order: bool = True) -> list[Any]:
        """A verdict for each prompt."""


class BaseRankJudge(BaseJudge):
    """A judge that sorts the completions of a prompt."""

    @abstractmethod
    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[list[int]]:
        """For each prompt the places of its completions, the best first: [1, 2, 0] names the second as the best."""


class BasePairwiseJudge(BaseJudge):
    """A judge that prefers one of two completions."""

    @abstractmethod
    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        """For each prompt the place of the better completion, 0 or 1; -1 if there is no preference."""


class BaseBinaryJudge(BaseJudge):
    """A judge that says whether a completion meets a condition, as in CGPO (arXiv:2409.20370, section 4.1.4)."""

    @abstractmethod
    def judge(  # type: ignore[override]  # upstream's order of arguments
        self,
        prompts: list[str],
        completions: list[str],
        gold_completions: list[str] | None = None,
        shuffle_order: bool = True,
    ) -> list[int]:
        """For each completion 1 (it meets the condition), 0 (it does not) or -1 (no verdict)."""


class AllTrueJudge(BaseBinaryJudge):
    """1 where all of `judges` say 1, -1 where one of them has no verdict, else 0. The mixture of judges of CGPO, Xu et
    al. 2024, arXiv:2409.20370."""

    def __init__(self, judges: Sequence[BaseBinaryJudge]) -> None:
        self.judges = list(judges)

    def judge(  # type: ignore[override]  # upstream's order of arguments
        self,
        prompts: list[str],
        completions: list[str],
        gold_completions: list[str] | None = None,
        shuffle_order: bool = True,
    ) -> list[int]:
        found = []
        answers = [each.judge(prompts, completions, gold_completions, shuffle_order) for each in self.judges]
        for verdicts in zip(*answers, strict=True):
            if wrong := [each for each in verdicts if each not in (0, 1, -1)]:
                raise ValueError(f"a binary judge answered {wrong[0]!r}: the verdicts are 1, 0 and -1 (none)")
            found.append(-1 if -1 in verdicts else int(all(verdicts)))
        return found


class FunctionJudge(BasePairwiseJudge):
    """A pairwise judge that is a function of prompts and pairs of completions, which returns 0, 1 or -1 for each."""

    def __init__(self, function: Callable[..., Sequence[int]]) -> None:
        self.function, self.__name__ = function, name_of(function)

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        return list(self.function(prompts, completions))


class RewardModelJudge(BasePairwiseJudge):
    """Prefers the completion with the higher score of a reward model.

    `model` is a model with a scoring head, its name or path, or any reward function (see `rewards.functions`);
    `processing_class` its tokenizer, if it has none of its own. Equal scores are no preference.
    """

    def __init__(self, model: Any, processing_class: Any = None, **options: Any) -> None:
        self.rewards = RewardFunctions(model, processing_classes=processing_class, **options)

    def judge(
        self,
        prompts: list[str],
        completions: list[list[str]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[Any]:
        """With `return_scores` the probability that the first is better, under the model of Bradley and Terry."""
        twice = [prompt for prompt in prompts for _ in range(2)]
        flat = [text for pair in completions for text in pair]
        score_P2 = self.rewards.combine(self.rewards.score(twice, flat, [[] for _ in flat])).view(-1, 2)
        ahead_P = score_P2[:, 0] - score_P2[:, 1]
        if return_scores:
            return torch.sigmoid(ahead_P).tolist()
        return [0 if each > 0 else 1 if each < 0 else -1 for each in ahead_P.tolist()]


class PairRMJudge(BasePairwiseJudge):
    """PairRM (Jiang et al. 2023, arXiv:2306.02561), by the package llm-blender. ImportError without the package."""

    def __init__(self) -> None:
        try:
            import llm_blender
        except ImportError as error:
            raise ImportError(
                f"PairRMJudge needs the package llm-blender: pip install llm-blender ({error})"
            ) from error
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self.blender = llm_blender.Blender()
        self.blender.loadranker("llm-blender/PairRM", device=device)

    def judge(
        self,
        prompts: list[str],
        completions: list[list[str]],
        shuffle_order: bool = True,
        return_scores: bool = False,
        temperature: float = 1.0,
    ) -> list[Any]:
        """With `return_scores` the probability that the first is better, at this temperature of the logits."""
        if any(len(pair) != 2 for pair in completions):
            raise ValueError("PairRMJudge compares two completions of each prompt")
        flips = turned(prompts, completions) if shuffle_order else [False] * len(prompts)
        shown = [list(pair)[::-1] if flip else list(pair) for pair, flip in zip(completions, flips, strict=True)]
        answers = self.blender.rank(prompts, shown, return_scores=return_scores, disable_tqdm=True)
        found: list[Any] = []
        for answer, flip in zip(answers, flips, strict=True):
            first, second = reversed(answer) if flip else answer
            if return_scores:
                found.append(float(torch.sigmoid(torch.tensor((float(first) - float(second)) / temperature))))
            else:  # ranks from 1 on
                found.append(0 if first < second else 1)
        return found


class _AskedJudge(BasePairwiseJudge):
    """A judge that asks a chat model for one character, a request for each pair."""

    def __init__(self, system_prompt: str | None, max_requests: int | None) -> None:
        self.system_prompt = system_prompt or PAIRWISE_PROMPT
        named = {name for _, name, _, _ in string.Formatter().parse(self.system_prompt) if name}
        if missing := {"prompt", "response0", "response1"} - named:
            raise ValueError(f"system_prompt has no place for {', '.join(sorted(missing))}: write it in braces")
        self.max_requests, self.num_requests = max_requests, 0
        self._lock = threading.Lock()

    def ask(self, content: str) -> str:
        """The model's answer to a message."""
        raise NotImplementedError

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        flips = turned(prompts, completions) if shuffle_order else [False] * len(prompts)
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self._preferred, prompts, completions, flips))

    def _preferred(self, prompt: str, pair: Sequence[str], flip: bool) -> int:
        with self._lock:
            if self.max_requests is not None and self.num_requests >= self.max_requests:
                notify_once(
                    f"{type(self).__name__} has sent its {self.max_requests} requests: no pair has a preference from "
                    "now on. Raise max_requests, or set it to None for no limit"
                )
                return -1
            self.num_requests += 1
        first, second = reversed(pair) if flip else pair
        answer = self.ask(self.system_prompt.format(prompt=prompt, response0=first, response1=second)).strip()
        if answer not in ("0", "1"):
            notify_once(
                f"{type(self).__name__}: the model answered {answer[:40]!r} instead of 0 or 1; such a pair has no "
                "preference"
            )
            return -1
        return 1 - int(answer) if flip else int(answer)


class HfPairwiseJudge(_AskedJudge):
    """Asks a chat model behind `huggingface_hub.InferenceClient`: a model's name, or the address of an endpoint.

    `system_prompt` has places for {prompt}, {response0} and {response1} and asks for one token, 0 or 1.
    """

    def __init__(
        self,
        model: str = "meta-llama/Meta-Llama-3-70B-Instruct",
        token: str | None = None,
        system_prompt: str | None = None,
        max_requests: int | None = None,
    ) -> None:
        from huggingface_hub import InferenceClient

        super().__init__(system_prompt, max_requests)
        self.client = InferenceClient(model=model, token=token)

    def ask(self, content: str) -> str:
        answer = self.client.chat_completion(messages=[{"role": "user", "content": content}], max_tokens=1)
        return answer.choices[0].message.content or ""


class OpenAIPairwiseJudge(_AskedJudge):
    """Asks a chat model behind an HTTP endpoint with OpenAI's protocol.

    `base_url` is the endpoint's address (else OPENAI_BASE_URL, else OpenAI's), `api_key` its key (else OPENAI_API_KEY).
    After `max_requests` requests no pair has a preference; None sets no limit.
    """

    def __init__(
        self,
        model: str = "gpt-4-turbo-preview",
        system_prompt: str | None = None,
        max_requests: int | None = 1_000,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(system_prompt, max_requests)
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        self.key = api_key or os.environ.get("OPENAI_API_KEY")
        if address is None and not self.key:
            raise ValueError("OpenAIPairwiseJudge has no key: set OPENAI_API_KEY, or pass api_key= or base_url=")
        self.model, self.timeout = model, timeout
        self.url = f"{(address or 'https://api.openai.com/v1').rstrip('/')}/chat/completions"

    def ask(self, content: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            with error:
                why = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            raise RewardError(f"the endpoint {self.url} refused: {why}") from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise RewardError(f"the endpoint {self.url} failed: {type(error).__name__}: {error}") from None


def turned(prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[bool]:
    """Which pairs are shown in the other order, against a preference for a place: about half, decided by the texts, so
    that a verdict depends neither on the batch nor on the process."""
    return [bool(zlib.crc32("\0".join([prompt, *pair]).encode()) & 1)
            for prompt, pair in zip(prompts, completions, strict=True)]  # fmt: skip


JUDGES: dict[str, type[BaseJudge]] = {
    "pair_rm": PairRMJudge,
    "openai": OpenAIPairwiseJudge,
    "hf": HfPairwiseJudge,
}


def judge_of(given: Any) -> Any:
    """A judge from a judge, a function, or a name: one of `JUDGES`, `package.module:name` or `file.py:name`, of a
    class of judges (its arguments in brackets) or of a function. Raises `RewardError`."""
    found = given if (named := check_judge(given)) is None else named
    if inspect.isclass(found) and hasattr(found, "judge"):
        found = found()
    if callable(getattr(found, "judge", None)):
        return found
    if callable(found) and not isinstance(found, torch.nn.Module):
        return FunctionJudge(found)
    raise RewardError(
        f"a judge has a method `judge`, or is a function of prompts and pairs of completions, not {given!r:.80}; pass "
        "a reward model as reward_funcs="
    )


def check_judge(given: Any) -> Any:
    """The class or function of a judge that is given by its name, else None. Raises `RewardError` for an unknown
    name."""
    if not isinstance(given, str):
        return None
    if given not in JUDGES and not any(mark in given for mark in (":", ".")):
        match = near(given, JUDGES)
        raise RewardError(
            f"there is no judge {given!r}: {', '.join(JUDGES)} are known; name others as package.module:name"
            + (f" (did you mean {match}?)" if match else "")
        )
    try:
        return JUDGES.get(given) or find(given)
    except ValueError as error:
        raise RewardError(str(error).replace("reward function", "judge")) from error
