"""The ready-made reward functions, on strings and on messages. Values marked "upstream" were recorded with TRL 1.16."""

from __future__ import annotations

import pickle
import sys
import threading
from typing import Any

import pytest

from trl import rewards
from trl.rewards import FACTORIES, REWARDS


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def both(function: Any, texts: list[str], **columns: Any) -> Any:
    """What a function gives for texts, after checking that messages get the same."""
    values = function(completions=texts, **columns)
    assert function(completions=[said(text) for text in texts], **columns) == values
    return values


def tokens(*lengths: int) -> list[list[int]]:
    return [[1] * length for length in lengths]


# --- format -------------------------------------------------------------------------------------------------------

THINK = {  # upstream
    "<think>\na\n</think>\nb": 1.0,
    "<think>\na\nb": 0.0,
    "<think>a</think>": 1.0,
    "x<think>a</think>b": 0.0,
    "<think>a<think>b</think>c": 0.0,
    "<think></think>": 1.0,
    "<think>a</think>b</think>c": 1.0,
    "a</think>b": 0.0,
    "\n<think>a</think>b": 0.0,
    "<think>a</think>\nb\n<think>c</think>": 0.0,
    "": 0.0,
    "<think>a</think": 0.0,
    "line\n<think>a</think>": 0.0,
}


def test_think_format() -> None:
    assert both(rewards.think_format_reward, list(THINK)) == list(THINK.values())


def test_json() -> None:
    valid = ['{"a": [1, null]}', " [1]\n", "4", '"text"', '```json\n{"a": 1}\n```', "```\n[]\n```"]
    broken = ["", "{'a': 1}", "{", "NaN", "[Infinity]", 'Here: {"a": 1}', "[" * 100_000]
    assert both(rewards.json_validity_reward, valid) == [1.0] * len(valid)
    assert both(rewards.json_validity_reward, broken) == [0.0] * len(broken)


def test_regex() -> None:
    assert both(rewards.get_regex_reward(r"<a>.+</a>"), ["x<a>1\n2</a>", "<a></a>"]) == [1.0, 0.0]
    assert both(rewards.get_regex_reward("yes", whole=True), [" yes\n", "yes!", "Yes"]) == [1.0, 0.0, 0.0]
    assert both(rewards.get_regex_reward("yes", ignore_case=True), ["oh YES"]) == [1.0]
    with pytest.raises(ValueError, match=r"get_regex_reward: '\(' is not a regular expression: missing \)"):
        rewards.get_regex_reward("(")


def test_exact_match() -> None:
    assert both(rewards.exact_match_reward, [" 4\n", "5", "4"], answer=["4", 5, None]) == [1.0, 1.0, None]
    assert both(rewards.exact_match_reward, ["4"], solution=["4"]) == [1.0]
    last = rewards.get_exact_match_reward(r"-?\d+")
    assert both(last, ["2 and 2 make 4.", "none", "4, no: -4"], answer=["4", "4", "-4"]) == [1.0, 0.0, 1.0]
    tagged = rewards.get_exact_match_reward("<a>(.*?)</a>", column="gold", ignore_case=True)
    assert both(tagged, ["<a>x</a><a> Paris </a>"], gold=["paris"]) == [1.0]
    with pytest.raises(ValueError, match="exact_match_reward needs a column `answer` or `solution`"):
        rewards.exact_match_reward(completions=["4"])


def test_the_last_assistant_message_is_read() -> None:
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "5"}]},
        {"role": "tool", "content": "6"},
    ]
    assert rewards.exact_match_reward([turns], answer=["It is 5"]) == [1.0]
    assert rewards.exact_match_reward([turns[:1]], answer=[""]) == [1.0]


# --- length and repetition ----------------------------------------------------------------------------------------


def test_overlong() -> None:  # upstream
    punish = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    expected = [0.0, 0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0]
    assert punish(completion_ids=tokens(0, 79, 80, 81, 90, 99, 100, 101, 500)) == expected
    assert rewards.get_soft_overlong_punishment(100, 0)(tokens(99, 100, 101)) == [0.0, 0.0, -1.0]


