"""Rewards of every kind, and the sentence for everything that can be wrong with one."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trl import notices
from trl.rewards import REWARDS
from trl.rewards import judges as judges_room
from trl.rewards.calls import RewardError
from trl.rewards.functions import RewardFunctions
from trl.rewards.judges import Elsewhere, Here
from trl.rewards.shapes import Messages, Text, text_of

from . import judges

PROMPTS = ["What is 2+2?", "What is 15 * 7?", "What is 3?"]
TEXTS = ["It is 4.", "Maybe 104", ""]
IDS = [[1, 2, 3], [4, 5], []]
COLUMNS = {"answer": ["4", "105", "3"]}


def chat(values: list[str], role: str) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": value}] for value in values]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What `notify_once` said in this test."""
    sentences: set[str] = set()
    monkeypatch.setattr(notices, "_printed", sentences)
    return sentences


@pytest.fixture
def rewards() -> Iterator[Callable[..., RewardFunctions]]:
    """Makes `RewardFunctions` that are closed at the end."""
    made: list[RewardFunctions] = []

    def make(*arguments: Any, **options: Any) -> RewardFunctions:
        made.append(RewardFunctions(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ask(functions: RewardFunctions, texts: list[str] = TEXTS, **options: Any) -> list[list[float]]:
    """The table for the rows above, as lists; NaN as None."""
    prompts: list[Any] = PROMPTS[: len(texts)]
    completions: list[Any] = texts
    if functions.chat:
        prompts, completions = chat(prompts, "user"), chat(texts, "assistant")
    columns = {name: values[: len(texts)] for name, values in COLUMNS.items()}
    table = functions.score(prompts, completions, IDS[: len(texts)], columns, **options)
    assert table.dtype == torch.float32 and table.shape == (len(texts), len(functions.names))
    return [[None if math.isnan(value) else value for value in row] for row in table.tolist()]


# --- what functions are given -------------------------------------------------------------------------------------


def test_the_whole_signature(rewards: Any) -> None:
    seen: dict[str, Any] = {}

    def everything(prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0, 1.0, 2.0]

    state = object()
    assert ask(rewards(everything), trainer_state=state, prompt_ids=IDS) == [[0.0], [1.0], [2.0]]
    assert seen["prompts"] == PROMPTS and seen["completions"] == TEXTS and seen["completion_ids"] == IDS
    assert seen["answer"] == COLUMNS["answer"] and seen["trainer_state"] is state and seen["prompt_ids"] == IDS
    assert set(seen) == {"prompts", "completions", "completion_ids", "prompt_ids", "answer", "trainer_state"} | {
        "log_extra",
        "log_metric",
    }


def test_only_what_the_signature_takes(rewards: Any) -> None:
    class Callable_:
        def __call__(self, completions: list[str]) -> list[int]:
            return [len(text) for text in completions]

    def with_default(answer: list[str], missing: int = 7) -> list[int]:
        return [missing] * len(answer)

    def scaled(completions: list[str], answer: float) -> list[float]:
        return [answer] * len(completions)

    functions = rewards([Callable_(), with_default, functools.partial(scaled, answer=0.5)])
    assert functions.names == ["Callable_", "with_default", "scaled"]
    assert ask(functions) == [[8, 7, 0.5], [9, 7, 0.5], [0, 7, 0.5]]


def test_what_functions_log(rewards: Any) -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_metric("rows", len(completions))
        return [1.0] * len(completions)

    extra: dict[str, Any] = {}
    metrics: list[tuple[str, float]] = []
    functions = rewards(logs)
    ask(functions, log_extra=extra.__setitem__, log_metric=lambda name, value: metrics.append((name, value)))
    assert extra == {"length": [8, 9, 0]} and metrics == [("rows", 3)]
    ask(functions)  # nobody listens


def test_prompt_and_completion_columns_are_not_passed_on(rewards: Any) -> None:
    names: set[str] = set()

    def keys(**kwargs: Any) -> list[float]:
        names.update(kwargs)
        return [0.0]

    rewards(keys).score(["a"], ["b"], [[1]], {"prompt": ["a"], "completion": ["c"], "completion_ids": [[2]]})
    assert names == {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


# --- what they give -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1, None, True],
        (1.0, None, 1),
        torch.tensor([1.0, 2.0, 1.0]),
        torch.tensor([[1], [2], [1]]).numpy(),
        [torch.tensor(1.0), torch.tensor([2.0]), torch.tensor(1)],
        (value for value in (1, 2, 1)),
    ],
    ids=["list", "tuple", "tensor", "column", "tensors", "generator"],
)
def test_values(rewards: Any, values: Any) -> None:
    table = ask(rewards([lambda completions: values, lambda completions: [0, 0, 0]]))
    assert [row[0] for row in table] in ([1.0, None, 1.0], [1.0, 2.0, 1.0])


def test_combine(rewards: Any, said: set[str]) -> None:
    functions = rewards([lambda completions: [1, None, None], lambda completions: [2, 3, None]], weights=[0.5, -2])
    assert functions.names == ["<lambda>", "<lambda>_2"]
    table = functions.score(PROMPTS, TEXTS, IDS)
    total = functions.combine(table)
    assert total[:2].tolist() == [-3.5, -6.0] and total[2].isnan()
    (sentence,) = said
    assert sentence.startswith(
        "1 of 3 completions have no reward, because all of '<lambda>', '<lambda>_2' gave None: row 2 ('') is the first."
    )
    functions.score(PROMPTS, TEXTS, IDS)
    assert len(said) == 1


def test_no_rows(rewards: Any) -> None:
    functions = rewards([judges.lengths, judges.process])
    table = functions.score([], [], [])
    assert table.shape == (0, 2) and functions.combine(table).shape == (0,)


def gives(*values: Any) -> Callable[..., Any]:
    def judge(completions: Any) -> Any:
        return values[0] if len(values) == 1 else list(values)

    return judge


def fails_on_105(completions: list[str], answer: list[str]) -> list[float]:
    return [1 / (int(right) - 105) for right in answer]


def wants_solution(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0]


def wants_answers(answers: list[str]) -> list[float]:
    return [0.0]


WRONG = {
    "nan": (gives(0, math.nan, 0), r"'judge', row 1 \('Maybe 104'\): gave nan. Return a finite number, or None"),
    "infinity": (gives(-math.inf, 0, 0), r"'judge', row 0 \('It is 4.'\): gave -inf"),
    "too large": (gives(0, 0, 1e39), r"'judge', row 2 \(''\): gave 1e\+39"),
    "string": (gives(0, "1", 0), r"'judge', row 1 \('Maybe 104'\): gave '1', a str, instead of a number"),
    "list": (gives(0, [1, 2], 0), r"row 1 \('Maybe 104'\): gave '\[1, 2\]', a list, instead of a number"),
    "short": (gives(1, 2), r"'judge' returned 2 rewards for 3 completions.*\(row 2 is ''\)"),
    "long": (gives(1, 2, 3, 4), r"'judge' returned 4 rewards for 3 completions.*None where it does not apply"),
    "number": (gives(0.5), r"'judge' returned a float \(0.5\) instead of a list of 3 numbers.*'It is 4.'"),
    "nothing": (gives(None), r"'judge' returned a NoneType \(None\) instead of a list of 3 numbers"),
    "exception": (fails_on_105, r"'fails_on_105', row 1 \('Maybe 104'\): ZeroDivisionError: division by zero"),
    "column": (
        wants_solution,
        r"'wants_solution': it requires `solution`, and the data have no such column. Their columns: `answer`; it may",
    ),
    "near": (wants_answers, r"'wants_answers': it requires `answers`, and .* \(did you mean `answer`\?\)"),
    "factory": (
        REWARDS["get_regex_reward"],
        r"'get_regex_reward': it makes a reward function and is not one itself: pass get_regex_reward\(pattern=...\)",
    ),
}


@pytest.mark.parametrize(("function", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong(rewards: Any, function: Any, sentence: str) -> None:
    with pytest.raises(RewardError, match=sentence):
        ask(rewards([lambda completions: [0, 0, 0], function]))


def test_long_texts_are_cut_in_sentences(rewards: Any) -> None:
    with pytest.raises(RewardError, match=re.escape(f"row 0 ('{'x' * 60}…'): gave nan")):
        rewards(gives([math.nan])).score(["a"], ["x" * 100], [[1]])


def test_what_is_not_installed_stays_an_import_error(rewards: Any) -> None:
    def needs(completions: Any) -> Any:
        raise ImportError("this needs the extra `math`")

    with pytest.raises(ImportError, match="needs the extra"):
        ask(rewards(needs))


def test_lengths_that_differ(rewards: Any) -> None:
    with pytest.raises(RewardError, match="1 prompts for 2 completions"):
        rewards(judges.process).score(["a"], ["b", "c"], [[1], [2]])
    with pytest.raises(RewardError, match="1 column answer for 2 completions"):
        rewards(judges.process).score(["a", "a"], ["b", "c"], [[1], [2]], {"answer": ["d"]})


def test_arguments() -> None:
    one = gives(0)
    for options, sentence in (
        ({"weights": [1.0, 2.0]}, "2 reward_weights for 1 reward functions: give one for each"),
        ({"weights": [math.nan]}, "not a finite number"),
        ({"processing_classes": [None, None]}, "2 reward_processing_classes for 1 reward functions"),
    ):
        with pytest.raises(RewardError, match=sentence):
            RewardFunctions(one, **options)
    for nothing in ([], None):
        with pytest.raises(RewardError, match="reward_funcs is empty"):
            RewardFunctions(nothing)
    with pytest.raises(RewardError, match="not 3, a int"):
        RewardFunctions(3)


def test_a_constant_is_said_once(rewards: Any, said: set[str]) -> None:
    values = iter([[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0], *[[0.5, None, 0.5]] * 9])
    functions = rewards([lambda completions: next(values), lambda completions: [1, 2, 3]])
    for _ in range(8):
        ask(functions)
    assert not said
    for _ in range(4):
        ask(functions)
    (sentence,) = said
    assert sentence == (
        "reward function '<lambda>' gave 0.5 to every row 5 times in a row, lately to 'It is 4.': nothing is learnt "
        "from a constant reward."
    )


# --- strings and messages -----------------------------------------------------------------------------------------


def correctness_reward(completions: Any, answer: Any, **kwargs: Any) -> list[float]:
    """As people write it, for messages."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", completion[-1]["content"])
        rewards.append(1.0 if numbers and numbers[-1] == right else 0.0)
    return rewards


def test_a_function_for_messages_and_data_of_strings(rewards: Any, said: set[str]) -> None:
    functions = rewards(correctness_reward)
    for _ in range(2):
        assert ask(functions) == [[1.0], [0.0], [0.0]]
    assert said == {
        "reward function 'correctness_reward' reads chat messages, and prompts and completions are strings: each "
        "acts as one message"
    }
    assert ask(rewards(correctness_reward, chat=True)) == [[1.0], [0.0], [0.0]]


def test_a_function_that_loops_over_messages(rewards: Any, said: set[str]) -> None:
    def loops(completions: Any, prompts: Any) -> list[float]:
        assert all(message["role"] == "user" for prompt in prompts for message in prompt)
        return [float(len("".join(message["content"] for message in completion))) for completion in completions]

    functions = rewards(loops)
    for _ in range(2):
        assert ask(functions) == [[8.0], [9.0], [0.0]]
    (sentence,) = said
    assert sentence.startswith("reward function 'loops' fails on strings (TypeError: string indices must be integers")
    assert sentence.endswith("and works on chat messages: it gets chat messages")


def test_a_function_for_strings_and_data_of_messages(rewards: Any, said: set[str]) -> None:
    calls = []

    def strips(prompts: Any, completions: Any, log_extra: Any) -> list[float]:
        calls.append(type(completions[0]))
        log_extra("seen", [str(prompt) for prompt in prompts])
        return [float(len(text.strip()) + prompt.count("2")) for prompt, text in zip(prompts, completions, strict=True)]

    functions = rewards(strips, chat=True)
    extra: list[Any] = []
    for _ in range(2):
        assert ask(functions, log_extra=lambda name, values: extra.append(values)) == [[10.0], [9.0], [0.0]]
    assert calls == [Messages, Text, Text]
    assert extra == [PROMPTS, PROMPTS]  # what the call that failed logged is forgotten
    (sentence,) = said
    assert sentence.startswith("reward function 'strips' fails on chat messages (AttributeError: 'Messages' object has")


def test_strings_are_found_in_messages(rewards: Any, said: set[str]) -> None:
    """A plain list would say no to both, and every reward would be 0."""

    def finds(completions: Any, answer: Any) -> list[float]:
        return [float(right in completion or completion == "") for right, completion in zip(answer, completions)]  # noqa: B905

    functions = rewards([finds, lambda completions: [0, 0, 0]], chat=True)
    assert [row[0] for row in ask(functions)] == [1.0, 0.0, 1.0]
    (sentence,) = said
    assert sentence.startswith("reward function 'finds' looks for strings in prompts or completions, which are")


def test_a_function_for_strings_gets_strings(rewards: Any, said: set[str]) -> None:
    def plain(completions: list[str], prompts: list[str]) -> list[float]:
        assert all(isinstance(text, str) for text in completions + prompts)
        assert json.loads(json.dumps(completions)) == completions
        return [float(text.endswith(".") and text[-1] == "." and text[:2] == "It") for text in completions]

    assert ask(rewards(plain)) == [[1.0], [0.0], [0.0]] and not said


def test_failing_in_both_shapes(rewards: Any) -> None:
    def both(completions: Any) -> list[float]:
        return [
            completion["score"] if isinstance(completion, str) else completion.nothing for completion in completions
        ]

    sentence = r"row 0 \('It is 4.'\): KeyError: 'score' \(and as chat messages: AttributeError: 'Messages'"
    with pytest.raises(RewardError, match=sentence):
        ask(rewards(both))


def test_messages_written_by_someone_else(rewards: Any) -> None:
    """Completions of several turns, prompts of several, and completions that are strings though prompts are not."""
    seen: list[Any] = []

    def sees(prompts: Any, completions: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [text_of(completions[0]) == "b" and text_of(prompts[0], "user") == "q"]

    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    functions = rewards(sees, chat=True)
    assert functions.score([prompt], ["b"], [[1]]).tolist() == [[1.0]]
    assert seen == [[prompt], [[{"role": "assistant", "content": "b"}]]]


def test_text() -> None:
    text = Text("hello")
    assert text == "hello" and text[-1] == "o" and text[1:3] == "el" and list(text) == list("hello")
    assert type(text[1:3]) is str and all(type(character) is str for character in text)
    assert text[0]["content"] == text[-1]["content"] == text["content"] == "hello" and text[0]["role"] == "assistant"
    assert text[0].get("content") == "hello" and text[0].get("tool_calls") is None and text.get("x", 3) == 3
    assert type(text["content"]) is str and text.asked
    for wrong in (lambda: text["other"], lambda: text[0]["name"]):
        with pytest.raises(KeyError):
            wrong()
    with pytest.raises(IndexError):
        text[5]
    empty = Text("")
    assert empty[-1] == "" and empty[-1]["content"] == "" and not empty.asked[1:]
    other = pickle.loads(pickle.dumps(Text("a", "user")))
    assert (other, other.role, other[0]["role"]) == ("a", "user", "user")
    assert pickle.loads(pickle.dumps(text[0]))["content"] == "hello"


def test_messages() -> None:
    messages = Messages([{"role": "assistant", "content": "hello"}])
    assert messages == [{"role": "assistant", "content": "hello"}] and messages != [] and not messages.asked
    assert "ell" in messages and messages == "hello" and "hello" == messages and messages != "other"  # noqa: SIM300
    assert {"role": "assistant", "content": "hello"} in messages and messages.asked
    with pytest.raises(TypeError):
        hash(messages)
    assert pickle.loads(pickle.dumps(messages)) == messages


# --- asynchronous functions ---------------------------------------------------------------------------------------


def test_async_functions_run_at_the_same_time(rewards: Any) -> None:
    reached = {"one": 0, "two": 0}

    async def meets(name: str, other: str) -> list[float]:
        reached[name] = threading.get_ident()
        while not reached[other]:
            await asyncio.sleep(0.001)
        return [1.0, 2.0, 3.0]

    async def one(completions: Any) -> list[float]:
        return await meets("one", "two")

    class Two:
        async def __call__(self, completions: Any, **kwargs: Any) -> list[float]:
            return await meets("two", "one")

    def here(completions: Any) -> list[float]:
        while not all(reached.values()):  # the others run while this does
            time.sleep(0.001)
        return [float(threading.get_ident() in reached.values())] * 3

    functions = rewards([one, Two(), here, lambda completions: here_again()], timeout=30)

    async def here_again() -> list[float]:
        return [7.0, 8.0, 9.0]

    assert functions.names == ["one", "Two", "here", "<lambda>"]
    assert ask(functions) == [[1, 1, 0, 7], [2, 2, 0, 8], [3, 3, 0, 9]]


def test_async_inside_a_running_loop(rewards: Any) -> None:
    async def judge(completions: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(completion[-1]["content"] == "") for completion in completions]

    async def notebook() -> list[list[float]]:
        return ask(rewards(judge))

    assert asyncio.run(notebook()) == [[0.0], [0.0], [1.0]]


def test_async_in_the_other_shape(rewards: Any, said: set[str]) -> None:
    async def strips(completions: Any) -> list[float]:
        return [float(len(text.strip())) for text in completions]

    assert ask(rewards(strips, chat=True)) == [[8.0], [9.0], [0.0]] and len(said) == 1


def test_async_errors(rewards: Any) -> None:
    async def late(completions: Any) -> list[float]:
        await asyncio.sleep(60)
        return []

    async def own(completions: Any) -> list[float]:
        raise TimeoutError("the service is slow")

    async def wants(solution: Any) -> list[float]:
        return []

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'late' did not answer within 0.1 seconds; .* 3 texts is 'It is 4.'"):
        ask(rewards(late, timeout=0.1))
    assert time.monotonic() - began < 10
    with pytest.raises(RewardError, match=r"'own', one of 3 rows, .* 'It is 4.': TimeoutError: the service is slow"):
        ask(rewards(own, timeout=30))
    with pytest.raises(RewardError, match="'wants': it requires `solution`"):
        ask(rewards(wants))


# --- worker processes ---------------------------------------------------------------------------------------------


def test_workers(rewards: Any, said: set[str]) -> None:
    judges.lengths.workers = 0  # type: ignore[attr-defined]
    try:
        functions = rewards([judges.lengths, judges.process], workers=2)
        here = functions.judges[0]
        assert isinstance(here, Here)
    finally:
        del judges.lengths.workers  # type: ignore[attr-defined]
    functions = rewards([judges.lengths, judges.process, judges.content, "trl.rewards:think_format_reward"], workers=2)
    extra: dict[str, Any] = {}
    metrics: list[tuple[str, float]] = []
    listeners = {"log_extra": extra.__setitem__, "log_metric": lambda name, value: metrics.append((name, value))}
    table = ask(functions, **listeners)
    assert [row[0] for row in table] == [8.0, 9.0, 0.0] and [row[2] for row in table] == [0.0] * 3
    assert extra == {"upper": ["IT IS 4.", "MAYBE 104", ""]} and metrics == [("rows", 2), ("rows", 1)]
    assert all(row[1] != judges.os.getpid() % 1000 for row in table)
    assert said == {
        "reward function 'content' reads chat messages, and prompts and completions are strings: each acts as one "
        "message"
    }
    chatty = rewards([judges.lengths], workers=1, chat=True)
    assert [row[0] for row in ask(chatty)] == [8.0, 9.0, 0.0]
    assert any(sentence.startswith("reward function 'lengths' fails on chat messages") for sentence in said)


def test_worker_errors(rewards: Any) -> None:
    with pytest.raises(RewardError, match=r"'<lambda>' cannot be sent to a worker process .* attribute `workers` to 0"):
        rewards(lambda completions: [], workers=1)
    functions = rewards([judges.refuses], workers=1)
    with pytest.raises(RewardError, match=r"'refuses', one of 3 rows, .* 'It is 4.': OwnError: no 3"):
        ask(functions)
    functions.judges = [Elsewhere(judges.dies, False, None, 1, functions._pool, 60)]
    functions.names = ["dies"]
    with pytest.raises(RewardError, match=r"'dies', .*: its worker process died. Out of memory\? .*__main__"):
        ask(functions)
    functions.judges = [Elsewhere(judges.process, False, None, 1, functions._pool, 60)]
    assert len(ask(functions)) == 3  # a new process
    unsent = {"answer": [threading.Lock()]}
    with pytest.raises(RewardError, match="its arguments or rewards cannot pass between processes"):
        functions.score(["a"], ["b"], [[1]], unsent)
    functions.judges = [Elsewhere(judges.sleeps, False, None, 1, functions._pool, 0.5)]
    with pytest.raises(RewardError, match="did not come back from its worker process within 0.5 seconds"):
        ask(functions)


SCRIPT = """
import asyncio
from trl.rewards.functions import RewardFunctions

def lengths(completions, **kwargs):
    return [float(len(text)) for text in completions]

async def hangs(completions):
    await asyncio.sleep(1000)

if __name__ == "__main__":
    functions = RewardFunctions(lengths, workers=2)
    print(functions.score(["a"] * 3, ["b", "cc", ""], [[1]] * 3).tolist())
    try:
        RewardFunctions(hangs, timeout=0.1).score(["a"], ["b"], [[1]])
    except ValueError as error:
        print(type(error).__name__)
"""


@pytest.mark.slow
def test_a_script_with_functions_of_its_own_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[1.0], [2.0], [0.0]]", "RewardError"]


# --- endpoints ----------------------------------------------------------------------------------------------------


class Endpoint:
    """A local server that gives the prepared answers one after the other, the last for ever."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers, self.asked = list(answers), []  # type: ignore[var-annotated]
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                if status == 0:
                    time.sleep(body)
                    status, body = 200, {}
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # who asked has gone
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    monkeypatch.setattr(judges_room, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made: list[Endpoint] = []

    def make(*answers: tuple[int, Any]) -> Endpoint:
        made.append(Endpoint(*answers))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def test_endpoint(rewards: Any, endpoint: Any, said: set[str]) -> None:
    server = endpoint((200, {"rewards": [1, None, 0.5]}))
    functions = rewards([server.url, lambda completions: [0, 0, 0]])
    assert functions.names[0] == server.url.removeprefix("http://")
    assert [row[0] for row in ask(functions)] == [1.0, None, 0.5]
    assert server.asked == [{"prompts": PROMPTS, "completions": TEXTS, "columns": COLUMNS}]
    functions = rewards(server.url, chat=True)
    functions.score([[{"role": "user", "content": "a"}]] * 3, ["b"] * 3, [[1]] * 3, {"odd": [{1}] * 3, "even": [2] * 3})
    assert server.asked[-1] == {
        "prompts": [[{"role": "user", "content": "a"}]] * 3,
        "completions": ["b"] * 3,
        "columns": {"even": [2] * 3},
    }
    assert any(sentence.startswith("the column odd is not sent to http://127.0.0.1") for sentence in said)


def test_endpoint_retries(rewards: Any, endpoint: Any) -> None:
    server = endpoint((503, b"busy"), (429, b""), (200, {"rewards": [1, 2, 3]}))
    assert ask(rewards(server.url)) == [[1.0], [2.0], [3.0]] and len(server.asked) == 3
    slow = endpoint((0, 2.0), (200, {"rewards": [1, 2, 3]}))
    assert ask(rewards(slow.url, timeout=0.3)) == [[1.0], [2.0], [3.0]] and len(slow.asked) == 2


def test_endpoint_errors(rewards: Any, endpoint: Any) -> None:
    server = endpoint((500, b"out of order"))
    sentence = r"score', one of 3 rows, .*: the endpoint http://\S+ failed 3 times, last with: HTTP 500 .*out of order"
    with pytest.raises(RewardError, match=sentence):
        ask(rewards(server.url, retries=2))
    assert len(server.asked) == 3
    server = endpoint((404, b""))
    with pytest.raises(RewardError, match=r"the endpoint \S+ refused: HTTP 404 Not Found$"):
        ask(rewards(server.url))
    assert len(server.asked) == 1
    for body in (b"<html>", {"reward": [1]}, [1, 2, 3], {"rewards": 1}):
        with pytest.raises(RewardError, match=r'answered .* instead of \{"rewards"'):
            ask(rewards(endpoint((200, body)).url))
    with pytest.raises(RewardError, match=r"returned 2 rewards for 3 completions"):
        ask(rewards(endpoint((200, {"rewards": [1, 2]})).url))
    with pytest.raises(RewardError, match=r"row 1 \('Maybe 104'\): gave 'a', a str"):
        ask(rewards(endpoint((200, {"rewards": [1, "a", 2]})).url))
    with pytest.raises(RewardError, match="failed 1 times, last with: no answer within 0.2 seconds"):
        ask(rewards(endpoint((0, 2.0)).url, timeout=0.2, retries=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(RewardError, match="failed 2 times, last with: .*[Rr]efused"):
            ask(rewards(f"http://127.0.0.1:{free.getsockname()[1]}", retries=1))


# --- by name ------------------------------------------------------------------------------------------------------

FILE = """
import dataclasses

@dataclasses.dataclass
class Settings:
    scale: float = 2.0

def doubled(completions, **kwargs):
    return [Settings().scale * len(text) for text in completions]

def scaled(by, name="x"):
    return lambda completions: [by * len(text) for text in completions]

number = 3
"""


def test_names(rewards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [
        "think_format_reward",
        "get_soft_overlong_punishment",
        "get_length_reward(4, unit='characters')",
        "own_rewards:doubled",
        "own_rewards.doubled",
        f"{tmp_path}/own_rewards.py:doubled",
        "own_rewards.py:scaled(by=3)",
    ]
    functions = rewards(names)
    assert functions.names == [
        "think_format_reward",
        "soft_overlong_punishment_reward",
        "length_reward",
        "doubled",
        "doubled_2",
        "doubled_3",
        "<lambda>",
    ]
    assert ask(functions)[0] == [0.0, 0.0, 0.0, 16.0, 16.0, 16.0, 24.0]
    far = rewards(["own_rewards.py:doubled"], workers=1)  # a worker finds it by its name
    assert ask(far) == [[16.0], [18.0], [0.0]]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("think_format", "there is no reward function 'think_format': did you mean 'think_format_reward'"),
        ("get_regex_reward", r"missing a required argument: 'pattern'. Write its arguments in brackets: get_regex_rew"),
        ("get_regex_reward(yes)", "arguments of the reward function .* are not plain values: write strings in quotes"),
        ("no_such_module:reward", "there is no module 'no_such_module' in the working folder"),
        ("no_such_module.reward", "there is no module 'no_such_module' in the working folder"),
        ("no_such_file.py:reward", "there is no file no_such_file.py"),
        ("trl.rewards:think_format", "trl.rewards has no function 'think_format': did you mean 'think_format_reward'"),
        ("trl.rewards:REWARDS", "trl.rewards:REWARDS is a dict, not a function"),
        ("/no/such/folder/model", "'/no/such/folder/model' is neither a function .* nor a reward model"),
        ("file.py", "there is no module 'file'"),
    ],
)
def test_wrong_names(name: str, sentence: str) -> None:
    with pytest.raises(RewardError, match=sentence):
        RewardFunctions(name)


def test_a_module_that_misses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_rewards.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        RewardFunctions("half_rewards:f")
