"""Records what TRL 1.16 makes of fixed completions: loss, gradients and metrics of GRPO and RLOO, and advantages.

Run it by path, so that `trl` is the installed one, with TRL 1.16.0 (and torch 2.13, transformers 5.23) on the CPU:

    python tests/parity/record_online.py

It writes grpo.json and rloo.json beside itself. Each holds the `rows` that were trained on, `cases` as in `record.py`,
and `advantages` of tables of rewards. A case says by `old` what the policy was when the completions were drawn: "own",
the policy itself, or "rows", the log-probs that the rows have; and by `corrected` whether weights made up for another
sampler, whose log-probs the rows have too.
"""

import json
import math
import tempfile
import warnings
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from record import number, result

import trl
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

HERE = Path(__file__).parent
KINDS = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig),
    "GMPO": (GMPOTrainer, GMPOConfig),
}
GROUP = 3  # completions of a prompt
LONGEST = 8
GRADIENTS = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")

# Completions of 1 to 6 tokens under prompts of 2 and 5.
PROMPTS = [[1, 5], [1, 15, 16, 17, 9]]
COMPLETIONS = [[4, 7, 11, 3, 2], [8], [10, 12, 2], [19, 20, 21, 22, 6, 2], [13, 14], [23, 8, 17, 2]]
ADVANTAGES = [1.2, -0.7, 0.0, -1.1, 0.9, 0.4]
# What the policy has since moved away from its completions, in the mean: towards the second, away from the fourth.
DRIFT = [-0.15, -0.4, 0.0, 0.2, 0.1, -0.05]

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# Bounds between the weights of the tokens, and of the sequences.
BOUNDS = {
    "token": {"vllm_importance_sampling_clip_min": 0.9, "vllm_importance_sampling_clip_max": 1.3},
    "sequence": {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.6},
}
SHARE = {"top_entropy_quantile": 0.5}


def grpo_cases():
    """Settings of the config by name, with `old` and `corrected`."""
    cases = {}
    for loss in LOSSES:
        for level in LEVELS:
            # A sequence's ratio is nearer to one: the bounds are too.
            near = {"epsilon": 0.1} if level == "sequence" else {}
            near |= {"epsilon_high": 1.05} if loss == "cispo" else {}
            cases[f"{loss} {level}"] = {"loss_type": loss, "importance_sampling_level": level, **near}
    cases |= {f"on the policy {loss}": {"loss_type": loss, "old": "own"} for loss in ("dapo", "sapo", "vespo")}
    for level in LEVELS:
        for biased in (False, True):
            name = f"beta {level}" + (" biased" if biased else "")
            settings = {"beta": 0.1, "use_bias_correction_kl": not biased, "importance_sampling_level": level}
            cases[name] = {"loss_type": "grpo", **settings}
        cases[f"delta {level}"] = {"delta": 1.25, "epsilon": 0.1, "importance_sampling_level": level}
        cases[f"epsilon_high {level}"] = {"epsilon": 0.1, "epsilon_high": 0.28, "importance_sampling_level": level}
        cases[f"entropy quantile {level}"] = {"loss_type": "grpo", "importance_sampling_level": level, **SHARE}
        cases[f"off-policy mask {level}"] = {"off_policy_mask_threshold": 0.05, "importance_sampling_level": level}
    cases |= {
        "delta 1.5": {"delta": 1.5},
        "cispo default": {"loss_type": "cispo"},
        "beta luspo": {"loss_type": "luspo", "beta": 0.1, "importance_sampling_level": "sequence"},
        "beta vespo": {"loss_type": "vespo", "beta": 0.1},
        "entropy_coef": {"entropy_coef": 0.01},
        "entropy_coef grpo": {"loss_type": "grpo", "entropy_coef": 0.3},
        "entropy_coef quantile": {"loss_type": "bnpo", "entropy_coef": 0.3, **SHARE},
        "temperature": {"temperature": 0.7},
        "temperature entropy": {"loss_type": "grpo", "temperature": 0.7, "entropy_coef": 0.3, "beta": 0.1},
        "sapo temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0},
        "vespo rates": {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_lambda_neg": 0.7},
        "all at once": {
            "loss_type": "grpo", "beta": 0.1, "delta": 1.5, "epsilon_high": 0.28, "off_policy_mask_threshold": 0.05,
            "temperature": 0.7, "entropy_coef": 0.1, **SHARE,
        },
    }  # fmt: skip
    for old in ("own", "rows"):
        for mode in MODES:
            settings = {"vllm_importance_sampling_mode": mode, "old": old, "corrected": True}
            cases[f"corrected {mode} {old}"] = {"loss_type": "grpo", **BOUNDS[mode.split("_")[0]], **settings}
        for mode in MODES[:2]:  # upstream refuses the others
            settings = {"vllm_importance_sampling_mode": mode, "old": old, "corrected": True}
            # Where a token is masked its sequence weighs next to nothing.
            bound = {"vllm_importance_sampling_clip_max": 1.3}
            cases[f"corrected vespo {mode} {old}"] = {"loss_type": "vespo", **bound, **settings}
    cases["corrected all at once"] = {
        "loss_type": "grpo", "beta": 0.1, "off_policy_mask_threshold": 0.05, "old": "rows", "corrected": True,
        "importance_sampling_level": "sequence", **BOUNDS["token"], **SHARE,
        "vllm_importance_sampling_mode": "token_truncate",
    }  # fmt: skip
    return cases


# A loss type here, a trainer of its own there, which does not weigh the divergence.
GMPO = {
    "gmpo": {"epsilon": 0.2},
    "gmpo bounds": {"epsilon": 0.1, "epsilon_high": 0.3},
    "gmpo beta": {"epsilon": 0.2, "beta": 0.1, "use_bias_correction_kl": False},
}

RLOO = {
    "plain": {},
    "epsilon_high": {"epsilon": 0.1, "epsilon_high": 2.0},
    "on the policy": {"old": "own"},
    "temperature": {"temperature": 0.7},
}

NAN = math.nan
# Two functions judge twelve completions: groups with some rewards left out, without spread, and one left out by both.
REWARDS = [
    [1.0, 0.5], [0.0, NAN], [0.25, -1.0],
    [NAN, NAN], [2.0, 1.0], [-1.0, 0.0],
    [0.7, 0.3], [0.7, 0.3], [0.7, 0.3],
    [NAN, NAN], [NAN, NAN], [NAN, 3.0],
]  # fmt: skip
WEIGHTS = [1.0, 0.4]
KL = [0.3, -0.2, 0.9, 0.4, 0.1, -0.6, 0.0, 0.5, 1.1, 0.2, 0.7, -0.3]
GRPO_ADVANTAGES = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
}
RLOO_ADVANTAGES = {
    "plain": {"beta": 0.0},
    "normalised": {"beta": 0.0, "normalize_advantages": True},
    "kl": {"beta": 0.5},
    "kl normalised": {"beta": 0.5, "normalize_advantages": True},
    "clipped": {"beta": 0.5, "reward_clip_range": [-0.5, 1.0]},
}


