"""`trl merge`: an adapter into its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from trl.cli import check_folder, hide_library_notes
from trl.cli.flags import Flags, remembered
from trl.cli.parser import Parser
from trl.cli.reply import ReplyFields, WriteFields, check_given, check_models, reply
from trl.demo.stages import quiet


@dataclass
class MergeArguments(WriteFields):
    """What is merged, and where it is written."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder of the adapter; with adapter_name_or_path, the base model that it is merged into."},
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the adapter, if model_name_or_path names the base model."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "New folder for the merged model."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the written weights; auto: the base checkpoint's.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    compute_dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype in which the models are compared. auto: the checkpoint's, in half the memory, less sharply.",
            "choices": ["float32", "auto"],
        },
    )


def run(argv: Sequence[str], command: str) -> int:
    classes = [MergeArguments, ReplyFields]
    parser = Parser(
        flags=remembered(command, lambda: Flags.of(classes)),
        prog=f"trl {command}",
        description="Merges an adapter into its base model, writes the result with its tokenizer, opens it again and "
        "compares its logits with those of the base with its adapter. A folder that is not right does not appear.",
        notes=(
            f"Example: trl {command} --model_name_or_path trainer_output --output_dir merged",
            "Exit status: 0 merged, 1 not merged, 2 a wrong command line, 130 interrupted; the last three leave no "
            "folder.",
        ),
    )
    values = parser.read(argv)
    check_given(
        values,
        {
            "model_name_or_path": "the adapter's folder",
            "output_dir": "a new folder for the result",
        },
    )
    check_folder(values["output_dir"], new=True)
    check_models(values)
    asked, how = parser.instances(values, classes)
    with reply(how.json) as answer:
        hide_library_notes()
        quiet()
        from trl.models.merging import merge_adapter

        adapter, base = asked.adapter_name_or_path or asked.model_name_or_path, None
        if asked.adapter_name_or_path:
            base = asked.model_name_or_path
        found = merge_adapter(
            adapter,
            asked.output_dir,
            base=base,
            dtype=asked.dtype,
            compute_dtype=asked.compute_dtype,
            **asked.arguments(),
        )
        facts = dataclasses.asdict(found) | asked.pushed(found.folder)
        answer(facts, "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict) -> list[str]:
    lines = [
        f"{facts['adapter']} is merged into {facts['base']} ({facts['dtype']})",
        f"  the adapter changes the logits by {facts['effect']:.1e} of their size; merged, they differ from the "
        f"adapter's by {facts['gap']:.1e}",
        f"  rounding to {facts['dtype']} changes them by {facts['rounding']:.1e}; opened again, they differ by "
        f"{facts['written']:.1e}",
        f"The merged model is in {facts['folder']}",
        f"  talk to it: trl chat --model_name_or_path {facts['folder']}",
    ]
    return lines + ([f"  pushed to {facts['pushed']}"] if "pushed" in facts else [])
