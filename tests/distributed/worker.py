"""What each of two processes does in `test_two_processes.py`: worker.py MODE OUT MODEL."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

from tests.engine import families
from tests.trainer import test_online, test_overrides
from tests.trainer.helpers import (
    chat_rows,
    first_gradient,
    labelled_rows,
    pair_rows,
    preference,
    sft,
    tiny,
    tiny_scorer,
)
from trl.engine.score import attach, score
from trl.models.adapters import TWIN
from trl.models.shards import local_weights
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request, Sampling


def lora(dropout=0.0):
    import peft

    return peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)


def adapted(model):
    import peft

    torch.manual_seed(5)
    return peft.get_peft_model(model, lora())


def trainer(path, tokenizer, rows, adapter, checkpointing, **settings):
    model = tiny(tokenizer)
    return sft(
        path,
        adapted(model) if adapter else model,
        tokenizer,
        chat_rows(rows),
        gradient_checkpointing=checkpointing,
        max_steps=1,
        **settings,
    )


def ddp(out, tokenizer):
    for rows in (8, 7, 5):
        for adapter in (False, True):
            for checkpointing in (False, True):
                run = trainer(
                    out / "run", tokenizer, rows, adapter, checkpointing, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2,
                )  # fmt: skip
                assert run.args.world_size == 2
                gradient = first_gradient(run)
                name = f"ddp-{rows}-{adapter}-{checkpointing}"
                if dist.get_rank() == 0:
                    torch.save(gradient, out / f"{name}.pt")
                    (out / f"{name}.json").write_text(json.dumps(run.state.log_history[0]))


PREFERENCES = {
    "dpo": ("DPO", {"loss_type": ["aot_unpaired", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "kto": ("KTO", {}),
    "bco": ("BCO", {}),
    "reward": ("Reward", {}),
}


def preferring(name, path, tokenizer, rows, adapter, **settings):
    method, options = PREFERENCES[name]
    model = tiny_scorer(tokenizer) if method == "Reward" else tiny(tokenizer)
    further = {} if method == "Reward" or adapter else {"ref_model": tiny(tokenizer, seed=1)}
    return preference(
        method,
        path,
        adapted(model) if adapter else model,
        tokenizer,
        (labelled_rows if method in ("KTO", "BCO") else pair_rows)(rows),
        max_steps=1,
        **further,
        **options,
        **settings,
    )


def preferences(out, tokenizer):
    """Five rows: one rank's last batch is empty."""
    for name in PREFERENCES:
        for adapter in (False,) if name == "reward" else (False, True):
            run = preferring(
                name, out / "run", tokenizer, 5, adapter, per_device_train_batch_size=2, gradient_accumulation_steps=2
            )
            gradient = first_gradient(run)
            if dist.get_rank() == 0:
                torch.save(gradient, out / f"{name}-{adapter}.pt")
                (out / f"{name}-{adapter}.json").write_text(json.dumps(run.state.log_history[0]))
    # Log-probs of the reference, each rank its part.
    run = preferring("dpo", out / "run", tokenizer, 5, True, precompute_ref_log_probs=True)
    if dist.get_rank() == 0:
        torch.save(torch.tensor(list(run.train_dataset["ref_chosen_logps"])), out / "reference.pt")


class Cpu:
    """What accelerate's sharding asks of an accelerator. (Accelerate itself shards on accelerators alone.)"""

    def __init__(self):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        self.state = types.SimpleNamespace(fsdp_plugin=plugin)
        self.mixed_precision, self.device, self.is_main_process = "no", torch.device("cpu"), dist.get_rank() == 0


def sharded_preferences(out, tokenizer):
    """The policy and its reference, a model of its own or a twin of the adapter, sharded as accelerate does it."""
    for adapter in (False, True):
        run = preferring(
            "dpo", out / "run", tokenizer, 5, adapter, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            sync_ref_model=True, ref_model_sync_steps=100,
        )  # fmt: skip
        for model in (run.model,) if adapter else (run.reference.model, run.model):
            fsdp2_prepare_model(Cpu(), model)
        run.accelerator.prepare_model = lambda model, **_: model
        gradient = {name: each.full_tensor() for name, each in first_gradient(run).items()}
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"dpo-sharded-{adapter}.pt")
            (out / f"dpo-sharded-{adapter}.json").write_text(json.dumps(run.state.log_history[0]))
        # The reference moves by its shards, and so is kept in a checkpoint.
        before = copied(run.reference.weights())
        run.reference.follow(run.model, 0.25)
        after = copied(run.reference.weights())
        policy = local_weights(run.model)
        for name, weight in after.items():
            moved = before[name].lerp(policy[name.replace(TWIN, "default")], 0.25)
            torch.testing.assert_close(weight, moved)
        assert any((before[name] != weight).any() for name, weight in after.items())
        torch.save(run.method_state(), out / f"state-{dist.get_rank()}.pt")
        run.reference.follow(run.model, 1.0)
        run.load_method_state(torch.load(out / f"state-{dist.get_rank()}.pt", weights_only=True))
        assert all(torch.equal(weight, after[name]) for name, weight in run.reference.weights().items())
        try:
            run.load_method_state({"reference": {name: each.new_zeros(99) for name, each in after.items()}})
        except ValueError as error:
            (out / f"refused-{adapter}-{dist.get_rank()}.txt").write_text(str(error))