def test_repetition() -> None:  # upstream
    ids = [[1, 2, 3, 4], [5] * 5, [1, 2], [1, 2, 3], [], [1, 2] * 4, [1, 2, 3, 1, 2, 3, 4]]
    by_three = [0.0, -0.6666666666666667, 0.0, 0.0, 0.0, -0.6666666666666667, -0.19999999999999996]
    by_two = [0.0, -0.375, 0.0, 0.0, 0.0, -0.35714285714285715, -0.16666666666666669]
    assert rewards.get_repetition_penalty_reward()(completion_ids=ids) == by_three
    assert rewards.get_repetition_penalty_reward(2, -0.5)(ids) == by_two
    assert rewards.get_repetition_penalty_reward(1, -2)([[1, 1, 2]]) == [-0.6666666666666667]
    with pytest.raises(ValueError, match="max_penalty=0.1 must not be positive"):
        rewards.get_repetition_penalty_reward(max_penalty=0.1)


def test_length() -> None:
    by_tokens = rewards.get_length_reward(10)
    assert by_tokens(completions=[""] * 4, completion_ids=tokens(10, 5, 20, 30)) == [1.0, 0.5, 0.0, 0.0]
    by_words = rewards.get_length_reward(2, unit="words", tolerance=4)
    assert both(by_words, ["a b", "a b c"], completion_ids=tokens(9, 9)) == [1.0, 0.75]
    assert both(rewards.get_length_reward(4, unit="characters"), ["abcd", ""], completion_ids=tokens(1, 1)) == [1, 0]
    with pytest.raises(ValueError, match="unit='lines' is not one of"):
        rewards.get_length_reward(3, unit="lines")


# --- accuracy -----------------------------------------------------------------------------------------------------

GRADED = [  # completion, solution, reward, as read; upstream
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0, r"[1/3, '\\frac{1}{3}']"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0, r"[1/2, '\\frac{1}{2}']"),
    ("so $x=0.5$", r"$\frac12$", 0.0, "[unparseable]"),
    ("The answer is 42", "42", 0.0, "[unparseable]"),
    ("The answer is $42$.", "$42$", 1.0, "[42, '42']"),
    (r"\boxed{12 cm}", "$12$", 1.0, "[12, '12']"),
    ("nothing", "$3$", 0.0, "[unparseable]"),
    (r"\boxed{4}", "no math here", None, "[skipped]"),
    (r"first \boxed{1} then \boxed{2}", "$2$", 0.0, "[{1, 2}, '1,2']"),
    (r"\boxed{(1,2)}", "$(1,2)$", 1.0, "[Interval.open(1, 2), '(1,2)']"),
    (r"\boxed{50\%}", "$0.5$", 1.0, r"[50*(1/100), '50\\%']"),
    ("", "$1$", 0.0, "[unparseable]"),
    (r"$3$ or $\boxed{4}$", "$4$", 1.0, "[4, '4']"),
]


def test_accuracy() -> None:
    pytest.importorskip("math_verify")
    texts, solutions, expected, read = (list(column) for column in zip(*GRADED, strict=True))
    assert both(rewards.accuracy_reward, texts, solution=solutions) == expected
    logged: dict[str, list[str]] = {}
    rewards.accuracy_reward(texts, solutions, log_extra=logged.__setitem__)
    assert logged["solution"] == solutions and logged["answer_parsed"] == read
    assert logged["gold_parsed"][2:4] == [r"[1/2, '\\frac{1}{2}']", "[42, '42']"]
    assert logged["gold_parsed"][7] == "[unparseable]"


