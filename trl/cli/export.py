"""`trl export`: a model as safetensors or GGUF."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.cli import UsageError, check_file, check_folder, hide_library_notes, nearest
from trl.cli.flags import Flags, remembered
from trl.cli.parser import Parser
from trl.cli.reply import ReplyFields, WriteFields, check_given, check_models, reply
from trl.demo.stages import quiet

FLOATS = ("auto", "bfloat16", "float16", "float32")
SHORT = ("bf16", "fp16", "fp32")
KINDS = ("f32", "f16", "bf16", "q8_0")  # of GGUF


@dataclass
class ExportArguments(WriteFields):
    """What is exported, and where it is written."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model: a folder or a name. An adapter's folder is merged into its base."}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of an adapter that is merged into the model."}
    )
    output: str | None = field(
        default=None, metadata={"help": "A new folder (safetensors), or a new file that ends in .gguf."}
    )
    format: str | None = field(
        default=None,
        metadata={"help": "Format. Default: gguf if the output ends in .gguf.", "choices": ["safetensors", "gguf"]},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "auto: the checkpoint's; bfloat16, float16, float32; for GGUF also f32, f16, bf16, q8_0."},
    )
    pre: str | None = field(
        default=None,
        metadata={"help": "GGUF: llama.cpp's name of how the tokenizer cuts texts into words. Default: found."},
    )


def run(argv: Sequence[str], command: str) -> int:
    classes = [ExportArguments, ReplyFields]
    parser = Parser(
        flags=remembered(command, lambda: Flags.of(classes)),
        prog=f"trl {command}",
        description="Writes a model for other programs, opens what was written and compares its logits with those of "
        "the model. What is not right does not appear.",
        notes=(
            f"Example: trl {command} --model_name_or_path trainer_output --output model.gguf --dtype q8_0",
            "Exit status: 0 exported, 1 not exported, 2 a wrong command line, 130 interrupted; the last three leave "
            "nothing.",
        ),
    )
    values = parser.read(argv)
    check_given(
        values,
        {
            "model_name_or_path": "the model",
            "output": "a new folder, or a new file model.gguf",
        },
    )
    form = _checked_form(values)
    check_models(values)
    asked, how = parser.instances(values, classes)
    with reply(how.json) as answer:
        hide_library_notes()
        quiet()
        from trl.models.export import export_model

        found = export_model(
            asked.model_name_or_path,
            asked.output,
            format=form,
            dtype=asked.dtype,
            adapter=asked.adapter_name_or_path,
            pre=asked.pre,
            **asked.arguments(),
        )
        facts = dataclasses.asdict(found) | asked.pushed(found.path)
        answer(facts, "\n".join(_lines(facts)))
    return 0


def _checked_form(values: Mapping[str, Any]) -> str:
    """The format that is asked for. Raises UsageError for options that do not go with it, or an output in the way."""
    output, dtype = str(values["output"]), str(values.get("dtype") or "auto")
    form = values.get("format") or ("gguf" if output.endswith(".gguf") else "safetensors")
    known: tuple[str, ...] = FLOATS
    if form == "gguf":
        if values.get("push"):
            raise UsageError("--push uploads a folder, and a GGUF file is one file: hf upload REPOSITORY FILE.")
        if not output.endswith(".gguf"):
            raise UsageError(f"--output: a GGUF file is one file: give its name, such as {output}/model.gguf.")
        if re.fullmatch(r"i?q\w+", dtype.lower()) and dtype.lower() not in KINDS:
            raise UsageError(
                f"--dtype: {dtype} is not written here, only {', '.join(KINDS)}. Export f16 and let llama.cpp's "
                "llama-quantize make smaller types of it."
            )
        check_file(output)
        known = (*FLOATS, *KINDS)
    else:
        if values.get("pre"):
            raise UsageError("--pre belongs to GGUF: let --output end in .gguf, or leave it out.")
        check_folder(output, new=True)
    if dtype not in (*known, *SHORT):
        raise UsageError(f"--dtype: needs one of {', '.join(known)}, not `{dtype}`{nearest(dtype, known)}")
    return form


def _lines(facts: dict) -> list[str]:
    lines = [f"{facts['source']} is exported as {facts['format']} ({facts['dtype']})"]
    if facts["gap"] is not None:
        lines.append(
            f"  its adapter changes the logits by {facts['effect']:.1e} of their size; merged, they differ from the "
            f"adapter's by {facts['gap']:.1e}"
        )
    lines += [
        f"  rounding to {facts['dtype']} changes the logits by {facts['rounding']:.1e} of their size; opened again, "
        f"they differ by {facts['written']:.1e}",
        f"The exported model is {facts['path']}",
    ]
    return lines + ([f"  pushed to {facts['pushed']}"] if "pushed" in facts else [])