def made(kind, settings, functions=1, rows=None):
    settings = {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": True, "bf16": False, "num_generations": GROUP,
        "gradient_checkpointing": False, "per_device_train_batch_size": len(rows or COMPLETIONS),
        "max_completion_length": LONGEST, **settings,
    }  # fmt: skip
    model = tiny.policy()
    if settings.get("beta"):
        # Upstream loads the reference by the policy's name; nothing here asks it.
        model.save_pretrained(settings["output_dir"])
        model.config._name_or_path = settings["output_dir"]
    trainer_class, config_class = KINDS[kind]
    trainer = trainer_class(
        model,
        [lambda completions, **_: [0.0] * len(completions) for _ in range(functions)],
        args=config_class(**settings),
        train_dataset=Dataset.from_list([{"prompt": "w5"}] * 4),
        processing_class=tiny.tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def right(rows, fill=0.0):
    width = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])


def left(rows):
    width = max(map(len, rows))
    return torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])


def inputs_of(rows):
    """What upstream's loss is given."""
    prompts, completions = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    return {
        "prompt_ids": left(prompts),
        "prompt_mask": (left(prompts) != tiny.PAD).long(),
        "completion_ids": right(completions, tiny.PAD),
        "completion_mask": right([[1] * len(each) for each in completions], 0),
        "advantages": torch.tensor([row["advantage"] for row in rows]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


def logps_of(trainer, model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]


def rows_of(trainer):
    """Completions whose log-probs under other policies are the policy's, moved by a little or by much."""
    rows = [
        {"prompt_ids": PROMPTS[index // GROUP], "completion_ids": ids, "advantage": ADVANTAGES[index]}
        for index, ids in enumerate(COMPLETIONS)
    ]
    logps = logps_of(trainer, trainer.model, inputs_of(rows))
    place = 0
    for index, row in enumerate(rows):
        own = logps[index, : len(row["completion_ids"])].double()
        step = torch.arange(place, place + len(own), dtype=torch.float64)
        place += len(own)
        moved = {
            "old_logps": own + DRIFT[index] + 0.45 * torch.sin(1.9 * step + 0.3),
            "ref_logps": own + 0.6 * torch.cos(0.8 * step),
            "sampler_logps": own + 0.3 * torch.sin(2.6 * step + 1.0),
        }
        row |= {name: [round(min(value, -0.001), 5) for value in values.tolist()] for name, values in moved.items()}
    return rows


def case(kind, rows, settings):
    settings = dict(settings)
    said = {"old": settings.pop("old", "rows"), "corrected": settings.pop("corrected", False)}
    settings = {"beta": 0.0, **settings}
    trainer = made(kind, settings)
    model, inputs = trainer.model, inputs_of(rows)
    old = right([row["old_logps"] for row in rows])
    own = logps_of(trainer, model, inputs)
    if kind == "RLOO":
        past = own if said["old"] == "own" else old
        inputs["old_logps"] = (past * inputs["completion_mask"]).sum(1)
    else:
        if said["corrected"]:
            inputs |= weighed(trainer, rows, own if said["old"] == "own" else old, inputs["advantages"])
        elif said["old"] == "rows":
            inputs["old_per_token_logps"] = old
        inputs["ref_per_token_logps"] = right([row["ref_logps"] for row in rows])
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    found = result(settings, model, loss, {name: values[-1] for name, values in trainer._metrics["train"].items()})
    found["gradients"] = {name: found["gradients"][name] for name in GRADIENTS}
    found["gradients"] = {name: [float(f"{x:.7g}") for x in each] for name, each in found["gradients"].items()}
    if kind == "GMPO":
        found["settings"]["loss_type"] = "gmpo"
    return {**said, **found}


def weighed(trainer, rows, old, advantages):
    """The inputs that upstream prepares when another sampler drew the completions."""
    own = trainer._get_per_token_logps_and_entropies
    trainer.use_vllm, trainer.beta, beta = True, 0.0, trainer.beta
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (old, None, None)
    output = prepared(trainer, rows, torch.zeros(len(rows), 1), [row["sampler_logps"] for row in rows])
    trainer._get_per_token_logps_and_entropies, trainer.beta = own, beta
    return {**output, "advantages": advantages}


def prepared(trainer, rows, rewards, sampled=None):
    """What upstream makes of completions and their rewards."""
    prompts, completions = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    texts = ["w5"] * len(rows)
    if isinstance(trainer, trl.RLOOTrainer):
        trainer._generate = lambda prompts_: (prompts, completions, texts)
    else:
        trainer._generate = lambda prompts_: (prompts, completions, None, texts, sampled, {}, None, None)
    trainer._calculate_rewards = lambda *args: rewards.clone()
    return trainer._generate_and_score_completions([{"prompt": "w5"}] * len(rows))


def advantages(kind, settings):
    """Of twelve completions of one token each, whose log-probs differ from the reference's by the divergence."""
    rows = [{"prompt_ids": [1, 5], "completion_ids": [4 + index]} for index in range(len(REWARDS))]
    trainer = made(kind, settings, len(WEIGHTS), rows)
    trainer.reward_weights = torch.tensor(WEIGHTS)
    answers = [torch.tensor(KL)[:, None], torch.zeros(len(KL), 1)]
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (answers.pop(0), None, None)
    output = prepared(trainer, rows, torch.tensor(REWARDS))
    return {"settings": settings, "advantages": [number(value) for value in output["advantages"]]}


def write(name, rows, cases, tables):
    content = {
        "trl": trl.__version__,
        "rows": rows,
        "cases": cases,
        "rewards": [[None if math.isnan(value) else value for value in row] for row in REWARDS],
        "weights": WEIGHTS,
        "kl": KL,
        "advantages": tables,
    }
    path = HERE / f"{name}.json"
    path.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False).replace('},"', '},\n"') + "\n")
    print(f"{path.name}: {len(cases)} cases, {len(tables)} tables, {path.stat().st_size:,} bytes")


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = rows_of(made("GRPO", {}))
    cases = {name: case("GRPO", rows, settings) for name, settings in grpo_cases().items()}
    cases |= {name: case("GMPO", rows, settings) for name, settings in GMPO.items()}
    write("grpo", rows, cases, {name: advantages("GRPO", each) for name, each in GRPO_ADVANTAGES.items()})
    cases = {name: case("RLOO", rows, settings) for name, settings in RLOO.items()}
    write("rloo", rows, cases, {name: advantages("RLOO", each) for name, each in RLOO_ADVANTAGES.items()})


if __name__ == "__main__":
    main()
