"""A file of prompts to a file of completions: sampled in blocks, written as they come, resumed where they stopped."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.checkpoint import fingerprint, write_file
from trl.config import DataFields, SamplerFields
from trl.data.reading.messages import is_conversation
from trl.data.reading.sources import from_rows, load
from trl.data.tokenizing.prompts import PREPARED, Prompts, prepare_prompts
from trl.engine.probe import attach
from trl.notices import notify_once

from .answers import AnswerFields, open_model, window_of
from .continuous import ContinuousSampler
from .generate import InProcessSampler
from .types import Completion, Request

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
COMPLETIONS = 128  # of a block, by default: as many rows decode together
GIVEN = "given_"  # before the name of a column of the data that a column of the result replaces
# What does not change a completion.
_FREE = ("output_file", "batch_size", "overwrite", "device", "max_cache_tokens", "dataset_name")


@dataclass
class GenerateArguments(AnswerFields, SamplerFields, DataFields):
    """Options of completions for a file of prompts."""

    dataset_split: str = field(default="train", metadata={"help": "Split of the data set with the prompts."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts. Default: `prompt`, `messages`, `question`, `text`, ..."}
    )
    as_chat: bool = field(
        default=False, metadata={"help": "Give a prompt that is a text to the chat template, as the user's message."}
    )
    output_file: str = field(
        default="completions.jsonl", metadata={"help": "File of the completions: .jsonl, .json, .csv or .parquet."}
    )
    num_generations: int = field(default=1, metadata={"help": "Number of completions of each prompt."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Prompts that are sampled together, then written. Default: 128 completions."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an output file, and what an earlier run left."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if Path(self.output_file).suffix not in ENDINGS:
            raise ValueError(f"output_file={self.output_file!r} must end in one of {', '.join(ENDINGS)}")


@dataclass
class Generated:
    """What was written: the file, prompts, completions and their tokens, those that ended by themselves, the prompts
    taken over from an earlier run, and the seconds that sampling took."""

    path: str
    prompts: int
    completions: int
    tokens: int
    ended: int
    resumed: int
    seconds: float


def complete_file(settings: GenerateArguments, on_block: Callable[[int, int, float], None] | None = None) -> Generated:
    """Sample completions of all prompts of a data set and write them, one row each.

    A row has the prompt (`prompt`), the completion (`completion`; of a conversation a list with the assistant's
    message), the index of the prompt (`row`) and of the completion (`sample`), its tokens (`tokens`), how it ended
    (`finish`: stop or length), and the other columns of the data. Where the data have a column of such a name, theirs
    is called `given_...`.

    Blocks of prompts are appended to `NAME.part.jsonl` beside the output, which becomes the output at the end. Another
    call with the same options goes on from there. A sample is drawn by (seed, row, sample), whatever its block.
    `on_block(prompts done, prompts, tokens per second)` is called after each block. Raises ValueError with a remedy,
    also if the output exists.
    """
    if not settings.dataset_name:
        raise ValueError("dataset_name is missing: the prompts, a file, a folder or a data set's name")
    output = Path(settings.output_file)
    if output.exists() and not settings.overwrite:
        raise ValueError(f"{output} exists already: name another output_file, or set overwrite (--overwrite)")
    data = load(settings.dataset_name, settings.dataset_split, settings.dataset_config)
    names = getattr(data, "column_names", None) or ()
    if settings.prompt_column is None and {"instruction", "input"} <= {*names} and "prompt" not in names:
        raise ValueError(
            f"{settings.dataset_name} has a column `input` beside `instruction`, which would be left out: join "
            "them with `trl data convert FILE prompts.jsonl --to prompt`, or set --prompt_column instruction"
        )
    model, tokenizer = open_model(settings, adapter=settings.adapter_name_or_path)
    prompts = _prompts(settings, data, tokenizer)
    sampling = settings.sampling(model, tokenizer)
    sampler = _sampler(settings, sampling, model, tokenizer)
    part = _Part(settings, fingerprint(prompts))
    started, drawn, resumed = time.perf_counter(), 0, part.done
    size = settings.batch_size or -(-COMPLETIONS // settings.num_generations)
    window = window_of(model)
    try:
        while part.done < len(prompts):
            rows = [prompts[index] for index in range(part.done, min(part.done + size, len(prompts)))]
            requests = [_request(settings, row, window, sampling.max_new_tokens) for row in rows]
            found = sampler.generate(requests, sampling)
            part.append([
                _written(row, number, completion, tokenizer)
                for row, completions in zip(rows, found, strict=True)
                for number, completion in enumerate(completions)
            ], len(rows))  # fmt: skip
            drawn += sum(len(each.ids) for completions in found for each in completions)
            if on_block is not None:
                on_block(part.done, len(prompts), drawn / (time.perf_counter() - started))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{part.done} of {len(prompts)} prompts are in {part.path}; the same command goes on from there"
        ) from None
    rows = part.rows()
    part.publish(output, rows)
    ended = sum(row["finish"] == "stop" for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return Generated(
        str(output), len(prompts), len(rows), tokens, ended, resumed, round(time.perf_counter() - started, 3)
    )


def _prompts(settings: GenerateArguments, data: Any, tokenizer: Any) -> Any:
    """Prepared prompts; texts as a user's messages where that is asked for, and with the system prompt."""
    columns = {"prompt": settings.prompt_column} if settings.prompt_column else None
    recipe = Prompts(columns=columns)
    data = recipe.rename(data, data.column_names)
    column = recipe.detect(data).columns["prompt"]
    conversational = is_conversation(next(iter(data[:1][column]), None))
    if (settings.as_chat or settings.system_prompt) and column != "input_ids":
        chat = settings.as_chat or conversational
        if not chat:
            raise ValueError(
                "system_prompt belongs to conversations, and the prompts are texts: set as_chat (--as_chat)"
            )
        as_messages = _AsMessages(column, settings.system_prompt)
        data = data.map(as_messages, remove_columns=[column] if column != "prompt" else None)
    elif not conversational and column != "input_ids" and tokenizer.chat_template:
        notify_once("the prompts are texts and are continued as they are; --as_chat asks them as a user's messages")
    return prepare_prompts(
        data,
        tokenizer,
        name="prompts",
        max_prompt_length=settings.max_prompt_length,
        chat_template_kwargs=settings.chat_template_kwargs,
    )[0]


