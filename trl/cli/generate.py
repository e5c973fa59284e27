"""`trl generate`: completions for a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from trl.cli import check_file, hide_library_notes
from trl.cli.chat import ANSWER_LIMITS, ANSWERING
from trl.cli.flags import Flags, remembered
from trl.cli.parser import Parser
from trl.cli.reply import ReplyFields, check_given, check_models, reply
from trl.data.reading.names import check_path
from trl.demo.stages import quiet

COMMON = {
    **ANSWERING,
    "Prompts": dict.fromkeys(("dataset_name", "dataset_split", "prompt_column", "as_chat", "max_prompt_length"), ""),
    "Completions": dict.fromkeys(("output_file", "num_generations", "batch_size", "overwrite", "json"), ""),
}


def classes() -> list[type]:
    from trl.rollout.prompts_file import GenerateArguments

    return [GenerateArguments, ReplyFields]


def run(argv: Sequence[str], command: str) -> int:
    parser = Parser(
        flags=remembered(command, lambda: Flags.of(classes())),
        limits=ANSWER_LIMITS,
        prog=f"trl {command}",
        description="Samples completions of the prompts in a file (.jsonl, .json, .csv, .txt, ...) or a data set, and "
        "writes one row each.",
        common=COMMON,
        notes=(
            f"Example: trl {command} --model_name_or_path trainer_output --dataset_name prompts.jsonl "
            "--output_file completions.jsonl --num_generations 4 --temperature 0.8",
            "Completions are written as they come, into NAME.part.jsonl; the same command goes on from there. The same "
            "options and --seed give the same file.",
            "Exit status: 0 done, 1 an error, 2 a wrong command line, 130 interrupted.",
        ),
    )
    values = parser.read(argv)
    check_given(
        values,
        {
            "model_name_or_path": "the model that writes, a folder or a model's name",
            "dataset_name": "the prompts, a file, a folder or a data set's name",
        },
    )
    check_file(
        values.get("output_file") or parser.flags.fields["output_file"].default,
        replace=bool(values.get("overwrite")),
        remedy=", or replace it with --overwrite",
    )
    check_models(values)
    check_path(values["dataset_name"])
    hide_library_notes()
    quiet()
    from trl.rollout.prompts_file import complete_file

    asked, how = parser.instances(values, classes())
    with reply(how.json) as answer:
        found = complete_file(asked, _progress)
        text = (
            f"{found.completions:,} completions of {found.prompts:,} prompts ({found.tokens:,} tokens; {found.ended:,} "
            f"ended by themselves, {found.completions - found.ended:,} at --max_new_tokens) are in {found.path}"
        )
        if found.resumed:
            text += f"\n  {found.resumed:,} prompts were taken over from an earlier run"
        answer(dataclasses.asdict(found), text)
    return 0


def _progress(done: int, of: int, speed: float) -> None:
    print(f"{done:,} of {of:,} prompts, {speed:,.0f} tokens/s", flush=True)
