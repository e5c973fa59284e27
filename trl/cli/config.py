"""`trl config`: a YAML file with every option of a method, and a check of one."""

from __future__ import annotations

import contextlib
import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl.cli import CommandParser, UsageError, check_file, hide_library_notes, nearest, train
from trl.cli.flags import Flag, Flags
from trl.methods import METHODS

DESCRIPTION = """Writes a YAML file with every option of a method, its help and its default, or checks such a file.
Lines without a leading `#` are set. `trl sft --config sft.yaml` reads the file."""
EXAMPLES = """examples:
  trl config sft > sft.yaml        write it
  trl config sft sft.yaml          check it: exit status 0, or 2 and a sentence for each mistake
  trl config grpo --output grpo.yaml"""
WIDTH = 110


def run(argv: Sequence[str], command: str) -> int:
    methods = [name for name, row in METHODS.items() if row.command]
    parser = CommandParser(f"trl {command}", DESCRIPTION, EXAMPLES)
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(methods)}")
    parser.add_argument("file", nargs="?", metavar="FILE.yaml", help="file to check; without it, one is written")
    parser.add_argument("--output", metavar="FILE.yaml", help="file to write; it must not exist yet [standard output]")
    parser.add_argument("--json", action="store_true", help="print the result of a check, or the options, as JSON")
    options = parser.parse_args(argv)
    if options.method not in methods:
        raise UsageError(f"there is no method {options.method}{nearest(options.method, methods)}")
    if options.file is not None and options.output is not None:
        raise UsageError(f"{options.file} is checked, so that nothing is written into --output: leave one of them out.")
    if options.output is not None:
        check_file(options.output)
    hide_library_notes()
    if options.file is not None:
        return _check(options.method, options.file, options.json)
    flags = train.training_parser(options.method).flags
    if options.json:
        found = [{"name": each.name, "help": each.help, "default": each.default} for each in flags.fields.values()]
        text = json.dumps(found, ensure_ascii=False, default=str)
    else:
        text = "\n".join(lines(options.method, flags))
    if options.output is None:
        print(text)
        return 0
    with open(options.output, "x", encoding="utf-8") as file:
        file.write(text + "\n")
    return 0


def lines(method: str, flags: Flags) -> Iterator[str]:
    """The YAML file of a method: every option, commented out, under its help."""
    yield f"# Options of `trl {method}`: trl {method} --config THIS_FILE"
    yield "# A line without a leading `#` is set; the command line overrides it. The values shown are the defaults."
    shown: set[str] = set()
    for title, options in train.COMMON.items():
        some = {name: options[name] for name in options if name in flags.fields}
        shown |= some.keys()
        yield from _group(title, [flags.fields[name] for name in some])
    others: dict[str, list[Flag]] = {}
    for flag in flags.fields.values():
        if flag.name not in shown:
            others.setdefault(flag.title, []).append(flag)
    for title, group in others.items():
        yield from _group(title, group)


def _group(title: str, flags: Sequence[Flag]) -> Iterator[str]:
    if not flags:
        return
    yield from ("", f"# --- {title} {'-' * max(0, WIDTH - len(title) - 7)}")
    for flag in flags:
        yield ""
        yield from textwrap.wrap(flag.help, WIDTH, initial_indent="## ", subsequent_indent="## ")
        yield f"# {flag.name}: {_yaml(flag.default)}"


def _yaml(value: Any) -> str:
    """A value on one line of YAML. JSON is YAML, but for numbers such as 1e-08."""
    return f"{value:.1e}" if isinstance(value, float) and "e" in repr(value) else json.dumps(value, ensure_ascii=False)


def _check(method: str, path: str, as_json: bool) -> int:
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}.")
    parser = train.training_parser(method)
    values: dict[str, Any] = {}
    notices: list[str] = []
    try:
        values, _, problems = parser.read_file(path)
    except UsageError as error:  # not a file of options at all
        problems = [str(error)]
    if not problems:
        problems, notices = _tried(parser, method, values)
        problems = [f"{path}: {problem}" for problem in problems]
    if as_json:
        print(json.dumps({"problems": problems, "notices": notices, "options": sorted(values)}, ensure_ascii=False))
    else:
        verdict = f"{path}: {_verdict(len(values), method)}"
        print("\n".join(problems or [*notices, verdict]))
    return 2 if problems else 0


def _verdict(number: int, method: str) -> str:
    if number < 2:
        return f"{number or 'no'} option of `trl {method}` is set{', and it is possible' * number}"
    return f"{number} options of `trl {method}`, all of them possible"


def _tried(parser: Any, method: str, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong with options, and what is to be said of them, as a training command would say it. What the command
    line usually adds, the model and the data, may be missing, or null as in a file with every line set."""
    from trl.options import check_trackers

    added = {"model_name_or_path": "model"} | ({} if values.get("datasets") else {"dataset_name": "data"})
    values = {name: value for name, value in values.items() if value is not None or name not in added}
    heard = io.StringIO()
    try:
        with contextlib.redirect_stdout(heard):
            train.check(added | values)
            *_, config = parser.instances(values, train.classes(method))
            check_trackers(config)
    except (UsageError, ValueError, ImportError) as error:
        return [str(error)], []
    return [], [line.removeprefix("trl: ") for line in heard.getvalue().splitlines() if line.startswith("trl: ")]
