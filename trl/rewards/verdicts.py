"""A judge's verdicts as rewards: what the collector asks where a judge compares the two completions of a prompt."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.rewards.calls import RewardError, error_text, listed, shortened
from trl.rewards.pairwise import BaseBinaryJudge, BaseRankJudge, judge_of
from trl.rewards.shapes import text_of


class Verdicts:
    """The rewards of completions that come two of a prompt in turn, by a judge (see `pairwise.judge_of`).

    The better completion gets 1, the other 0, and both NaN where there is no preference. With `probabilities` the first
    gets the probability that it is preferred, if the judge has one (`return_scores`), and the second the rest. A binary
    judge gives 1, 0 or NaN to each completion.
    """

    def __init__(self, judge: Any, *, probabilities: bool = False) -> None:
        self.judge = judge_of(judge)
        self.names = [getattr(self.judge, "__name__", type(self.judge).__name__)]
        self.weights = torch.ones(1)
        self.functions, self.judges = [self.judge], [self.judge]
        takes = inspect.signature(self.judge.judge).parameters
        self.asked = {"return_scores": True} if probabilities and "return_scores" in takes else {}

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """The rewards, [completions, 1] in fp32. Raises `RewardError`."""
        texts, questions = [text_of(each) for each in completions], [plain(each) for each in prompts]
        if isinstance(self.judge, BaseBinaryJudge):
            verdicts = self._asked(questions, texts)
            return torch.tensor([[self._number(each)] for each in verdicts], dtype=torch.float32)
        questions, pairs = questions[::2], [texts[start : start + 2] for start in range(0, len(texts), 2)]
        verdicts = self._asked(questions, pairs)
        if isinstance(self.judge, BaseRankJudge):
            for verdict in verdicts:
                if sorted(listed(verdict)) != [0, 1]:
                    raise RewardError(
                        f"judge {self.names[0]!r} answered {verdict!r:.60} for two completions: give their places, the "
                        "best first, as [0, 1] or [1, 0]"
                    )
            verdicts = [listed(each)[0] for each in verdicts]
        rows: list[list[float]] = []
        for verdict in verdicts:
            value = self._number(verdict)
            first = value if self.asked else 1.0 - value
            rows += [[first], [1.0 - first]]
        return torch.tensor(rows, dtype=torch.float32)

    def _asked(self, prompts: list[str], completions: list[Any]) -> list[Any]:
        """The judge's answers, one for each prompt."""
        name, first = self.names[0], f"the first of {len(prompts)} prompts is {shortened(prompts[0])}"
        try:
            found = listed(self.judge.judge(prompts, completions, **self.asked))
        except ImportError:
            raise
        except Exception as error:
            raise RewardError(f"judge {name!r} failed; {first}: {error_text(error)}") from error
        if not isinstance(found, list) or len(found) != len(prompts):
            got = f"{len(found)} verdicts" if isinstance(found, list) else f"{found!r:.60}"
            raise RewardError(f"judge {name!r} gave {got} for {len(prompts)} prompts: return one for each; {first}")
        return found

    def _number(self, verdict: Any) -> float:
        if isinstance(verdict, numbers.Real):
            verdict = float(verdict)
            if verdict == -1 or verdict != verdict:
                return math.nan
            if self.asked and 0 <= verdict <= 1 or verdict in (0, 1):
                return verdict
        wanted = "a probability from 0 to 1" if self.asked else "0 or 1"
        raise RewardError(
            f"judge {self.names[0]!r} answered {verdict!r:.60}: a verdict is {wanted}, or -1 where there is none"
        )


def plain(prompt: Any) -> str:
    """A prompt as a judge reads it, without the policy's chat template: a single message is its text, others are texts
    after the names of their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return text_of(prompt, "user")
    return "\n\n".join(f"{str(each['role']).capitalize()}: {text_of([each], each['role'])}" for each in prompt)
