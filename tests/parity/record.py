"""Records losses, metrics and gradients of upstream's trainers, for the tests beside this file to compare with.

Run it by path, so that `trl` is the installed one, with TRL 1.16.0 (and torch 2.13, transformers 5.23) on the CPU:

    python tests/parity/record.py

It writes dpo.json, kto.json, orpo.json, cpo.json and reward.json beside itself. Each holds the `rows` that were trained
on and `cases`: the `settings` given to the config, and of all rows as one batch the `loss`, the `metrics` that were
logged and the `gradients` of a few weights; `exchanged` where policy and reference changed places. The rows reach
upstream's own collators as token ids: its preparation of text, which would add end tokens of its own, is passed by.

BCO and PRM are gone from that version: `record_older.py` records them.
"""

import json
import tempfile
from pathlib import Path

import tiny
import torch
from datasets import Dataset

import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).parent
DIGITS = 9
BETA = 0.3

DPO = {
    "sigmoid": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "exo_pair 1e-3": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"]},
    "robust smoothed": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "aot smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "aot_unpaired smoothed": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "discopop 0.5": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "alpha_divergence 0.8": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
    "ipo forward_kl": {"loss_type": ["ipo"], "f_divergence_type": "forward_kl"},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "aot mpo": {"loss_type": ["aot_unpaired", "aot", "sft"], "loss_weights": [0.5, 0.7, 0.3]},
    "ld": {"ld_alpha": 0.5},
    "ld ipo": {"ld_alpha": 0.5, "loss_type": ["ipo"]},
    "ld with sft": {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]},
    "wpo": {"use_weighting": True},
    "wpo of two": {"use_weighting": True, "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5]},
}
CLAMPED = "kto clamped"  # with policy and reference exchanged, so that the estimate is below zero
KTO = {
    "kto": {},
    CLAMPED: {},
    "kto weighted": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "apo_zero_unpaired weighted": {
        "loss_type": "apo_zero_unpaired",
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
    },
}
ORPO = {"orpo": {"beta": 0.1}, "orpo 0.5": {"beta": 0.5}}
CPO = {
    "sigmoid": {},
    "sigmoid alone": {"cpo_alpha": 0.0},
    "sigmoid smoothed": {"cpo_alpha": 0.0, "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
    "simpo smoothed": {"loss_type": "simpo", "cpo_alpha": 0.0, "label_smoothing": 0.1},
    "cpo-simpo": {"loss_type": "simpo", "cpo_alpha": 1.0, "simpo_gamma": 0.8},
    "simpo alpha": {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.1, "simpo_gamma": 0.3},
    "sigmoid alpha": {"alpha": 0.05},
}
REWARD = {"plain": {}, "margin": {}, "centred": {"center_rewards_coefficient": 0.01}}


def number(value):
    return float(f"{float(value):.{DIGITS}g}")


def result(settings, model, loss, metrics):
    """One case: `loss` has been through its backward pass."""
    parameters = dict(model.named_parameters())
    return {
        "settings": settings,
        "loss": number(loss),
        "metrics": {name: number(value) for name, value in metrics.items()},
        "gradients": {
            name: [number(value) for value in parameters[name].grad.flatten()]
            for name in tiny.NAMED
            if name in parameters
        },
    }


def arguments(kind, settings):
    return kind(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        **settings,
    )


def trained(trainer, model, settings, batch):
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    metrics = trainer._metrics["train"] if hasattr(trainer, "_metrics") else trainer._stored_metrics["train"]
    return result(settings, model, loss, {name: values[-1] for name, values in metrics.items()})


def some_text():
    """What a trainer needs to be made; it is not trained on."""
    return Dataset.from_list([{"prompt": "w5", "chosen": " w6", "rejected": " w7"}])


def dpo(settings):
    model = tiny.policy()
    settings = {"beta": BETA, **settings}
    trainer = trl.DPOTrainer(
        model,
        tiny.reference(),
        args=arguments(trl.DPOConfig, settings),
        train_dataset=some_text(),
        processing_class=tiny.tokenizer(),
    )
    return trained(trainer, model, settings, trainer.data_collator(tiny.PAIRS))


def kto(name, settings):
    model, reference = tiny.policy(), tiny.reference()
    if name == CLAMPED:
        model, reference = reference, model
    settings = {"beta": BETA, **settings}
    texts = [
        {"prompt": "w5", "completion": " w6", "label": True},
        {"prompt": "w7", "completion": " w8", "label": False},
    ]
    trainer = trl.KTOTrainer(
        model,
        reference,
        args=arguments(trl.KTOConfig, settings),
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny.tokenizer(),
    )
    rows = tiny.unpaired()
    for row in rows:
        other = row.pop("kl_completion_ids")
        if trainer.calculate_KL:
            row["KL_completion_ids"] = other
    case = trained(trainer, model, settings, trainer.data_collator(rows))
    return {**case, "exchanged": True} if name == CLAMPED else case


def without_reference(config, kind, settings):
    model = tiny.policy()
    settings = {"beta": BETA, **settings}
    trainer = kind(
        model, args=arguments(config, settings), train_dataset=some_text(), processing_class=tiny.tokenizer()
    )
    features = []
    for row in tiny.PAIRS:
        prompt = row["prompt_ids"]
        feature = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            completion = row[f"{side}_ids"]
            feature[f"{side}_input_ids"] = prompt + completion
            feature[f"{side}_attention_mask"] = [1] * len(prompt + completion)
            feature[f"{side}_labels"] = [-100] * len(prompt) + completion
        features.append(feature)
    return trained(trainer, model, settings, trainer.data_collator(features))


def reward(name, settings):
    model = tiny.scorer()
    trainer = trl.RewardTrainer(
        model,
        args=arguments(trl.RewardConfig, settings),
        train_dataset=some_text(),
        processing_class=tiny.tokenizer(),
    )
    rows = [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            **({"margin": margin} if name == "margin" else {}),
        }
        for row, margin in zip(tiny.PAIRS, tiny.MARGINS, strict=True)
    ]
    return trained(trainer, model, settings, trainer.data_collator(rows))


def write(name, rows, cases):
    content = {"trl": trl.__version__, "rows": rows, "cases": cases}
    path = HERE / f"{name}.json"
    # Some lines for each case, so that a change of one shows as that.
    path.write_text(json.dumps(content, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes")


def main():
    torch.set_num_threads(1)
    pairs = tiny.PAIRS
    write("dpo", pairs, {name: dpo(settings) for name, settings in DPO.items()})
    write("kto", tiny.unpaired(), {name: kto(name, settings) for name, settings in KTO.items()})
    write("orpo", pairs, {name: without_reference(ORPOConfig, ORPOTrainer, each) for name, each in ORPO.items()})
    write("cpo", pairs, {name: without_reference(CPOConfig, CPOTrainer, each) for name, each in CPO.items()})
    margins = [{**row, "margin": margin} for row, margin in zip(pairs, tiny.MARGINS, strict=True)]
    write("reward", margins, {name: reward(name, settings) for name, settings in REWARD.items()})


if __name__ == "__main__":
    main()
