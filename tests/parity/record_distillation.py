"""Records what TRL makes of fixed batches under a fixed teacher: losses and gradients of GKD, Distillation and MiniLLM.

Run it by path, so that `trl` is the installed one, with TRL 1.16.0 (and torch 2.13, transformers 5.23) on the CPU. The
last releases that had the most likely tokens alone, and MiniLLM, are 1.3 and 1.12:

    python tests/parity/record_distillation.py
    PYTHONPATH=<folder of TRL 1.3.0> python tests/parity/record_distillation.py top_k
    PYTHONPATH=<folder of TRL 1.12.0> python tests/parity/record_distillation.py minillm

It writes distillation.json beside itself, with the `rows` and, by method, cases as in `record.py`. MiniLLM's
completions have equal lengths, because upstream's mean takes in their padding. Its rewards are held fixed, as in the
paper; upstream differentiates them.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from record import number, result

import trl

PLACE = Path(__file__).with_name("distillation.json")
PROMPTS = [[1, 5], [1, 15, 16, 17, 9]]
COMPLETIONS = [[4, 7, 11, 3], [8, 2, 6, 21], [10, 12, 22, 2], [19, 20, 21, 22]]
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]
UNEVEN = [(PROMPTS[0], [4, 7, 11, 3, 2]), (PROMPTS[1], [8]), (PROMPTS[0], [10, 12, 2])]

GKD = {f"beta {beta}": {"beta": beta} for beta in (0.0, 0.1, 0.5, 1.0)}
DISTILLATION = {
    **GKD,
    **{f"beta {beta} cold": {"beta": beta, "temperature": 0.7} for beta in (0.0, 0.5, 1.0)},
}
TOP_K = {
    f"top {k} of beta {beta}{'' if tail else ' alone'}": {"beta": beta, "loss_top_k": k, "loss_add_tail": tail}
    for beta in (0.0, 0.5, 1.0)
    for k in (1, 5)
    for tail in (True, False)
    if k > 1 or tail
}
MINILLM = {
    "default": {},
    "discounted": {"gamma": 0.9},
    "sums": {"gamma": 1.0, "length_normalization": False},
    "reward alone": {"single_step_decomposition": False},
    "divergence alone": {"rkl_advantage": False},
    "warm": {"kd_temperature": 2.0, "gamma": 0.5},
    "grpo": {"loss_type": "grpo"},
}


def arguments(kind, settings):
    return kind(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, **settings,
    )  # fmt: skip


def left(rows):
    width = max(map(len, rows))
    return torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])


def right(rows, fill):
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def labelled(pairs):
    """Rows of prompts and completions, padded on the right."""
    rows = [prompt + completion for prompt, completion in pairs]
    labels = [[-100] * len(prompt) + completion for prompt, completion in pairs]
    return {
        "input_ids": right(rows, tiny.PAD),
        "attention_mask": right([[1] * len(row) for row in rows], 0),
        "labels": right(labels, -100),
    }


def prompted(pairs):
    prompts, completions = [each[0] for each in pairs], [each[1] for each in pairs]
    return {
        "prompt_ids": left(prompts),
        "prompt_mask": left([[1] * len(each) for each in prompts]),
        "completion_ids": right(completions, tiny.PAD),
        "completion_mask": right([[1] * len(each) for each in completions], 0),
    }


def made(kind, config, settings, **more):
    row = {"prompt": "w5", "completion": " w6", "messages": [{"role": "user", "content": "w5"}]}
    trainer = kind(
        model=tiny.policy(),
        teacher_model=tiny.reference(),
        args=arguments(config, settings),
        train_dataset=Dataset.from_list([row] * 4),
        processing_class=tiny.tokenizer(),
        **more,
    )
    trainer.model.train()
    return trainer


def gkd(settings):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    trainer = made(GKDTrainer, GKDConfig, settings)
    loss = trainer.compute_loss(trainer.model, labelled(UNEVEN))
    loss.backward()
    return result({"lmbda": 0.0, **settings}, trainer.model, loss, {})


def distillation(settings):
    trainer = made(trl.DistillationTrainer, trl.DistillationConfig, settings)
    loss, entropy, count = trainer._compute_loss(trainer.model, prompted(UNEVEN), None)
    loss.backward()
    return result(settings, trainer.model, loss, {"entropy": entropy / count})


def top_k(settings):
    from trl.experimental.distillation.distillation_trainer import DistillationTrainer

    model, teacher, batch = tiny.policy(), tiny.reference(), labelled(UNEVEN)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = teacher(**inputs).logits[:, :-1]
    loss = DistillationTrainer.generalized_jsd_loss(
        model(**inputs).logits[:, :-1], theirs, labels=batch["labels"][:, 1:], beta=settings["beta"],
        top_k=settings["loss_top_k"], add_tail=settings["loss_add_tail"],
    )  # fmt: skip
    loss.backward()
    return result(settings, model, loss, {})


def minillm(settings):
    from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer

    trainer = made(MiniLLMTrainer, MiniLLMConfig, {"num_generations": 2, "max_completion_length": 4, **settings})
    trainer.current_gradient_accumulation_steps = 1
    advantage = trainer._compute_advantage
    trainer._compute_advantage = lambda *args, **kwargs: advantage(*args, **kwargs).detach()
    pairs = list(zip([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, COMPLETIONS, strict=True))
    inputs = {
        **prompted(pairs),
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": torch.tensor(sum(map(len, COMPLETIONS))),
    }
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return result(settings, trainer.model, loss, {})


def shortened(case):
    kept = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")
    case["gradients"] = {name: [number(f"{x:.7g}") for x in case["gradients"][name]] for name in kept}
    return case


def main(which):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    content = json.loads(PLACE.read_text()) if PLACE.exists() else {}
    if which == "top_k":
        content["top_k"] = {name: shortened(top_k(settings)) for name, settings in TOP_K.items()}
    elif which == "minillm":
        content["minillm"] = {name: shortened(minillm(settings)) for name, settings in MINILLM.items()}
        content["minillm_rows"] = [PROMPTS, COMPLETIONS, ADVANTAGES]
    else:
        content["rows"] = UNEVEN
        content["gkd"] = {name: shortened(gkd(settings)) for name, settings in GKD.items()}
        content["distillation"] = {name: shortened(distillation(settings)) for name, settings in DISTILLATION.items()}
    PLACE.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False).replace('},"', '},\n"') + "\n")
    print({name: len(each) for name, each in content.items()}, f"{PLACE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
