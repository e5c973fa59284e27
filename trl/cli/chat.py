"""`trl chat`: a conversation with a model, or with two side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trl.cli import UsageError, check_file, check_folder, hide_library_notes, nearest
from trl.cli.flags import Flags, remembered
from trl.cli.parser import Parser
from trl.cli.reply import ReplyFields, check_given, check_models
from trl.demo.stages import quiet
from trl.options import LIMITS

HELP = """\
/clear            begin a new conversation
/system [TEXT]    begin a new conversation with this system prompt (without a text: with none)
/retry            answer the last message again, with other random numbers
/set NAME=VALUE   temperature, top_p, top_k, min_p, max_new_tokens, repetition_penalty
/save [FILE]      write all conversations: .jsonl and .json are read by `trl sft`, .txt by people
/save --overwrite FILE    the same, in place of a file that exists
/help             this text
/exit             end
A message that begins with a slash is typed with two: //path"""
ANSWERING = {
    "Model": dict.fromkeys(("model_name_or_path", "adapter_name_or_path", "dtype", "load_in_4bit", "device"), ""),
    "Answers": {
        **dict.fromkeys(("system_prompt", "max_new_tokens"), ""),
        "temperature": "Softmax temperature; 0: the most likely token. [1.0]",
        **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty", "stop_strings", "seed"), ""),
    },
}
COMMON = {
    **ANSWERING,
    "Chat": dict.fromkeys(("compare", "transcript", "overwrite", "save_folder", "user", "json"), ""),
}
ANSWER_LIMITS = LIMITS | {"temperature": LIMITS["temperature"]._replace(above=False)}  # 0: the most likely token
ENDINGS = (".jsonl", ".json", ".txt")  # of transcripts
SETTABLE = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty")


def classes() -> list[type]:
    from trl.rollout.chat import ChatArguments

    return [ChatArguments, ReplyFields]


def run(argv: Sequence[str], command: str) -> int:
    parser = Parser(
        flags=remembered(command, lambda: Flags.of(classes())),
        limits=ANSWER_LIMITS,
        prog=f"trl {command}",
        description="Talks to a model in this process. Where the input is no terminal, each of its lines is a message "
        "or a command, and the output is the answers alone.",
        common=COMMON,
        notes=(
            f"Example: trl {command} --model_name_or_path trainer_output --system_prompt 'Answer in one sentence.'",
            f"Example: echo 'What is a token?' | trl {command} --model_name_or_path trainer_output --temperature 0",
            "In the chat: /clear, /system TEXT, /retry, /set NAME=VALUE, /save FILE, /help, /exit. Ctrl-C stops an "
            "answer, and ends the chat where there is none.",
            "Exit status: 0 ended, 1 an error (also of one line of a piped input, after which the others are "
            "answered), 2 a wrong command line, 130 interrupted.",
        ),
    )
    values = parser.read(argv)
    check_given(values, {"model_name_or_path": "the model to talk to, a folder or a model's name"})
    if values.get("transcript"):
        _check_transcript(values["transcript"], bool(values.get("overwrite")), "--overwrite")
    check_models(values)
    hide_library_notes()
    quiet()
    asked, how = parser.instances(values, classes())
    with contextlib.redirect_stdout(sys.stderr):
        conversations = _opened(asked)
    return _Chat(asked, conversations, how.json, sys.stdin.isatty()).run()


def _check_transcript(name: str, replace: bool, remedy: str) -> None:
    """Raise UsageError if the file cannot be written, or is no transcript by its ending."""
    if Path(name).suffix not in ENDINGS:
        raise UsageError(f"{name}: the name of a transcript ends in one of {', '.join(ENDINGS)}.")
    check_file(name, replace, f", or replace it with {remedy}")


def _opened(asked: Any) -> list[Any]:
    """The conversation with the model, and with the one that it is compared with."""
    from trl.rollout.answers import open_model
    from trl.rollout.chat import Conversation

    models = [(asked.model_name_or_path, asked.adapter_name_or_path)]
    models += [(asked.compare, None)] if asked.compare else []
    found = []
    for name, adapter in models:
        model, tokenizer = open_model(asked, name, adapter)
        if not tokenizer.chat_template:
            print(f"trl: {name} has no chat template: it goes on with what you write, as plain text")
        found.append(
            Conversation(
                model,
                tokenizer,
                asked.sampling(model, tokenizer),
                name=adapter or name,
                system_prompt=asked.system_prompt,
                seed=asked.seed,
                chat_template_kwargs=asked.chat_template_kwargs,
                max_cache_tokens=asked.max_cache_tokens,
            )
        )
    return found


