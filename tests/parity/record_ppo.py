"""Records what TRL's two PPO trainers make of fixed responses: statistics, gradients and weights of one step.

Run it by path, so that `trl` is the installed one, on the CPU: with TRL 0.11.4 (transformers 4.46), the last with
`step`, it writes ppo_steps.json; with TRL 1.12.0, the last with a trainer, ppo.json.

    python tests/parity/record_ppo.py

Each file holds `cases`: the `settings`, the `numbers` that were logged, and `gradients` of a few weights of the first
optimizer step (1.12) or the `weights` after all of them (0.11.4).
"""

import json
import tempfile
import warnings
from pathlib import Path

import tiny
import torch
from ppo_rows import ANSWERS, EVEN, KEPT, QUERIES, RATE, RESPONSES, SCORES, head_weights
from torch import nn

import trl

HERE = Path(__file__).parent

STEPS = {
    "kl": {},
    "abs": {"kl_penalty": "abs"},
    "mse": {"kl_penalty": "mse"},
    "full": {"kl_penalty": "full"},
    "discounted": {"gamma": 0.9, "lam": 0.7, "vf_coef": 0.5},
    "whitened": {"whiten_rewards": True},
    "bounded": {"score_clip": 0.8},  # use_score_scaling ends in an AttributeError there
    "clipped": {"cliprange": 0.01, "cliprange_value": 0.01, "ppo_epochs": 4},
    "fixed": {"adap_kl_ctrl": False, "init_kl_coef": 0.05},
}
STATS = (
    *("objective/kl", "objective/kl_coef", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores"),
    *("ppo/std_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/approxkl"),
    *("ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/policy/entropy", "ppo/val/vpred", "ppo/val/error"),
    *("ppo/val/clipfrac", "tokens/queries_len_mean", "tokens/responses_len_mean"),
)
# All responses are of one length: a score is otherwise put on the position after the last token.
TRAINER = {
    "k1": {},
    "k3": {"kl_estimator": "k3"},
    "discounted": {"gamma": 0.9, "lam": 0.7, "vf_coef": 0.5},
    "penalty": {"missing_eos_penalty": 1.0},
    "twice": {"num_ppo_epochs": 2, "cliprange": 0.01, "cliprange_value": 0.01},
}
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
         "num_sample_generations": 0, "logging_steps": 1}  # fmt: skip
LOGGED = (
    *("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores"),
    *("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"),
    *("policy/entropy_avg", "val/ratio", "val/num_eos_tokens"),
)


def numbers(tensor: torch.Tensor) -> list[float]:
    return [float(f"{value:.9g}") for value in tensor.detach().double().flatten().tolist()]


def of_a_step(settings):
    def valued(model):
        found = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)
        with torch.no_grad():
            found.v_head.summary.weight.copy_(head_weights())
            found.v_head.summary.bias.fill_(0.1)
        return found

    config = trl.PPOConfig(
        batch_size=4, mini_batch_size=4, **{"learning_rate": RATE, "seed": 0, "ppo_epochs": 2, **settings}
    )
    model = valued(tiny.policy())
    trainer = trl.PPOTrainer(config, model, valued(tiny.reference()), tiny.tokenizer())
    # Whitened rewards beyond the end of a response are not set back to 0 there: here no response ends before another.
    queries, responses = (EVEN, ANSWERS) if "whiten_rewards" in settings else (QUERIES, RESPONSES)
    stats = trainer.step(
        [torch.tensor(ids) for ids in queries],
        [torch.tensor(ids) for ids in responses],
        [torch.tensor(score) for score in SCORES],
    )
    weights = {name: each for name, each in model.pretrained_model.named_parameters() if name in KEPT}
    weights["v_head.summary.weight"] = model.v_head.summary.weight
    return {
        "settings": settings,
        "numbers": {name: float(stats[name]) for name in STATS},
        "next_kl_coef": float(trainer.kl_ctl.value),
        "weights": {name: numbers(each) for name, each in weights.items()},
    }


def of_the_trainer(settings):
    from datasets import Dataset

    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=4,
            total_episodes=4,
            response_length=4,
            temperature=1.0,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            **QUIET,
            **{"num_ppo_epochs": 1, **settings},
        )
        policy, critic, judge = tiny.policy(), tiny.scorer(), nn.Linear(1, 1)
        whole = torch.tensor([query + answer for query, answer in zip(EVEN, ANSWERS, strict=True)])
        theirs = ppo_trainer.get_reward

        def reward(model, ids, *rest):
            return (None, torch.tensor(SCORES), None) if model is judge else theirs(model, ids, *rest)

        def generation(model, *_):
            logits = policy(whole).logits[:, 2:-1].detach()
            return whole, logits

        ppo_trainer.get_reward, ppo_trainer.batch_generation = reward, generation
        trainer = PPOTrainer(
            args=config, processing_class=tiny.tokenizer(), model=policy, ref_model=tiny.reference(),
            reward_model=judge, value_model=critic, train_dataset=Dataset.from_dict({"input_ids": EVEN}),
        )  # fmt: skip
        trainer.dataloader = [{"input_ids": torch.tensor(EVEN)}]
        seen, logged = [], []
        step = trainer.optimizer.step

        def keep(*args, **kwargs):
            named = {**dict(policy.named_parameters()), "critic.score.weight": critic.score.weight}
            seen.append({name: named[name].grad.clone() for name in (*KEPT, "critic.score.weight")})
            return step(*args, **kwargs)

        trainer.optimizer.step = keep
        trainer.log = lambda metrics, *_: logged.append(metrics)
        trainer.train()
    return {
        "settings": settings,
        "numbers": {name: float(logged[0][name]) for name in LOGGED},
        "gradients": {name: numbers(each) for name, each in seen[0].items()},
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    old = trl.__version__.startswith("0.")
    record, cases = (of_a_step, STEPS) if old else (of_the_trainer, TRAINER)
    found = {"trl": trl.__version__, "cases": {name: record(settings) for name, settings in cases.items()}}
    target = HERE / ("ppo_steps.json" if old else "ppo.json")
    target.write_text(json.dumps(found, separators=(",", ":")) + "\n")