def copied(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


ONLINE = {
    "grpo": ("GRPO", {"beta": 0.1, "num_iterations": 2, "entropy_coef": 0.01}),
    "grpo-sequences": ("GRPO", {"loss_type": "grpo", "top_entropy_quantile": 0.5}),
    "rloo": ("RLOO", {"normalize_advantages": True}),
    # A round of two steps, in which the second rank drew most of what is dropped.
    "grpo-refilled": (
        "GRPO",
        {
            **{"dynamic_sampling": True, "steps_per_generation": 2, "rows": test_online.TASTES},
            "reward_funcs": test_online.by_taste,
        },
    ),
}


def drawing(name, path, tokenizer, batch):
    """One round of two prompts, four completions each; with two ranks each draws some of them."""
    method, options = ONLINE[name]
    return test_online.make(
        path, tokenizer, method, shuffle_dataset=False, max_tokens_per_micro_batch=20,
        per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        **{"rows": test_online.PROMPTS[:2], **options},
    )  # fmt: skip


def online(out, tokenizer):
    for name in ONLINE:
        gradient, line = test_online.first_step(drawing(name, out / "run", tokenizer, 4))
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"{name}.pt")
            (out / f"{name}.json").write_text(json.dumps(line))


def sharded_gradient(adapter, checkpointing, head_apart, tied, out):
    """FSDP2 by hand: each layer sharded, then the root; two trees for the first rank, two for the second."""
    model = fsdp_model(adapter, tied)
    attachment = attach(model)
    assert attachment.is_flat, attachment.reason
    mesh = init_device_mesh("cpu", (2,))
    base = model.get_base_model() if adapter else model
    if checkpointing:
        families.checkpoint_layers(base, reentrant=False)
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_apart:
        fully_shard(base.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    trees = families.forest()
    mine = attachment.batch(trees[:2] if dist.get_rank() == 0 else trees[2:])
    items = torch.tensor(float(mine["target_N"].shape[0]))
    dist.all_reduce(items)
    loss = -score(model, mine).logp_N.sum() * 2 / items
    loss.backward()
    return {
        name: parameter.grad.full_tensor() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def fsdp_model(adapter, tied):
    model = families.build("llama", tie_word_embeddings=tied)
    return adapted(model) if adapter else model


def fsdp(out, _):
    for adapter, checkpointing, head_apart, tied in FSDP_CASES:
        gradient = sharded_gradient(adapter, checkpointing, head_apart, tied, out)
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"fsdp-{adapter}-{checkpointing}-{head_apart}-{tied}.pt")
        dist.barrier()


FSDP_CASES = [
    (False, False, False, False),
    (False, True, False, False),
    (False, False, True, False),
    (False, True, False, True),
    (True, False, False, False),
    (True, True, False, True),
]


def deepspeed_settings(stage):
    config = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }
    return {"deepspeed": config, "use_cpu": False}  # else accelerate leaves DeepSpeed out


def deepspeed_runs(name, path, tokenizer, batch, **settings):
    """Three steps, the last two of which depend on how the first was taken."""
    settings = {"max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, **settings}
    if name == "grpo":
        rows = test_online.PROMPTS[:2]
        return test_online.make(path, tokenizer, rows=rows, beta=0.1, max_tokens_per_micro_batch=20, **settings)
    return preference("DPO", path, tiny(tokenizer), tokenizer, pair_rows(8), **settings)


def deepspeed(out, tokenizer):
    import deepspeed as library

    library.init_distributed("gloo")
    stage = int(sys.argv[4])
    for name in ("grpo", "dpo"):
        run = deepspeed_runs(name, out / "run", tokenizer, 2, **deepspeed_settings(stage))
        run.train()
        assert type(run.model_wrapped).__name__ == "DeepSpeedEngine"
        if dist.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(run.state.log_history[:3]))


STOPS = tuple(range(0, 60000, 4))  # one token in four ends a completion


