"""Judges of pairs: what each class says, its verdicts as rewards, and the sentence for each mistake."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import trl
from tests.trainer.helpers import tiny_scorer
from trl import notices
from trl.rewards.calls import RewardError
from trl.rewards.pairwise import PAIRWISE_PROMPT, FunctionJudge, judge_of, turned
from trl.rewards.verdicts import Verdicts, plain

PROMPTS = ["one", "two", "three"]
PAIRS = [["good", "bad"], ["poor", "good"], ["good", "good"]]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    sentences: set[str] = set()
    monkeypatch.setattr(notices, "_printed", sentences)
    return sentences


class Good(trl.BasePairwiseJudge):
    """Prefers what says good."""

    def judge(self, prompts: list[str], completions: list[Any], shuffle_order: bool = True) -> list[int]:
        return [-1 if first == second else int(second == "good") for first, second in completions]


class Sorted(trl.BaseRankJudge):
    def judge(self, prompts: list[str], completions: list[Any], shuffle_order: bool = True) -> list[list[int]]:
        return [[0, 1] if first == "good" else [1, 0] for first, _ in completions]


class Sure(trl.BasePairwiseJudge):
    def judge(self, prompts, completions, shuffle_order=True, return_scores=False):  # type: ignore[no-untyped-def]
        return [0.75, 0.0, 1.0] if return_scores else [0, 1, 0]


class Has(trl.BaseBinaryJudge):
    def __init__(self, letter: str) -> None:
        self.letter = letter

    def judge(self, prompts, completions, gold_completions=None, shuffle_order=True):  # type: ignore[no-untyped-def]
        return [-1 if not text else int(self.letter in text) for text in completions]


def rewards(judge: Any, prompts: Any = PROMPTS, pairs: Any = PAIRS, **options: Any) -> list[float | None]:
    texts = [text for pair in pairs for text in pair]
    table = Verdicts(judge, **options).score([prompt for prompt in prompts for _ in range(2)], texts, [[]] * len(texts))
    assert table.shape == (len(texts), 1)
    return [None if math.isnan(value) else value for value in table[:, 0].tolist()]


def test_verdicts_become_rewards() -> None:
    assert rewards(Good()) == [1, 0, 0, 1, None, None]
    assert rewards(lambda prompts, completions: [0, 1, 1]) == [1, 0, 0, 1, 0, 1]
    assert rewards(Sorted()) == [1, 0, 0, 1, 1, 0]
    assert rewards(Has("g"), pairs=[["good", "bad"], ["poor", ""], ["g", "b"]]) == [1, 0, 0, None, 1, 0]
    assert rewards(Sure()) == [1, 0, 0, 1, 1, 0]
    assert rewards(Sure(), probabilities=True) == [0.75, 0.25, 0, 1, 1, 0]
    assert rewards(Good(), probabilities=True) == [1, 0, 0, 1, None, None]  # it has no probabilities


def test_what_a_judge_reads() -> None:
    seen: list[Any] = []

    def keep(prompts: list[str], completions: list[Any]) -> list[int]:
        seen.append((prompts, completions))
        return [0] * len(prompts)

    one = [{"role": "user", "content": "Say hello."}]
    two = [{"role": "system", "content": "Be short."}, *one]
    answer = [[{"role": "assistant", "content": text}] for text in ("hello", "hi", "yes", "no")]
    Verdicts(keep).score([one, one, two, two], answer, [[]] * 4)
    assert seen == [(["Say hello.", "System: Be short.\n\nUser: Say hello."], [["hello", "hi"], ["yes", "no"]])]
    assert plain("text") == "text"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([0, 1], "judge '<lambda>' gave 2 verdicts for 3 prompts: return one for each"),
        (None, "judge '<lambda>' failed; the first of 3 prompts is 'one': TypeError"),
        ([0, 1, 2], "judge '<lambda>' answered 2: a verdict is 0 or 1, or -1 where there is none"),
        ([0, 1, "a"], "answered 'a'"),
        ([0, 1, None], "answered None"),
        ([0, 1, 0.5], "answered 0.5"),
    ],
)
def test_wrong_answers_are_told(answer: Any, sentence: str) -> None:
    with pytest.raises(RewardError, match=re.escape(sentence)):
        rewards(lambda prompts, completions: answer)


def test_a_rank_judge_that_names_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sorted, "judge", lambda self, prompts, completions: [[1, 2], [0, 1], [0, 1]])
    with pytest.raises(RewardError, match="answered \\[1, 2\\] for two completions"):
        rewards(Sorted())


def test_all_judges_must_agree() -> None:
    texts = ["ab", "a", "", "b"]
    assert trl.AllTrueJudge([Has("a"), Has("b")]).judge(PROMPTS, texts) == [1, 0, -1, 0]

    class Odd(Has):
        def judge(self, *args: Any, **kwargs: Any) -> list[int]:
            return [3] * 4

    with pytest.raises(ValueError, match="a binary judge answered 3"):
        trl.AllTrueJudge([Has("a"), Odd("b")]).judge(PROMPTS, texts)
    with pytest.raises(TypeError, match="abstract"):
        trl.BasePairwiseJudge()


def test_a_judge_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "class Last:\n    def __init__(self, which=1):\n        self.which = which\n"
        "    def judge(self, prompts, completions, shuffle_order=True):\n        return [self.which] * len(prompts)\n"
        "def first(prompts, completions):\n    return [0] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert rewards("mine.py:first") == [1, 0] * 3
    assert rewards("mine.py:Last") == [0, 1] * 3 and rewards("mine.py:Last(which=0)") == [1, 0] * 3
    for name, sentence in (
        ("pairrm", "there is no judge 'pairrm': pair_rm, openai, hf are known"),
        ("mine.py:frist", "has no function 'frist': did you mean 'first'"),
    ):
        with pytest.raises(RewardError, match=sentence):
            judge_of(name)
    with pytest.raises(RewardError, match="a judge has a method `judge`"):
        judge_of(3)
    with pytest.raises(ImportError, match="pip install llm-blender"):
        judge_of("pair_rm")
    assert isinstance(judge_of(print), FunctionJudge)


def test_pair_rm_turns_pairs_and_ranks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class Blender:
        def loadranker(self, name: str, device: Any) -> None:
            assert name == "llm-blender/PairRM"

        def rank(self, prompts: Any, pairs: Any, return_scores: bool, disable_tqdm: bool) -> Any:
            score = torch.tensor([[float(text == "good") for text in pair] for pair in pairs])
            return (score if return_scores else (1.5 - (score - score.flip(1)) / 2)).numpy()

    monkeypatch.setitem(sys.modules, "llm_blender", types.SimpleNamespace(Blender=Blender))
    judge = trl.PairRMJudge()
    prompts, pairs = [f"prompt {number}" for number in range(8)], [["good", "bad"], ["bad", "good"]] * 4
    assert len(set(turned(prompts, pairs))) == 2
    assert judge.judge(prompts, pairs) == [0, 1] * 4
    high, low = (1 / (1 + math.exp(side)) for side in (-0.5, 0.5))
    assert judge.judge(prompts, pairs, return_scores=True, temperature=2.0) == pytest.approx([high, low] * 4)
    with pytest.raises(ValueError, match="two completions"):
        judge.judge(["a"], [["a"]])


def test_a_reward_model_judges(small_path: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_path)
    model = tiny_scorer(tokenizer)
    judge = trl.RewardModelJudge(model, tokenizer)
    prompts, pairs = ["the cat ", "the dog ", "a "], [["sat", "saw a bird"], ["over stone walls", "by"], ["x", "x"]]
    table = judge.rewards.score([p for p in prompts for _ in range(2)], [t for pair in pairs for t in pair], [[]] * 6)
    ahead = (table[::2, 0] - table[1::2, 0]).tolist()
    assert judge.judge(prompts, pairs) == [int(ahead[0] < 0), int(ahead[1] < 0), -1]
    sure = judge.judge(prompts, pairs, return_scores=True)
    assert sure == pytest.approx([1 / (1 + math.exp(-each)) for each in ahead]) and sure[2] == 0.5


@contextlib.contextmanager
def chat_server(answer: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint with OpenAI's protocol; `answer` makes the reply, or a status, of the question."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "key": self.headers.get("Authorization")})
            reply = answer(body["messages"][0]["content"])
            status, text = (reply, "no") if isinstance(reply, int) else (200, reply)
            message = {"message": {"role": "assistant", "content": text}, "index": 0, "finish_reason": "length"}
            content = json.dumps({"id": "1", "model": "m", "created": 1, "choices": [message],
                                  "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                                  "system_fingerprint": ""}).encode()  # fmt: skip
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def prefers_good(content: str) -> str:
    """The place of the answer that says good."""
    return str(int("Answer 1:\ngood" in content))


def test_an_endpoint_judges(said: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the endpoint is in this process
    prompts, pairs = [f"prompt {number}" for number in range(6)], [["good", "bad"], ["bad", "good"]] * 3
    with chat_server(prefers_good) as (url, asked):
        judge = trl.OpenAIPairwiseJudge("some-model", base_url=url, api_key="k", max_requests=10)
        assert judge.judge(prompts, pairs) == [0, 1] * 3
        assert {each["key"] for each in asked} == {"Bearer k"} and {each["max_tokens"] for each in asked} == {1}
        assert {each["model"] for each in asked} == {"some-model"}
        later = judge.judge(prompts, pairs)
        assert later.count(-1) == 2 and len(asked) == 10
        assert any("has sent its 10 requests" in sentence for sentence in said)
        hugging = trl.HfPairwiseJudge(f"{url}/chat/completions", system_prompt="{prompt} Answer 0:\n{response0} "
                                      "Answer 1:\n{response1}")  # fmt: skip
        assert hugging.judge(prompts, pairs) == [0, 1] * 3
    with chat_server(lambda content: "neither") as (url, _):
        assert trl.OpenAIPairwiseJudge(base_url=url).judge(["a"], [["b", "c"]]) == [-1]
        assert any("answered 'neither' instead of 0 or 1" in sentence for sentence in said)
    with chat_server(lambda content: 401) as (url, _), pytest.raises(RewardError, match="refused: HTTP 401"):
        trl.OpenAIPairwiseJudge(base_url=url).judge(["a"], [["b", "c"]])
    with pytest.raises(RewardError, match="failed: URLError"):
        trl.OpenAIPairwiseJudge(base_url="http://127.0.0.1:9").judge(["a"], [["b", "c"]])


def test_mistakes_of_a_prompt_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="has no key: set OPENAI_API_KEY"):
        trl.OpenAIPairwiseJudge()
    with pytest.raises(ValueError, match="no place for prompt, response1"):
        trl.OpenAIPairwiseJudge(api_key="k", system_prompt="{response0}?")
    assert PAIRWISE_PROMPT.format(prompt="p", response0="a", response1="b")
