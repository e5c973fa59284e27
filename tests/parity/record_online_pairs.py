"""Records what TRL makes of fixed pairs of completions with fixed rewards: losses, gradients and metrics.

Run it by path with TRL 1.12.0, the last release that has XPO and Nash-MD (and torch 2.13, transformers 5.23), on the
CPU. Online DPO of 1.16.0 gives the same numbers, which a second run with it confirms:

    python tests/parity/record_online_pairs.py

It writes online_pairs.json beside itself: the `rows`, each a prompt with two completions and their rewards, and of each
method its cases as in `record.py`. Every completion ends with the end token or fills the width, as upstream's cut at
the end token needs it.
"""

import json
import tempfile
import warnings
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from record import result
from record_online import GRADIENTS, left

import trl
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

HERE = Path(__file__).parent
WIDTH = 5
ROWS = [
    {"prompt_ids": [1, 5, 9], "completions": [[4, 7, 11, 3, 2], [8, 2]], "rewards": [0.7, 0.2]},
    {"prompt_ids": [1, 6], "completions": [[10, 12, 2], [13, 5, 14, 6, 9]], "rewards": [-0.1, 0.4]},
    {"prompt_ids": [1, 15, 16, 17, 18, 3], "completions": [[19, 20, 2], [21, 22, 4, 2]], "rewards": [1.0, 0.3]},
    {"prompt_ids": [1, 5, 9], "completions": [[23, 8, 17, 6, 12], [13, 19, 7, 2]], "rewards": [0.2, 0.9]},
]
PREFERENCE = {
    "sigmoid": {},
    "beta": {"beta": 0.5},
    "ipo": {"loss_type": "ipo", "beta": 0.3},
    "first of a list": {"beta": [0.4, 0.1]},
}
CASES = {
    "OnlineDPO": {**PREFERENCE, "missing_eos_penalty": {"missing_eos_penalty": 0.6}},
    "XPO": {**PREFERENCE, "alpha": {"alpha": 0.02}, "alpha ipo": {"alpha": 0.05, "loss_type": "ipo", "beta": 0.3}},
    "NashMD": {"plain": {}, "beta": {"beta": 0.7}, "mixture_coef": {"mixture_coef": [0.25, 0.5]}},
}
# Sums over positions that are padding in upstream's Online DPO; and log-probs of policy and reference added up in XPO.
ODD = {
    "OnlineDPO": ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"),
    "XPO": ("logps/chosen", "logps/rejected"),
    "NashMD": (),
}


def kinds():
    found = {"OnlineDPO": (OnlineDPOTrainer, OnlineDPOConfig)}
    try:
        from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
        from trl.experimental.xpo import XPOConfig, XPOTrainer
    except ImportError:
        return found
    return {**found, "XPO": (XPOTrainer, XPOConfig), "NashMD": (NashMDTrainer, NashMDConfig)}


def padded(which):
    """The first or second completions, and which of their positions are tokens."""
    rows = [row["completions"][which] for row in ROWS]
    ids = torch.tensor([row + [tiny.PAD] * (WIDTH - len(row)) for row in rows])
    return ids, (ids != tiny.PAD).long()


def case(kind, settings):
    trainer_class, config_class = kinds()[kind]
    trainer = trainer_class(
        model=tiny.policy(),
        ref_model=tiny.reference(),
        reward_funcs=lambda completions, **_: [row["rewards"][which] for which in (0, 1) for row in ROWS],
        args=config_class(
            output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=len(ROWS), max_new_tokens=WIDTH, max_length=64, **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w5"}] * len(ROWS)),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.state.epoch = 0
    trainer.create_optimizer()
    prompt_ids = left([row["prompt_ids"] for row in ROWS])
    prompt_mask = (prompt_ids != tiny.PAD).long()
    (first, first_mask), (second, second_mask) = padded(0), padded(1)
    if kind == "OnlineDPO":
        drawn = (
            *(prompt_ids.repeat(2, 1), prompt_mask.repeat(2, 1)),
            *(torch.cat([first, second]), torch.cat([first_mask, second_mask])),
        )
        # The later release gives images too.
        trainer._generate = lambda *args: drawn if len(kinds()) == len(CASES) else (*drawn, None)
    else:
        outputs = tuple(torch.cat([prompt_ids, ids], 1) for ids in (first, second))
        scores = tuple(torch.tensor([row["rewards"][which] for row in ROWS]) for which in (0, 1))
        trainer.tokenize_row, trainer.data_collator = (lambda row, *args: row), (lambda rows: rows)
        trainer._prepare_inputs = lambda rows: {"prompt_input_ids": prompt_ids, "prompt_attention_mask": prompt_mask}
        trainer._generate_completions = lambda *args: outputs
        trainer._compute_rewards = lambda *args: scores
    loss = trainer.training_step(trainer.model, {"prompt": ["w5"] * len(ROWS)})
    metrics = {name: values[-1] for name, values in trainer.stats.items() if values and name not in ODD[kind]}
    found = result(settings, trainer.model, loss, metrics)
    found["gradients"] = {name: found["gradients"][name] for name in GRADIENTS}
    return found


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    content = {"trl": trl.__version__, "rows": ROWS}
    content |= {kind: {name: case(kind, settings) for name, settings in CASES[kind].items()} for kind in kinds()}
    path = HERE / "online_pairs.json"
    if len(kinds()) < len(CASES):
        recorded = json.loads(path.read_text())["OnlineDPO"]
        for name, found in content["OnlineDPO"].items():
            assert abs(found["loss"] - recorded[name]["loss"]) < 1e-6, name
            for parameter, values in found["gradients"].items():
                pairs = zip(values, recorded[name]["gradients"][parameter], strict=True)
                assert all(abs(a - b) < 1e-6 for a, b in pairs), (name, parameter)
        print(f"Online DPO of TRL {trl.__version__} gives the recorded numbers")
        return
    path.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False).replace('},"', '},\n"') + "\n")
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
