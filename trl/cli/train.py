"""The training commands: parse options, load data, make the trainer, train, save. One body for all methods."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl.cli import UsageError, auto, check_folder, hide_library_notes, launch
from trl.cli.flags import Flags, remembered
from trl.cli.parser import Parser, set_environment
from trl.data.reading.names import check_path
from trl.methods import METHODS
from trl.models.names import check_model
from trl.notices import LogLines, log_lines_as_notices
from trl.options import LIMITS, check_trackers

# The options that `--help` shows, by group. A sentence here replaces the field's own help.
COMMON = {
    "Model": {
        "model_name_or_path": "",
        "dtype": "",
        "load_in_4bit": "",
        "teacher_model_name_or_path": "Teacher: a folder or a name.",
    },
    "Data": {
        "dataset_name": "",
        "datasets": "Several data sets trained on as one: files, names or JSON.",
        "dataset_train_split": "",
        "dataset_text_field": "",
        "max_length": "",
        "packing": "",
        "assistant_only_loss": "",
        "max_prompt_length": "",
        "max_completion_length": "",
        "step_separator": "",
    },
    "Loss": {
        "loss_type": "",
        "loss_weights": "",
        "beta": "",
        "alpha": "",
        "mixture_coef": "",
        "lmbda": "",
        "loss_top_k": "Compare the k most likely tokens alone; 0: all. [0]",
        "cpo_alpha": "",
        "simpo_gamma": "",
        "desirable_weight": "",
        "undesirable_weight": "",
        "center_rewards_coefficient": "",
        "precompute_ref_log_probs": "Compute the reference's log-probs once, before step 1.",
    },
    "Completions": {
        "reward_funcs": "",
        "reward_model_name_or_path": "",
        "judge": "",
        "num_generations": "",
        "max_new_tokens": "",
        "temperature": "",
        "num_iterations": "",
        "log_completions": "",
    },
    "Adapter": {
        "use_peft": "Train a LoRA adapter instead of all weights.",
        "lora_r": "",
        "lora_alpha": "Scale of the adapter. [32]",
        "lora_target_modules": "",
    },
    "Training": {
        "learning_rate": "",
        "num_train_epochs": "Number of epochs. [3.0]",
        "max_steps": "Number of optimizer steps; overrides the epochs. [-1: not set]",
        "per_device_train_batch_size": "Batch size per device. [8]",
        "gradient_accumulation_steps": "Batches per optimizer step. [1]",
        "warmup_steps": "Warmup steps of the learning rate; below 1, a share of all steps. [0]",
        "bf16": "",
        "auto": "Set the size of micro-batches so that the run fits the device.",
        "eval_strategy": "When to evaluate on `dataset_test_split`. [no]",
        "seed": "Random seed of row order, adapter and dropout. [42]",
    },
    "Saving": {
        "output_dir": "Folder of checkpoints and result. [trainer_output]",
        "save_steps": "Steps between checkpoints; below 1, a share of all steps. [500]",
        "logging_steps": "",
        "report_to": "Trackers of the log: wandb, tensorboard, ... [none]",
        "resume_from_checkpoint": "Checkpoint to resume from; without a value, the newest in output_dir.",
    },
}
STREAMING = ("dataset_streaming", "streaming")  # two names of one option: of the data, and of a mix of data sets
NOTES = (
    "Several processes: --num_processes N, --accelerate_config FILE or a preset "
    f"({', '.join(launch.PRESETS)}), and all other options of `accelerate launch`.",
    "A YAML file may also hold `env:` (environment variables). Each of `datasets` is a file, a name, "
    "or a mapping with path, name, split, columns, fraction.",
)


def run(argv: Sequence[str], command: str) -> int:
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":  # only the first process prints
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _run(argv, command, stack.enter_context(log_lines_as_notices()))


def _run(argv: Sequence[str], command: str, notices: LogLines) -> int:
    set_environment(argv)
    hide_library_notes("--verbose" in argv)

    method = METHODS[command]
    parser = training_parser(command)
    values, elsewhere, own = parser.read_apart(argv)
    check(values)
    check_folder(str(values.get("output_dir") or "trainer_output"))
    check_model(values["model_name_or_path"], values.get("model_revision"))
    if values.get("dataset_name"):
        check_path(values["dataset_name"])
    if elsewhere and not launch.launched():
        return launch.relaunch(command, own, elsewhere, values)

    import trl

    trainer_class = getattr(trl, f"{method.name}Trainer")
    script, own_choice, mixture, model, config = parser.instances(values, classes(command))
    if own_choice.gpu_memory is not None and not own_choice.auto:
        raise UsageError("--gpu_memory is what --auto fills: add --auto, or leave it out.")
    if own_choice.auto:
        options, sentence = auto.chosen(command, own_choice, script, model, config)
        *_, config = parser.instances({**values, **options}, classes(command))
        print(f"trl: {sentence}", flush=True)
    script.dataset_streaming = mixture.streaming = script.dataset_streaming or mixture.streaming
    try:
        check_trackers(config)
    except ValueError as error:
        raise UsageError(f"--{error}.") from None

    from trl import checkpoint
    from trl.models.adapters import check_resumed, lora_config
    from trl.models.load import adapter_base, loading_arguments, quantization_config

    if "lora_task_type" not in values:
        # The adapter of a scoring model includes the scoring head.
        model.lora_task_type = getattr(trainer_class, "task_type", model.lora_task_type)
    resume = _resume(config.resume_from_checkpoint)
    adapter = lora_config(model)
    if resume and (adapter is not None or adapter_base(model.model_name_or_path) is None):
        check_resumed(checkpoint.resolve(Path(config.output_dir), resume)[0], adapter)
    config.model_init_kwargs = loading_arguments(model) | (config.model_init_kwargs or {})
    judges = {"reward_funcs": reward_functions(script, config)} if method.judged else {}
    train_rows, test_rows = rows(script, mixture, config, notices)
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=config,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        quantization_config=quantization_config(model),
        peft_config=adapter,
        **judges,
    )
    trainer.progress.tells_commands = False  # `closing` does, once the model is saved
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(launch.how_to_go_on(config.output_dir)) from None
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.process_index == 0:
        pad = trainer.processing_class.pad_token_id
        print(closing(command, method, trainer.args.output_dir, script, pad), flush=True)
    return 0


def classes(command: str) -> list[type]:
    """The dataclasses whose fields are the options of a training command."""
    import trl
    from trl.config import RewardArguments
    from trl.data.mixture import DatasetMixtureConfig

    method = METHODS[command]
    script = RewardArguments if method.judged else trl.ScriptArguments
    return [script, auto.AutoArguments, DatasetMixtureConfig, trl.ModelConfig, getattr(trl, f"{method.name}Config")]


def training_parser(command: str, *beside: str) -> Parser:
    """The parser of a training command. Its options come from the cache, without the classes, if they are there.
    `beside` are commands that take these options beside their own."""
    method = METHODS[command]
    flags = remembered(command, lambda: Flags.of(classes(command), launch.options()))
    return Parser(
        flags=flags,
        prog=f"trl {command}",
        description=f"{method.title[0].upper()}{method.title[1:]}: trains on {method.summary}.",
        common=COMMON,
        notes=NOTES,
        foreign=lambda: flags.foreign,
        limits=LIMITS,
        programs=(*beside, f"trl {command}"),
    )


def check(values: Mapping[str, Any]) -> None:
    """Raise UsageError for missing and conflicting options, before anything is started or loaded."""
    values = {name: value for name, value in values.items() if value is not None}
    if not values.get("model_name_or_path"):
        raise UsageError("--model_name_or_path is missing: the model to train, a folder or a model's name.")
    mixes = bool(values.get("datasets"))
    if mixes and values.get("dataset_name"):
        raise UsageError("--dataset_name and --datasets are both given: keep one; datasets is a list of several.")
    if not mixes and not values.get("dataset_name"):
        raise UsageError("--dataset_name is missing: the rows to train on, a file, a folder or a dataset's name.")
    for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        if mixes and name in values:
            raise UsageError(
                f"--{name} belongs to --dataset_name: in --datasets each entry names its own, as in "
                '\'{"path": "a", "name": "...", "split": "..."}\', and --test_split_size sets rows aside.'
            )
    streams = {values[name] for name in STREAMING if name in values}
    if len(streams) == 2:
        raise UsageError(
            "--dataset_streaming and --streaming mean the same, and one is true, the other false: keep one."
        )
    if True in streams and values.get("max_steps", -1) <= 0:
        raise UsageError(
            "--max_steps is missing: the number of rows in a stream is unknown, so --max_steps must set the end."
        )
    model, output = str(values["model_name_or_path"]), str(values.get("output_dir", "trainer_output"))
    if os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(output):
        raise UsageError(
            f"--output_dir is the folder of the model itself, {model}, which would be overwritten: name another "
            "--output_dir."
        )
    if values.get("test_split_size") is not None and values.get("dataset_test_split"):
        raise UsageError(
            "--test_split_size and --dataset_test_split both say which rows to evaluate on: keep one. "
            "--test_split_size draws them from the split that is trained on."
        )


def reward_functions(script: Any, config: Any) -> list[Any] | None:
    """The reward functions by name, and the reward model; None where a judge or another model of the config decides.
    Raises UsageError for a name that does not exist."""
    from trl.rewards.named import check_names
    from trl.rewards.pairwise import check_judge

    found = list(script.reward_funcs or ())
    try:
        check_names(found)
        check_judge(getattr(config, "judge", None))
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    if script.reward_model_name_or_path:
        found.append(script.reward_model_name_or_path)
    if not found and any(getattr(config, name, None) for name in ("judge", "reward_model_path")):
        return None
    if not found:
        raise UsageError("--reward_funcs is missing: reward functions by name or as file.py:function.")
    return found


def rows(script: Any, mixture: Any, config: Any, notices: LogLines) -> tuple[Any, Any]:
    """The rows for training and for evaluation; None without evaluation. Raises UsageError if the evaluation rows are
    missing, or would be the training rows."""
    from trl.data.mixture import DatasetMixtureConfig, load_mixture
    from trl.data.reading.sources import load
    from trl.notices import notify_once

    evaluates = config.eval_strategy != "no" or config.do_eval
    if not evaluates and script.dataset_test_split != "test":
        notify_once(f"dataset_test_split={script.dataset_test_split!r} has no effect without eval_strategy")
    if not evaluates and mixture.test_split_size is not None:
        notify_once(
            f"test_split_size={mixture.test_split_size} sets rows aside that are not used without eval_strategy"
        )
    if mixture.datasets:
        if evaluates and mixture.test_split_size is None:
            raise UsageError("evaluation needs rows of its own: set some aside with --test_split_size 0.05.")
        parts = load_mixture(mixture, config.seed, config.skip_bad_rows)
        return parts["train"], parts["test"] if evaluates else None
    name, config_name, streams = script.dataset_name, script.dataset_config, script.dataset_streaming
    if mixture.test_split_size is not None:
        one = {"path": name, "name": config_name, "split": script.dataset_train_split}
        alone = DatasetMixtureConfig([one], streams, mixture.test_split_size)
        split = load_mixture(alone, config.seed, config.skip_bad_rows)
        train, test = (split[side].parts[0].rows for side in ("train", "test"))
        return train, test if evaluates else None
    opening = {"streaming": streams, "skip_bad_rows": config.skip_bad_rows}
    train = load(name, script.dataset_train_split, config_name, **opening)
    if not evaluates:
        return train, None
    # `load` notes that it takes the only split; here that is an error, so its notices are held back.
    notices.held = []
    test = load(name, script.dataset_test_split, config_name, **opening)
    heard, notices.held = notices.held, None
    wanted = script.dataset_test_split.split("[")[0]
    # A file has one split, which `load` reads under any name. For training that is intended; for evaluation it would be
    # the training rows.
    taken = str(test.split).split("[")[0]
    another = test.split is not None and taken != wanted and taken.startswith("train")
    for sentence in heard:
        if not another:
            print(f"trl: {sentence}", flush=True)
    if another or (not streams and test._fingerprint == train._fingerprint):
        aside = "Set some aside, drawn at random: --test_split_size 0.05"
        remedy = "Name one that it has: --dataset_test_split" if streams else aside
        raise UsageError(
            f"evaluation needs rows of its own, and {script.dataset_name} has no split `{wanted}`. {remedy}"
        )
    return train, test


def closing(command: str, method: Any, output_dir: str, script: Any, pad: int | None = None) -> str:
    """The last lines of a run: the folder of the result, how to open it, and the commands that take it up."""
    from trl.trainer.summary import next_commands

    head = method.head
    adapter = os.path.exists(os.path.join(output_dir, "adapter_config.json"))
    package, opener = ("peft", f"AutoPeftModelFor{head}") if adapter else ("transformers", f"AutoModelFor{head}")
    # An adapter's folder lacks the number of labels (transformers would guess two) and the padding token (a score is
    # read at the last token that is not padding).
    more = f", num_labels=1, pad_token_id={pad}" if adapter and head == "SequenceClassification" else ""
    again = f"trl {command} --model_name_or_path {output_dir} --dataset_name {script.dataset_name or '...'}"
    if getattr(script, "reward_funcs", None):
        again += f" --reward_funcs {shlex.join(script.reward_funcs)}"
    if getattr(script, "reward_model_name_or_path", None):
        again += f" --reward_model_name_or_path {script.reward_model_name_or_path}"
    again += " --output_dir ..."
    return "\n".join(
        [
            "",
            f"The trained {'adapter' if adapter else 'model'} is in {output_dir}",
            f'  open it:    from {package} import {opener}; model = {opener}.from_pretrained("{output_dir}"{more})',
            f"  train on:   {again}",
            "  go on:      the same command with a larger --max_steps or --num_train_epochs, and "
            "--resume_from_checkpoint",
            *(f"  {name + ':':<12}{line}" for name, line in next_commands(output_dir, method, adapter)),
        ]
    )


def _resume(value: str | bool | None) -> str | bool | None:
    """The value of `--resume_from_checkpoint`: True (the newest) if it is true or bare, None, or a path."""
    if isinstance(value, str) and value.lower() in ("true", "last"):
        return True
    return None if isinstance(value, str) and value.lower() in ("", "false", "none") else value