class _AsMessages:
    """A row with its prompt as messages."""

    def __init__(self, column: str, system: str | None) -> None:
        self.column, self.system = column, system

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        value = row[self.column]
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else list(value)
        if self.system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return {"prompt": messages}


def _sampler(settings: GenerateArguments, sampling: Any, model: Any, tokenizer: Any) -> Any:
    sampler: Any
    if settings.use_transformers_continuous_batching:
        attach(model)
        sampler = ContinuousSampler(
            settings.transformers_continuous_batching_config, max_cache_tokens=settings.max_cache_tokens
        )
        sampler.check(sampling)
    else:
        sampler = InProcessSampler(tokenizer, max_cache_tokens=settings.max_cache_tokens)
    sampler.sync(model, 0)
    return sampler


def _request(settings: GenerateArguments, row: Mapping[str, Any], window: int | None, longest: int) -> Request:
    length = len(row["prompt_ids"])
    room = None if window is None else window - length
    if room is not None and room < 1:
        raise ValueError(
            f"row {row['row']}: the prompt has {length:,} tokens, and the model's window {window:,}: max_prompt_length "
            "(--max_prompt_length) cuts prompts"
        )
    limit = room if room is not None and room < longest else None
    return Request(row["prompt_ids"], settings.num_generations, (settings.seed, row["row"]), limit=limit)


def _written(row: Mapping[str, Any], sample: int, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    conversational = is_conversation(row["prompt"])
    own = {
        "row": row["row"],
        "sample": sample,
        "prompt": row["prompt"],
        "completion": [{"role": "assistant", "content": text}] if conversational else text,
        "tokens": len(completion.ids),
        "finish": "stop" if completion.finished else "length",
    }
    # The prompt is not repeated under the name that its column has in the data.
    other = {name: value for name, value in row.items() if name not in PREPARED and value != row["prompt"]}
    return own | {GIVEN + name if name in own else name: value for name, value in other.items()}


class _Part:
    """The completions so far, in a file of rows, and beside it what they were drawn with."""

    def __init__(self, settings: GenerateArguments, prompts: str | None) -> None:
        output = Path(settings.output_file)
        self.path = output.with_name(f"{output.stem}.part.jsonl")
        self.facts = output.with_name(f".{output.stem}.part.json")
        self.per_prompt = settings.num_generations
        self.done = 0
        facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE}
        facts = json.loads(json.dumps({**facts, "prompts": prompts}, default=str))
        if self.path.exists() and self.facts.exists() and not settings.overwrite:
            self._take_over(json.loads(self.facts.read_text(encoding="utf-8")), facts)
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self.facts.write_text(json.dumps(facts), encoding="utf-8")

    def _take_over(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        other = [name for name in here if there.get(name) != here[name]]
        if other:
            values = f"{other[0]} is {there.get(other[0])!r} there and {here[other[0]]!r} here"
            raise ValueError(
                f"{self.path} holds completions of another run ({values}): repeat its options to go on, name another "
                "output_file, or set overwrite (--overwrite) to begin anew"
            )
        # A run that was killed may leave half a line, or a prompt with some of its completions.
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self.done = len(whole) // self.per_prompt
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, whole[: self.done * self.per_prompt])))

    def append(self, rows: list[dict[str, Any]], prompts: int) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done += prompts

    def rows(self) -> list[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def publish(self, output: Path, rows: list[dict[str, Any]]) -> None:
        if output.suffix == ".jsonl":
            os.replace(self.path, output)
        else:
            write_file(output, lambda target: _WRITERS[output.suffix](rows, target))
            self.path.unlink()
        self.facts.unlink()


def _to_json(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _to_csv(rows: list[dict[str, Any]], path: Path) -> None:
    plain = [
        {
            name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
            for name, value in row.items()
        }
        for row in rows
    ]
    from_rows(plain).to_csv(path, index=False)


def _to_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    from_rows(rows).to_parquet(path)


_WRITERS = {".json": _to_json, ".csv": _to_csv, ".parquet": _to_parquet}
