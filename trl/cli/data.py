"""`trl data`: a data set as a method would train on it, before it is trained on; `trl data convert`: other shapes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.cli import CommandParser, UsageError, check_file, hide_library_notes, nearest, notices_aside, numbers
from trl.data.reading.names import check_path
from trl.methods import METHODS
from trl.models.names import TOKENIZER, check_model
from trl.options import COUNT, NUMBER_OF

DESCRIPTION = """Shows what a training run would see of a data set: how its rows are read, their lengths, what the
limits cut, duplicates, and rows token by token with what is trained. Only the model's tokenizer is loaded."""
EXAMPLE = """examples:
  trl data rows.jsonl --model_name_or_path Qwen/Qwen3-0.6B
  trl data pairs.jsonl --model_name_or_path Qwen/Qwen3-0.6B --method dpo --max_length 1024 --rows 2
  trl data convert alpaca.json chats.jsonl --to messages"""
CONVERT = """Writes the rows of a data set in another shape, one JSON object a line. Any shape that a trainer reads
can be converted. Of pairs and labelled answers, messages, prompt-completion and prompt take the good ones."""
CONVERT_EXAMPLE = """examples:
  trl data convert alpaca.json chats.jsonl --to messages
  trl data convert pairs.jsonl labelled.jsonl --to unpaired
  trl data convert sheet.csv rows.jsonl --to prompt-completion --columns prompt=ask,completion=reply"""
TARGETS = ("messages", "prompt-completion", "prompt", "preference", "unpaired")


def run(argv: Sequence[str], command: str) -> int:
    if list(argv[:1]) == ["convert"]:
        options = _convert_parser(command).parse_args(argv[1:])
        with notices_aside(options.json):
            done, lines = _convert(options)
        print(json.dumps(done, ensure_ascii=False) if options.json else "\n".join(lines))
        return 0
    options = _parser(command).parse_args(argv)
    if options.method is not None and options.method not in METHODS:
        raise UsageError(f"--method: there is no method {options.method}{nearest(options.method, METHODS)}")
    check_path(options.file)
    check_model(options.model_name_or_path, needs=TOKENIZER)
    with notices_aside(options.json):
        found = _inspect(options)
    print(json.dumps(found.to_dict(), ensure_ascii=False) if options.json else "\n".join(found.lines()))
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = CommandParser(f"trl {command}", DESCRIPTION, EXAMPLE)
    parser.add_argument("file", metavar="FILE", help="data set: a file, a folder, or a name that `datasets` knows")
    parser.add_argument("--model_name_or_path", required=True, metavar="NAME", help="model whose tokenizer is used")
    parser.add_argument("--method", metavar="NAME", help="method to train with, such as dpo [by the columns]")
    parser.add_argument(
        "--rows", type=numbers(NUMBER_OF), default=5, metavar="N", help="rows to show token by token [5]"
    )
    parser.add_argument(
        "--max_length", type=numbers(COUNT), metavar="N", help="limit of a row in tokens [the model's window]"
    )
    for part in ("prompt", "completion"):
        parser.add_argument(
            f"--max_{part}_length", type=numbers(COUNT), metavar="N", help=f"limit of a {part} in tokens [none]"
        )
    parser.add_argument(
        "--truncation_mode", choices=("keep_start", "keep_end"), help="end of a longer row that is kept"
    )
    parser.add_argument("--assistant_only_loss", action="store_true", help="train only on the assistant's turns")
    parser.add_argument(
        "--no_completion_only_loss", action="store_false", dest="completion_only_loss", help="train on prompts too"
    )
    parser.add_argument("--dataset_text_field", metavar="NAME", help="column of the text or the messages [text]")
    parser.add_argument("--chat_template_path", metavar="PATH", help="chat template: a file, or a tokenizer's folder")
    _add_shared(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _convert_parser(command: str) -> argparse.ArgumentParser:
    parser = CommandParser(f"trl {command} convert", CONVERT, CONVERT_EXAMPLE)
    parser.add_argument("file", metavar="FILE", help="data set: a file, a folder, or a name that `datasets` knows")
    parser.add_argument("output", metavar="OUTPUT.jsonl", help="file to write; it must not exist yet")
    parser.add_argument("--to", required=True, choices=TARGETS, help="shape of the new rows")
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="further columns to copy")
    _add_shared(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="split, or a slice of one: train[:100] [train]"
    )
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a named data set")
    parser.add_argument("--columns", metavar="NAMES", help="which column is which part: prompt=ask,completion=reply")
    parser.add_argument(
        "--skip_bad_rows", action="store_true", help="leave out rows that cannot be read, and count them"
    )


def _inspect(options: argparse.Namespace) -> Any:
    hide_library_notes()
    import datasets

    from trl.config import columns_of
    from trl.data.inspection import inspect
    from trl.data.reading.sources import load
    from trl.models.load import load_tokenizer, positions
    from trl.models.vocabulary import set_chat_template

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(options.model_name_or_path)
    if options.chat_template_path:
        set_chat_template(tokenizer, options.chat_template_path)
    max_length = options.max_length
    if max_length is None:
        limits = (positions(options.model_name_or_path), getattr(tokenizer, "model_max_length", None))
        max_length = min((limit for limit in limits if limit and limit < 10**9), default=None)
    return inspect(
        load(options.file, options.split, options.dataset_config, skip_bad_rows=options.skip_bad_rows),
        tokenizer,
        options.method,
        rows=options.rows,
        max_length=max_length,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
        truncation_mode=options.truncation_mode,
        assistant_only_loss=options.assistant_only_loss,
        completion_only_loss=None if options.completion_only_loss else False,
        text_field=options.dataset_text_field,
        columns=columns_of(options.columns) if options.columns else None,
        skip_bad_rows=options.skip_bad_rows,
    )


def _convert(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What was done, for programs and for people."""
    output = Path(options.output)
    if output.suffix != ".jsonl":
        raise UsageError(f"{output} does not end in .jsonl: one JSON object a line is written.")
    check_file(options.output)
    check_path(options.file)
    hide_library_notes()
    import datasets

    from trl.config import columns_of
    from trl.data.reading.sources import load
    from trl.data.reshape import convert

    datasets.disable_progress_bars()
    columns = columns_of(options.columns) if options.columns else None
    rows = load(options.file, options.split, options.dataset_config, skip_bad_rows=options.skip_bad_rows)
    found = convert(rows, options.to, columns, options.keep, options.skip_bad_rows)
    # The file appears whole: an interrupted command leaves none.
    part = output.with_name(f"{output.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    done = {"output": str(output), "to": options.to, "rows_read": found.rows_read, "rows_written": len(found.rows)}
    done |= {"unreadable": found.unreadable, "unused": found.unused, "read_as": found.sentence}
    return done, [*found.lines(), f"{output} holds them"]
