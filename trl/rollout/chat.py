"""Conversations with a model: messages through its chat template, answers as they are written, transcripts."""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.checkpoint import write_file
from trl.data.tokenizing.chat import render

from .answers import AnswerFields, pieces, window_of
from .generate import InProcessSampler
from .types import Request, Sampling


@dataclass
class ChatArguments(AnswerFields):
    """Options of a chat."""

    compare: str | None = field(
        default=None, metadata={"help": "Another model, or an adapter's folder, that answers too, side by side."}
    )
    save_folder: str = field(default="./chat_history", metadata={"help": "Folder of what /save writes."})
    transcript: str | None = field(
        default=None, metadata={"help": "File that has the whole chat after each turn: .jsonl, .json, or .txt."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the file of `transcript` if it exists."})
    user: str = field(default="user", metadata={"help": "Name of the user on the screen."})


class Conversation:
    """A model's side of a chat: what was said, and what it answers.

    `messages` is the conversation so far. A model without a chat template goes on with `text`, the plain text of all
    turns; a system prompt is an error there (ValueError). A sample is drawn by (seed, number of answers so far).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        name: str = "assistant",
        system_prompt: str | None = None,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_cache_tokens: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.name, self.seed = model, tokenizer, sampling, name, seed
        self.template_options = chat_template_kwargs or {}
        self.is_plain = not tokenizer.chat_template
        self.sampler = InProcessSampler(tokenizer, max_cache_tokens=max_cache_tokens)
        self.sampler.sync(model, 0)
        self.answers = 0  # so far; earlier conversations included
        self.finished: list[dict[str, Any]] = []  # earlier conversations, as rows of a transcript
        self.messages: list[dict[str, str]] = []
        self.text = ""
        self.tokens, self.complete = 0, True  # of the last answer: its length, and whether it ended by itself
        self.system_prompt: str | None = None
        self.begin(system_prompt)

    def begin(self, system_prompt: str | None = None) -> None:
        """Begin a new conversation; the one so far stays in the transcript."""
        if self.is_plain and system_prompt:
            raise ValueError(f"{self.name} has no chat template, so that it has no place for a system prompt")
        if self.has_answers():
            self.finished.append(self._row())
        self.system_prompt, self.text = system_prompt, ""
        self.messages = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def has_answers(self) -> bool:
        return bool(self.text) or any(each["role"] == "assistant" for each in self.messages)

    def ask(self, content: str) -> Iterator[str]:
        """The answer to the user's message, in pieces, as it is written. Question and answer join the conversation
        when the answer ends, or when the iterator is closed. ValueError if the conversation fills the model's window,
        or the template refuses it; the conversation is then as before."""
        asked = [*self.messages, {"role": "user", "content": content}]
        text = f"{self.text}\n{content}" if self.text else content
        if self.is_plain:
            ids = self.tokenizer(text)["input_ids"]
        else:
            rendered = render(self.tokenizer, asked, True, **self.template_options)
            ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        request = Request(ids, 1, (self.seed, self.answers), limit=self._room(len(ids)))
        self.answers += 1
        answer, self.tokens, self.complete = "", 0, False
        try:
            for piece, completion in pieces(self.tokenizer, self.sampler.stream(request, self.sampling)):
                answer, self.tokens, self.complete = answer + piece, len(completion.ids), completion.finished
                if piece:
                    yield piece
        finally:
            if self.tokens:
                self.messages = [*asked, {"role": "assistant", "content": answer}]
                self.text = text + answer

    def take_back(self) -> str | None:
        """Remove the last question and its answer; returns the question, or None if there is none."""
        if self.is_plain or len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return None
        *self.messages, question, _ = self.messages
        return question["content"]

    def _room(self, length: int) -> int | None:
        """The most tokens of an answer after a prompt of `length` tokens, or None if the window sets no limit."""
        window = window_of(self.model)
        if window is None:
            return None
        if length >= window:
            raise ValueError(
                f"the conversation has {length:,} tokens, and the model's window {window:,}: begin a new one (/clear)"
            )
        return window - length

    def rows(self) -> list[dict[str, Any]]:
        """The conversations so far, one row each, in a form that training reads: `messages`, or `text`."""
        return [*self.finished, *([self._row()] if self.has_answers() else [])]

    def _row(self) -> dict[str, Any]:
        content: dict[str, Any] = {"text": self.text} if self.is_plain else {"messages": list(self.messages)}
        settings = {
            key: value for key, value in dataclasses.asdict(self.sampling).items() if value not in (None, (), {})
        }
        return {**content, "model": self.name, "seed": self.seed, "sampling": json.dumps(settings)}


def save_transcript(conversations: list[Conversation], path: Path) -> Path:
    """Write all conversations into a file: one row a line, a JSON list if the name ends in .json, or a text to read if
    it ends in .txt. The file is whole at every moment."""
    rows = [row for each in conversations for row in each.rows()]
    if path.suffix == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    elif path.suffix == ".txt":
        text = "\n".join(map(_to_read, rows))
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, lambda target: _write(target, text))
    return path


def _to_read(row: dict[str, Any]) -> str:
    """A conversation as a text: the model, then the turns, each under the name of its role."""
    turns = [f"{each['role']}: {each['content']}" for each in row.get("messages", ())] or [row["text"]]
    return "\n\n".join([f"--- {row['model']} ---", *turns]) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def transcript_path(folder: str | Path, name: str) -> Path:
    """A file for the transcript of a chat with the model `name`, by the time of day."""
    return Path(folder) / Path(name).name / f"chat_{time.strftime('%Y-%m-%d_%H-%M-%S')}.jsonl"
