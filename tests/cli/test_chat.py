"""`trl chat`: what a model answers in a conversation, from a script and from a terminal."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.rollout import chat
from trl.rollout.answers import pieces
from trl.rollout.types import Completion

from .conftest import Command

Chat = Callable[..., subprocess.CompletedProcess[str]]
TOKENS = 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def trl_chat(trl_here: Command, tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """`trl_chat("Hello", "/exit", seed=1)`: a chat with the tiny model, of these lines."""

    def run(
        *lines: str, model: str = tiny_path, terminal: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        script = io.StringIO("".join(line + "\n" for line in lines))
        monkeypatch.setattr("sys.stdin", Terminal() if terminal else script)
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return trl_here("chat", "--model_name_or_path", model, "--max_new_tokens", TOKENS, *words)

    return run


def greedy(path: str, messages: list[dict[str, str]]) -> str:
    """What transformers' `generate` answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_turns_are_those_of_generate(trl_chat: Chat, tiny_path: str, tmp_path: Path) -> None:
    answer = trl_chat("Hello", "", "And then?", temperature=0, system_prompt="Be kind.", transcript="all.jsonl")
    assert answer.returncode == 0
    messages = [{"role": "system", "content": "Be kind."}]
    for question in ("Hello", "And then?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": greedy(tiny_path, messages)})
    assert answer.stdout == "".join(each["content"] + "\n" for each in messages if each["role"] == "assistant")
    [row] = rows_of(tmp_path / "all.jsonl")
    assert row["messages"] == messages and row["model"] == tiny_path
    assert json.loads(row["sampling"])["max_new_tokens"] == TOKENS


def test_commands(trl_chat: Chat, tmp_path: Path) -> None:
    answer = trl_chat(
        *(
            "Hello",
            "/retry",
            "/set temperature=0",
            "/retry",
            "/clear",
            "//usr",
            "/system Short.",
            "Hi",
            "/save x.json",
        ),
        *("/exit", "never asked"),
        json="true",
    )
    assert answer.returncode == 0
    *turns, saved = [json.loads(line) for line in answer.stdout.splitlines()]
    assert saved == {"saved": "x.json"}
    assert [each["prompt"] for each in turns] == ["Hello", "Hello", "Hello", "/usr", "Hi"]
    assert len({each["answer"] for each in turns[:3]}) == 3
    assert all(each["tokens"] == TOKENS and each["finish"] == "length" for each in turns)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [[each["role"] for each in row["messages"]] for row in rows] == [["user", "assistant"]] * 2 + [
        ["system", "user", "assistant"]
    ]
    # Only the last answer to the first question stays.
    assert rows[0]["messages"][1]["content"] == turns[2]["answer"]
    assert rows[2]["messages"][0]["content"] == "Short."


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/sve", "there is no command /sve; did you mean /save?"),
        ("/set heat=1", "/set takes NAME=VALUE, with one of temperature, top_p"),
        ("/set top_p=2", "/set top_p=2: give a number, above 0, at most 1"),
        ("/set top_k=x", "/set top_k: 'x' is not a number"),
        ("/retry", "/retry: there is no answer to a message yet"),
    ],
)
def test_a_script_goes_on_after_a_mistake(trl_chat: Chat, line: str, sentence: str) -> None:
    answer = trl_chat(line, "Hello", temperature=0)
    assert answer.returncode == 1 and sentence in answer.stderr
    assert answer.stdout == trl_chat("Hello", temperature=0).stdout != "\n"
    told, turn = map(json.loads, trl_chat(line, "Hello", json="true").stdout.splitlines())
    assert sentence in told["error"] and turn["prompt"] == "Hello"


def test_a_saved_chat_replaces_nothing(trl_chat: Chat, tmp_path: Path) -> None:
    for name in ("other.jsonl", "old.txt"):
        (tmp_path / name).write_text("mine")
    answer = trl_chat(
        *("Hello", "/save new.jsonl", "And?", "/save new.jsonl"),  # its own file may be written again
        *("/save other.jsonl", "/save no/x.json", "/save x.md", "/save --overwrite old.txt", "/save --overwrite"),
        *("/save",),
        temperature=0,
    )
    assert answer.returncode == 1 and (tmp_path / "other.jsonl").read_text() == "mine"
    said = answer.stderr.splitlines()
    assert said[:2] == ["saved in new.jsonl"] * 2
    assert said[2].startswith("other.jsonl exists already: name another file") and "/save --overwrite FILE" in said[2]
    assert "the folder no does not exist: make it first" in said[3] and "ends in one of .jsonl, .json, .txt" in said[4]
    assert said[5] == "saved in old.txt" and "needs the name of a file" in said[6]
    assert said[7].startswith("saved in chat_history/") and ", in the new folder chat_history/" in said[7]
    [row] = rows_of(tmp_path / "new.jsonl")
    first, second = (row["messages"][place]["content"] for place in (1, 3))
    text = f"--- {row['model']} ---\n\nuser: Hello\n\nassistant: {first}\n\nuser: And?\n\nassistant: {second}\n"
    assert (tmp_path / "old.txt").read_text() == text
    again = trl_chat("Hello", transcript="new.jsonl")
    assert again.returncode == 2 and "new.jsonl exists already" in again.stderr
    assert trl_chat("Hello", transcript="new.jsonl", overwrite="true").returncode == 0
    assert len(rows_of(tmp_path / "new.jsonl")[0]["messages"]) == 2