def test_accuracy_in_a_thread() -> None:
    """The library's timeouts need the main thread."""
    pytest.importorskip("math_verify")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(rewards.accuracy_reward([r"\boxed{4}"], ["$4$"])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_reasoning_accuracy() -> None:  # upstream
    pytest.importorskip("math_verify")
    rows = [
        (r"<think> r </think> \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
        (r"<think> r </think> \boxed{\frac{1}{2}}", r"\frac{1}{3}"),
        (r"<think> \boxed{\frac{1}{3}} no", r"\frac{1}{3}"),
        (r"a</think>\boxed{1}</think>\boxed{2}", "$2$"),
        (r"</think>\boxed{2}", "no math"),
        (r"x [END] \boxed{2} </think>", "$2$"),
    ]
    texts, solutions = [text for text, _ in rows], [solution for _, solution in rows]
    reward = rewards.reasoning_accuracy_reward
    assert both(reward, texts, solution=solutions) == [1.0, 0.0, 0.0, 1.0, None, 0.0]
    ends = ["[END]", "</think>"]
    assert both(reward, texts, solution=solutions, reasoning_delimiters=ends) == [1.0, 0.0, 0.0, 1.0, None, 1.0]
    logged: dict[str, list[str]] = {}
    reward(texts, solutions, log_extra=logged.__setitem__)
    assert logged["gold_parsed"][2] == logged["answer_parsed"][2] == "[incomplete reasoning]"


def test_cosine() -> None:  # upstream
    pytest.importorskip("math_verify")
    scaled = rewards.get_cosine_scaled_reward(max_len=100)
    ids = tokens(0, 25, 50, 100, 200)
    solution = [r"\frac{1}{3}"] * 5
    right, wrong = r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"
    expected = [1.0, 0.9267766952966369, 0.75, 0.5, 0.5]
    assert both(scaled, [right] * 5, solution=solution, completion_ids=ids) == expected
    expected = [-1.0, -0.9267766952966369, -0.75, -0.5, -0.5]
    assert both(scaled, [wrong] * 5, solution=solution, completion_ids=ids) == expected
    other = rewards.get_cosine_scaled_reward(100, -2, -1, 1, 2)
    values = other([right, wrong, "x"], [*solution[:2], "no math"], tokens(10, 10, 10))
    assert values == [1.9755282581475768, -1.9755282581475768, None]


# --- sentiment ----------------------------------------------------------------------------------------------------


def test_sentiment() -> None:
    pytest.importorskip("vaderSentiment")
    texts = ["This is great!", "This is awful.", "This is a table."]
    assert both(rewards.sentiment_reward, texts) == [0.6588, -0.4588, 0.0]
    down = both(rewards.get_sentiment_reward(target=-1), texts)
    assert down == pytest.approx([1 - 1.6588 / 2, 1 - 0.5412 / 2, 0.5])
    with pytest.raises(ValueError, match="target=2 is not between -1 and 1"):
        rewards.get_sentiment_reward(2)


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "columns", "module", "extra"),
    [
        ("accuracy_reward", {"solution": ["1"]}, "math_verify", "math"),
        ("reasoning_accuracy_reward", {"solution": ["1"]}, "math_verify", "math"),
        ("sentiment_reward", {}, "vaderSentiment.vaderSentiment", "sentiment"),
    ],
)
def test_without_its_library(
    monkeypatch: pytest.MonkeyPatch, name: str, columns: dict[str, Any], module: str, extra: str
) -> None:
    rewards.sentiment._analyser.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name} needs the extra `{extra}`: pip install 'trl\[{extra}\]'"):
        REWARDS[name](completions=["a"], **columns)


def test_names() -> None:
    assert set(FACTORIES) == {name for name in REWARDS if name.startswith("get_")}
    assert set(REWARDS) | {"REWARDS", "FACTORIES"} == set(rewards.__all__)
    made = [
        rewards.get_soft_overlong_punishment(9, 3),
        rewards.get_cosine_scaled_reward(9),
        rewards.get_repetition_penalty_reward(),
        rewards.get_length_reward(9),
        rewards.get_regex_reward("a"),
        rewards.get_exact_match_reward(),
        rewards.get_sentiment_reward(),
    ]
    names = [function.__name__ for function in made]
    assert names[:3] == ["soft_overlong_punishment_reward", "cosine_scaled_reward", "repetition_penalty_reward"]
    assert names[3:] == ["length_reward", "regex_reward", "exact_match_reward", "sentiment_reward"]
    assert [pickle.loads(pickle.dumps(function)).__name__ for function in made] == names