class _Chat:
    def __init__(self, asked: Any, conversations: list[Any], as_json: bool, interactive: bool) -> None:
        self.asked, self.conversations, self.as_json, self.interactive = asked, conversations, as_json, interactive
        self.turn = 0
        self.own = {Path(asked.transcript)} if asked.transcript else set()  # files that hold this chat
        self.commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/system": self._system,
            "/retry": self._retry,
            "/set": self._set,
            "/save": self._save,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> int:
        if self.interactive:
            names = " and ".join(each.name for each in self.conversations)
            self._note(f"Talking to {names} ({self._settings()}). /help lists the commands, /exit ends.")
        failed = False
        for line in self._lines():
            if line.strip() in ("/exit", "/quit"):
                break
            try:
                self._take(line)
            except (ValueError, OSError, UsageError) as error:
                failed = True
                self._note(str(error), error=str(error))
        return int(failed and not self.interactive)

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            for number, line in enumerate(sys.stdin, start=1):
                if any("\udc80" <= letter <= "\udcff" for letter in line):
                    raise ValueError(f"line {number} of the input is not UTF-8: convert it first")
                yield line.rstrip("\n")
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # `input` then edits lines and remembers them
        with contextlib.suppress(EOFError):
            while True:
                yield input(f"\n{self.asked.user}> ")

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("//"):
            self._answer(line[1:])
        elif line.startswith("/"):
            word, _, rest = line.strip().partition(" ")
            if word not in self.commands:
                raise ValueError(
                    f"there is no command {word}{nearest(word, [*self.commands, '/exit'])} /help lists them."
                )
            self.commands[word](rest.strip())
        else:
            self._answer(line)

    # --- commands -------------------------------------------------------------------------------------------------

    def _clear(self, rest: str) -> None:
        for each in self.conversations:
            each.begin(each.system_prompt)
        self._note("A new conversation begins.")

    def _system(self, text: str) -> None:
        for each in self.conversations:
            each.begin(text or None)
        self._note(f"A new conversation begins, with {'this' if text else 'no'} system prompt.")

    def _retry(self, rest: str) -> None:
        questions = [each.take_back() for each in self.conversations]
        if questions[0] is None:
            raise ValueError("/retry: there is no answer to a message yet")
        self._answer(questions[0])

    def _set(self, rest: str) -> None:
        name, equals, value = (part.strip() for part in rest.partition("="))
        if not equals or name not in SETTABLE:
            raise ValueError(f"/set takes NAME=VALUE, with one of {', '.join(SETTABLE)}; now {self._settings()}")
        limit = LIMITS[name]
        try:
            number: float = int(value) if limit.whole else float(value)
        except ValueError:
            raise ValueError(f"/set {name}: {value!r} is not a number") from None
        if not limit.holds(number) and not (name == "temperature" and number == 0):
            raise ValueError(f"/set {name}={value}: give {limit.wanted()}")
        for each in self.conversations:
            each.sampling = dataclasses.replace(each.sampling, **{name: number})
        self._note(self._settings())

    def _save(self, rest: str) -> None:
        from trl.rollout.chat import save_transcript, transcript_path

        word, _, name = rest.partition(" ")
        replace = word == "--overwrite"
        name = name.strip() if replace else rest
        if replace and not name:
            raise ValueError("/save --overwrite needs the name of a file")
        new = ""
        if name:
            path = Path(name).expanduser()
            _check_transcript(name, replace or path in self.own, "/save --overwrite FILE")
        else:
            path = transcript_path(self.asked.save_folder, self.conversations[0].name)
            new = "" if path.parent.is_dir() else f", in the new folder {path.parent}"
            check_folder(str(path.parent))
        save_transcript(self.conversations, path)
        self.own.add(path)
        self._note(f"saved in {path}{new}", saved=str(path))

    def _settings(self) -> str:
        sampling = self.conversations[0].sampling
        return ", ".join(f"{name}={getattr(sampling, name)}" for name in SETTABLE)

    # --- answers --------------------------------------------------------------------------------------------------

    def _answer(self, question: str) -> None:
        from trl.rollout.chat import save_transcript

        self.turn += 1
        try:
            if self.interactive and len(self.conversations) > 1 and not self.as_json:
                _side_by_side(self.conversations, question)
            else:
                for each in self.conversations:
                    self._answer_of(each, question)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print("\n(stopped)", flush=True)
        finally:
            if self.asked.transcript:
                save_transcript(self.conversations, Path(self.asked.transcript))

    def _answer_of(self, conversation: Any, question: str) -> None:
        streams, answer = not self.as_json, ""
        if streams and len(self.conversations) > 1:
            print(f"[{conversation.name}]", flush=True)
        with contextlib.closing(conversation.ask(question)) as parts:
            for piece in parts:
                answer += piece
                if streams:
                    print(piece, end="", flush=True)
        facts = {
            "turn": self.turn,
            "model": conversation.name,
            "prompt": question,
            "answer": answer,
            "tokens": conversation.tokens,
            "finish": "stop" if conversation.complete else "length",
        }
        print("" if streams else json.dumps(facts, ensure_ascii=False), flush=True)

    def _note(self, text: str, **facts: Any) -> None:
        """A sentence to the user; programs that read the answers get it on stderr, or as facts."""
        if self.as_json and facts:
            print(json.dumps(facts, ensure_ascii=False), flush=True)
        else:
            print(text, file=sys.stdout if self.interactive and not self.as_json else sys.stderr, flush=True)


def _side_by_side(conversations: list[Any], question: str) -> None:
    """The answers in columns, as they are written."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    answers = ["" for _ in conversations]

    def grid() -> Table:
        table = Table(*[each.name for each in conversations], expand=True)
        table.add_row(*map(Text, answers))
        return table

    with contextlib.ExitStack() as stack, Live(grid(), auto_refresh=False, vertical_overflow="visible") as live:
        writing = dict(enumerate(stack.enter_context(contextlib.closing(each.ask(question))) for each in conversations))
        while writing:
            for place, parts in list(writing.items()):
                piece = next(parts, None)
                if piece is None:
                    del writing[place]
                else:
                    answers[place] += piece
            live.update(grid(), refresh=True)
