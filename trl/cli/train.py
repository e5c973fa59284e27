"""The training commands: options, data, trainer, train, save. One body for all methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl.cli import UsageError, hide_library_notes
from trl.cli.parser import Parser


class Method(NamedTuple):
    config: str
    trainer: str
    summary: str


METHODS = {
    "sft": Method("SFTConfig", "SFTTrainer", "Supervised fine-tuning: trains a model to continue as the rows do."),
}


def run(argv: Sequence[str], command: str) -> int:
    import trl

    hide_library_notes()
    method = METHODS[command]
    config_class, trainer_class = getattr(trl, method.config), getattr(trl, method.trainer)
    parser = Parser(
        [trl.ScriptArguments, trl.ModelConfig, config_class], prog=f"trl {command}", description=method.summary
    )
    script, model, config = parser.parse(argv)
    if not model.model_name_or_path:
        raise UsageError("--model_name_or_path is missing: the model to train, a folder or a model's name.")
    if not script.dataset_name:
        raise UsageError("--dataset_name is missing: the rows to train on, a file, a folder or a dataset's name.")

    from trl.data.formats import load
    from trl.models.adapters import lora_config

    rows = load(script.dataset_name, script.dataset_train_split, script.dataset_config)
    config.model_init_kwargs = loading_arguments(model) | (config.model_init_kwargs or {})
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=config,
        train_dataset=rows,
        eval_dataset=evaluation_rows(script, config),
        peft_config=lora_config(model),
    )
    trainer.train(resume_from_checkpoint=_resume(config.resume_from_checkpoint))
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.process_index == 0:
        print(closing(command, trainer.args.output_dir, script.dataset_name), flush=True)
    return 0


def loading_arguments(model: Any) -> dict[str, Any]:
    """What `from_pretrained` is told of a `ModelConfig`; what has not been asked for is left to it."""
    arguments: dict[str, Any] = {"dtype": model.dtype}
    if model.model_revision != "main":
        arguments["revision"] = model.model_revision
    if model.attn_implementation is not None:
        arguments["attn_implementation"] = model.attn_implementation
    if model.trust_remote_code:
        arguments["trust_remote_code"] = True
    return arguments


def evaluation_rows(script: Any, config: Any) -> Any:
    """The rows of `dataset_test_split`, or None when nothing asks for evaluation."""
    from trl.data.formats import load

    if config.eval_strategy == "no" and not config.do_eval:
        return None
    rows = load(script.dataset_name, script.dataset_test_split, script.dataset_config)
    wanted = script.dataset_test_split.split("[")[0]
    # A file has one split, and `load` then reads that one, whatever the name. To train on, that is what was meant; to
    # evaluate on, it would be the training rows.
    if rows.split is not None and str(rows.split).split("[")[0] != wanted:
        raise UsageError(
            f"evaluation needs rows of its own, and {script.dataset_name} has no split `{wanted}`. Set some aside: "
            "--dataset_train_split 'train[5%:]' --dataset_test_split 'train[:5%]'"
        )
    return rows


def closing(command: str, output_dir: str, dataset_name: str) -> str:
    """Where the result is, and what can be done with it."""
    adapter = os.path.exists(os.path.join(output_dir, "adapter_config.json"))
    package, opener = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    again = f"trl {command} --model_name_or_path {output_dir} --dataset_name {dataset_name} --output_dir ..."
    return "\n".join(
        [
            "",
            f"The trained {'adapter' if adapter else 'model'} is in {output_dir}",
            f'  open it:    from {package} import {opener}; model = {opener}.from_pretrained("{output_dir}")',
            f"  train on:   {again}",
        ]
    )


def _resume(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint true` asks for the last checkpoint; anything else names one."""
    if isinstance(value, str) and value.lower() in ("true", "last"):
        return True
    return None if isinstance(value, str) and value.lower() in ("", "false", "none") else value