def sampling(name, path, tokenizer, batch):
    """A step on completions of the model itself: with two ranks one draws those of the first prompt, the other those of
    the second, which end after different numbers of tokens."""
    run = test_online.make(
        path, tokenizer, "GRPO", rows=test_online.PROMPTS[:2], shuffle_dataset=False, max_tokens_per_micro_batch=20,
        max_completion_length=24, beta=0.1 * (name == "fsdp"), scale_rewards="none", per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    run.sampler = Kept(InProcessSampler(tokenizer, max_rows=3))
    run.sampling = dataclasses.replace(run.sampling, stop_ids=STOPS)
    run.report = list  # which would list them all
    return run


class Kept:
    """A sampler that keeps what was drawn last."""

    def __init__(self, sampler):
        self.sampler, self.drawn = sampler, []

    def generate(self, model, requests, sampling):
        self.drawn = self.sampler.generate(model, requests, sampling)
        return self.drawn


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def samples(out, tokenizer):
    for name in sys.argv[4:]:
        run = sampling(name, out / "run", tokenizer, 4)
        if name == "fsdp":
            for model in (run.model, run.reference.model):
                fsdp2_prepare_model(Cpu(), model)
            run.accelerator.prepare_model = lambda model, **_: model
        gradient, line = test_online.first_step(run)
        gradient = {key: each.full_tensor() if hasattr(each, "full_tensor") else each for key, each in gradient.items()}
        drawn = [None, None]
        dist.all_gather_object(drawn, [each for group in run.sampler.drawn for each in group])
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"samples-{name}.pt")
            (out / f"samples-{name}.json").write_text(json.dumps({"line": line, "drawn": drawn}))


def shares(out, _):
    """Sharded weights: a rank with many samples, with one, and with none."""
    model = families.build("llama").eval()
    attach(model)
    shard(model)
    for case, both in enumerate(shared_requests()):
        drawn = InProcessSampler(max_rows=4).generate(model, both[dist.get_rank()], SHARED)
        (out / f"shares-{case}-{dist.get_rank()}.json").write_text(json.dumps(drawn))
    refused = []
    unserved = families.build("falcon_mamba").eval()
    fully_shard(unserved, mesh=init_device_mesh("cpu", (2,)))
    for sampler, each in ((InProcessSampler(), unserved), (ContinuousSampler(), model)):
        try:
            sampler.generate(each, both[dist.get_rank()], SHARED)
        except ValueError as error:
            refused.append(str(error))
    (out / f"refused-{dist.get_rank()}.json").write_text(json.dumps(refused))


SHARED = Sampling(max_new_tokens=20, temperature=0.9, stop_ids=tuple(range(0, 128, 9)))


def shared_requests():
    many = [Request(list(range(start, start + length)), 5, (start,)) for start, length in ((5, 3), (20, 9), (40, 1))]
    one = [Request([7, 8, 9, 10], 1, (9,))]
    return [(many, one), (one, many), ([], many), ([], [])]


def throws(out, tokenizer):
    run = trainer(out / "run", tokenizer, 8, False, False, per_device_train_batch_size=2)
    if dist.get_rank() == 1:

        def broken(*args, **kwargs):
            raise ValueError("the second rank cannot go on")

        run.loss = broken
    run.train()


def resumes(out, tokenizer):
    """Two ranks, stopped between two logs and resumed."""

    def make(path):
        return sft(
            path,
            tiny(tokenizer),
            tokenizer,
            chat_rows(22),
            per_device_train_batch_size=2,
            max_steps=6,
            logging_steps=3,
            save_strategy="steps",
            save_steps=2,
        )

    whole = make(out / "whole")
    whole.train()
    resumed = make(out / "resumed")
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-4"))
    if dist.get_rank() == 0:

        def timeless(run):
            lines = [line for line in run.state.log_history if "train_runtime" not in line]
            return [{key: value for key, value in line.items() if "second" not in key} for line in lines]

        lines = [timeless(whole), timeless(resumed)]
        (out / "resume.json").write_text(json.dumps(lines))


def own_losses(out, tokenizer):
    """Five rows: one rank's last batch is empty, and no loss of the user's own is asked about it."""
    for cls in test_overrides.DISTRIBUTED:
        settings = {
            "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 2,
        }  # fmt: skip
        run = test_overrides.made(cls, out / "run", tokenizer, chat_rows(5), chat_rows(5), settings)
        evaluated = run.evaluate()["eval_loss"]
        gradient = first_gradient(run)
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"{cls.__name__}.pt")
            found = {"eval_loss": evaluated, "loss": test_overrides.logged(run)["loss"]}
            (out / f"{cls.__name__}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    mode, out, model = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if mode in ("fsdp", "shares"):
        dist.init_process_group("gloo")
    modes = {"ddp": ddp, "online": online, "preferences": preferences, "fsdp": fsdp, "throws": throws}
    modes = {**modes, "resumes": resumes, "samples": samples, "shares": shares}
    modes["own_losses"] = own_losses
    {**modes, "sharded_preferences": sharded_preferences, "deepspeed": deepspeed}[mode](out, tokenizer)
    if dist.is_initialized():
        dist.destroy_process_group()
