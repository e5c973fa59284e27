"""Records what callers of upstream TRL 1.16 can name and read, for `test_api.py` to compare with.

Run it by path, so that `trl` is the installed one, with TRL 1.16.0 (and torch 2.13, transformers 5.23) on the CPU:

    python tests/compat/record_api.py

It writes api.json beside itself: the public `names` of modules, the `fields` of configs, the `parameters` of trainers
in their order, the `attributes` that an instance has beyond `transformers.Trainer`, and the keys of the `metrics` of a
step and of an evaluation. `record_older` adds the parameters of BCO and PRM, which that version no longer has:

    PYTHONPATH=<folder of TRL 1.12.0> python tests/compat/record_api.py older
"""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny

import trl

PLACE = Path(__file__).with_name("api.json")
HOMES = {
    **dict.fromkeys(("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation"), "trl"),
    "ORPO": "trl.experimental.orpo",
    "CPO": "trl.experimental.cpo",
    "GKD": "trl.experimental.gkd",
}
OLDER = {"BCO": "trl.experimental.bco", "PRM": "trl.experimental.prm"}
PAIRS = [
    {"prompt": "w5 w6", "chosen": " w7 w8 w9", "rejected": " w10"},
    {"prompt": "w11", "chosen": " w12", "rejected": " w13 w14"},
]
UNPAIRED = [
    {"prompt": "w5 w6", "completion": " w7 w8 w9", "label": True},
    {"prompt": "w11", "completion": " w13 w14", "label": False},
]
ROWS = {
    "SFT": [{"text": "w5 w6 w7"}, {"text": "w8 w9"}],
    "KTO": UNPAIRED,
    "GKD": [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6 w7"}]}] * 2,
    **dict.fromkeys(("GRPO", "RLOO", "Distillation"), [{"prompt": "w5 w6"}, {"prompt": "w11"}]),
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
FURTHER = {
    "GRPO": {**ONLINE, "entropy_coef": 0.01, "use_adaptive_entropy": True},
    "RLOO": ONLINE,
    "Distillation": {"max_completion_length": 4},
    "GKD": {"max_new_tokens": 4, "max_length": 32},
}


def length(completions, **kwargs):
    return [float(len(each)) for each in completions]


def names():
    """Of each module the names that it offers: those that it lists, or those that are made in it."""
    found = {}
    for _, path, _ in pkgutil.walk_packages(trl.__path__, "trl."):
        if path.startswith(("trl.cli", "trl.kernels")) or any(part.startswith("_") for part in path.split(".")):
            continue
        try:
            module = importlib.import_module(path)
        except Exception as error:  # what needs a package that is not there
            print(f"{path}: {type(error).__name__}")
            found[path] = []
            continue
        listed = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", None) == path
        ]
        found[path] = sorted(
            name for name in listed if not name.startswith("_") and not inspect.ismodule(getattr(module, name, None))
        )
    found["trl"] = sorted(name for name in trl.__all__ if not inspect.ismodule(getattr(trl, name, None)))
    return dict(sorted(found.items()))


def parameters(trainer):
    return list(inspect.signature(trainer.__init__).parameters)[1:]


def built(method, folder):
    home = importlib.import_module(HOMES[method])
    config = getattr(home, f"{method}Config")(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        **FURTHER.get(method, {}),
    )
    rows = Dataset.from_list(ROWS.get(method, PAIRS))
    more = {"ref_model": tiny.reference()} if method in ("DPO", "KTO") else {}
    if method in ("GRPO", "RLOO"):
        more = {"reward_funcs": length}
    if method in ("Distillation", "GKD"):
        more = {"teacher_model": tiny.reference()}
    model = tiny.scorer() if method == "Reward" else tiny.policy()
    if method in ("GRPO", "RLOO"):  # whose reference is loaded by the model's name
        model.save_pretrained(f"{folder}/model")
        model = f"{folder}/model"
    tokenizer = tiny.tokenizer()
    if method == "GKD":
        tokenizer.chat_template = TEMPLATE
    return getattr(home, f"{method}Trainer")(
        model=model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **more
    )


def attributes(trainer):
    plain = {*dir(Trainer), *inspect.signature(Trainer.__init__).parameters, *vars(plain_trainer())}
    return sorted(name for name in {*vars(trainer), *dir(type(trainer))} - plain if not name.startswith("_"))


def plain_trainer():
    from transformers import TrainingArguments

    return Trainer(tiny.policy(), TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True))


def metrics(trainer):
    trainer.train()
    step, evaluation = trainer.state.log_history[:2]
    return {"train": sorted(step), "eval": sorted(evaluation)}


def record():
    table = {
        "version": trl.__version__,
        "names": names(),
        "fields": {},
        "parameters": {},
        "attributes": {},
        "metrics": {},
    }
    for name in ("ModelConfig", "ScriptArguments", "DatasetMixtureConfig"):
        table["fields"][name] = [each.name for each in dataclasses.fields(getattr(trl, name))]
    for method, home in HOMES.items():
        module = importlib.import_module(home)
        config = getattr(module, f"{method}Config")
        table["fields"][f"{method}Config"] = [each.name for each in dataclasses.fields(config)]
        table["parameters"][f"{method}Trainer"] = parameters(getattr(module, f"{method}Trainer"))
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = built(method, folder)
            table["attributes"][f"{method}Trainer"] = attributes(trainer)
            table["metrics"][f"{method}Trainer"] = metrics(trainer)
    return table


def record_older():
    table = json.loads(PLACE.read_text(encoding="utf-8"))
    for method, home in OLDER.items():
        table["parameters"][f"{method}Trainer"] = parameters(getattr(importlib.import_module(home), f"{method}Trainer"))
    return table


if __name__ == "__main__":
    made = record_older() if sys.argv[1:] == ["older"] else record()
    PLACE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