def test_one_seed_and_another(trl_chat: Chat) -> None:
    first, again, other = (trl_chat("Hello", seed=seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_two_models(trl_chat: Chat, tiny_path: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), peft.LoraConfig(task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    answer = trl_chat("Hello", compare=tmp_path / "adapter", json="true", temperature=0)
    plain, adapted = [json.loads(line) for line in answer.stdout.splitlines()]
    assert (plain["model"], adapted["model"]) == (tiny_path, str(tmp_path / "adapter"))
    assert plain["answer"] == greedy(tiny_path, [{"role": "user", "content": "Hello"}]) != adapted["answer"]
    alone = trl_chat("Hello", adapter_name_or_path=tmp_path / "adapter", temperature=0)
    assert alone.stdout == adapted["answer"] + "\n"


def test_a_model_without_a_chat_template(trl_chat: Chat, tiny_path: str, tmp_path: Path) -> None:
    plain, tokenizer = str(tmp_path / "plain"), AutoTokenizer.from_pretrained(tiny_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.save_pretrained(plain)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    answer = trl_chat("The sea", "and", model=plain, temperature=0, transcript="t.jsonl")
    assert "has no chat template: it goes on with what you write, as plain text" in answer.stderr
    text = ""
    for line in ("The sea", "and"):
        text = f"{text}\n{line}" if text else line
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        text += tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert rows_of(tmp_path / "t.jsonl")[0]["text"] == text
    refused = trl_chat("Hello", model=plain, system_prompt="Be kind.")
    assert refused.returncode == 1 and "no place for a system prompt" in refused.stderr


def test_a_full_window(trl_chat: Chat) -> None:
    answer = trl_chat("word " * 3000)
    assert answer.returncode == 1
    assert "and the model's window 2,048: begin a new one (/clear)" in answer.stderr


def test_ctrl_c(trl_chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops an answer in a terminal, where the chat goes on; it ends a script. What was written stays."""

    def interrupted(tokenizer: Any, parts: Iterator[Completion]) -> Iterator[tuple[str, Completion]]:
        for number, each in enumerate(pieces(tokenizer, parts)):
            yield each
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(chat, "pieces", interrupted)
    script = trl_chat("Hello", "And?", transcript="t.jsonl")
    assert script.returncode == 130
    [row] = rows_of(tmp_path / "t.jsonl")
    assert [each["role"] for each in row["messages"]] == ["user", "assistant"] and row["messages"][1]["content"]
    lines = iter(["Hello", "/clear", "And?"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", typed)
    terminal = trl_chat(terminal=True, transcript="t.jsonl", overwrite="true")
    assert terminal.returncode == 0 and terminal.stdout.count("(stopped)") == 2
    assert "/help lists the commands" in terminal.stdout
    assert [len(row["messages"]) for row in rows_of(tmp_path / "t.jsonl")] == [2, 2]


def test_two_models_in_a_terminal(trl_chat: Chat, tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, as they are written: both columns hold the whole answer at the end."""
    lines = iter(["Hello", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    monkeypatch.setenv("COLUMNS", "200")
    answer = trl_chat(terminal=True, compare=tiny_path, temperature=0)
    assert answer.returncode == 0
    words = greedy(tiny_path, [{"role": "user", "content": "Hello"}]).split()
    assert len(words) > 1 and all(answer.stdout.count(word) >= 2 for word in words if word.isascii())


def test_characters_of_several_tokens_are_shown_whole(smol2_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol2_path)
    text = "Grüße 你好 🙂!"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    parts = [Completion(ids[: count + 1], [], False) for count in range(len(ids))]
    shown = [piece for piece, _ in pieces(tokenizer, iter(parts))]
    assert "".join(shown) == text and len(shown) > 5 and not any("\ufffd" in piece for piece in shown)


def test_options_of_other_releases(trl_chat: Chat) -> None:
    answer = trl_chat("Hello", torch_dtype="float32", examples_path="x.yaml", do_sample="false", eos_tokens="a,b")
    assert answer.returncode == 0 and "`examples_path` has no effect" in answer.stdout + answer.stderr
    assert trl_chat("Hello", num_beams=4).returncode == 2
