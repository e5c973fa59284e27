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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

import trl
from tests.engine import families
from tests.rollout.helpers import sample
from tests.trainer import test_online, test_overrides
from tests.trainer.helpers import (
    DEFAULTS,
    chat_rows,
    first_gradient,
    labelled_rows,
    pair_rows,
    preference,
    sft,
    step_rows,
    tiny,
    tiny_scorer,
)
from trl.data.batching.collate import Branch, Tree
from trl.engine.probe import attach
from trl.engine.score import score
from trl.losses.tokens import Metric, largest, mean_metric, smallest
from trl.models import offload
from trl.models.adapters import TWIN
from trl.models.shards import keep_precision, local_weights
from trl.rollout import round_weights
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request, Sampling
from trl.trainer.metrics import Totals


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
    """What accelerate's sharding asks of an accelerator, after our trainers have seen to its precision. (Accelerate
    itself shards on accelerators alone.)"""

    def __init__(self, half=False):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        if half:
            plugin.set_mixed_precision("bf16")
        keep_precision(plugin)
        self.state = types.SimpleNamespace(fsdp_plugin=plugin)
        self.mixed_precision = "bf16" if half else "no"
        self.device, self.is_main_process = torch.device("cpu"), dist.get_rank() == 0


def sharded_preferences(out, tokenizer):
    """The policy and its reference, a model of its own or a twin of the adapter, sharded as accelerate does it."""
    half = sys.argv[4] == "bf16"
    for adapter in (False, True):
        run = preferring(
            "dpo", out / "run", tokenizer, 5, adapter, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            sync_ref_model=True, ref_model_sync_steps=100, bf16=half,
        )  # fmt: skip
        for model in (run.model,) if adapter else (run.reference.model, run.model):
            fsdp2_prepare_model(Cpu(half), model)
        run.accelerator.prepare_model = lambda model, **_: model
        gradient = {name: each.full_tensor() for name, each in first_gradient(run).items()}
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"dpo-sharded-{adapter}.pt")
            (out / f"dpo-sharded-{adapter}.json").write_text(json.dumps(run.state.log_history[0]))
        # The reference moves by its shards, and so is kept in a checkpoint.
        before = copied(run.reference.policy.weights())
        run.reference.policy.follow(run.model, 0.25)
        after = copied(run.reference.policy.weights())
        policy = local_weights(run.model)
        for name, weight in after.items():
            moved = before[name].lerp(policy[name.replace(TWIN, "default")], 0.25)
            torch.testing.assert_close(weight, moved)
        assert any((before[name] != weight).any() for name, weight in after.items())
        torch.save(run.method_state(), out / f"state-{dist.get_rank()}.pt")
        run.reference.policy.follow(run.model, 1.0)
        state = torch.load(out / f"state-{dist.get_rank()}.pt", weights_only=True)
        run.load_method_state(state)
        assert all(torch.equal(weight, after[name]) for name, weight in run.reference.policy.weights().items())
        if adapter:  # a resumed run reads the checkpoint before the policy, and the twin in it, is sharded
            again = preferring("dpo", out / "run", tokenizer, 5, True, per_device_train_batch_size=2,
                               sync_ref_model=True, ref_model_sync_steps=100, bf16=half)  # fmt: skip
            again.load_method_state(state)
            fsdp2_prepare_model(Cpu(half), again.model)
            again.accelerator.prepare_model = lambda model, **_: model
            again.train()
            assert all(torch.equal(weight, after[name]) for name, weight in again.reference.policy.weights().items())
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
    "ppo": ("PPO", {"num_mini_batches": 2, "num_iterations": 2, "whiten_rewards": True, "num_generations": 2}),
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


def sharded(adapter, checkpointing, head_apart, tied, half):
    """FSDP2 by hand: each layer sharded, then the root; two trees for the first rank, the others for the second. The
    gradient, and the log-probs of this rank."""
    model = fsdp_model(adapter, tied)
    attachment = attach(model)
    assert attachment.is_flat, attachment.reason
    mesh = init_device_mesh("cpu", (2,))
    base = model.get_base_model() if adapter else model
    if checkpointing:
        families.checkpoint_layers(base, reentrant=False)
    options = {"mesh": mesh, "mp_policy": Cpu(half).state.fsdp_plugin.mixed_precision_policy}
    for layer in base.model.layers:
        fully_shard(layer, **options)
    if head_apart:
        fully_shard(base.lm_head, **options)
    fully_shard(model, **options)
    model.train()
    mine = attachment.batch(fsdp_trees(dist.get_rank()))
    items = torch.tensor(float(mine["target_N"].shape[0]))
    dist.all_reduce(items)
    if not checkpointing:
        assert_weights_are_known(model, mine)
    with offload.on_host(model):
        logp_N = score(model, mine).logp_N
        (-logp_N.sum() * 2 / items).backward()
    gradient = {
        name: parameter.grad.full_tensor() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return gradient, logp_N.detach()


def assert_weights_are_known(model, batch):
    """Of what a forward pass saves, the gathered weights are told from the rest, so that they are not moved."""
    saved = []
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    with offload._weights(model) as weights:

        def note(tensor):
            saved.append((tuple(tensor.shape), tensor.untyped_storage().data_ptr() in weights))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            score(model, batch)
    known = [is_known for shape, is_known in saved if len(shape) == 2 and sizes.issuperset(shape)]
    assert len(known) > 10 and all(known), saved
    assert sum(not is_known for _, is_known in saved) > 10


def fsdp_model(adapter, tied):
    model = families.build("llama", tie_word_embeddings=tied)
    return adapted(model) if adapter else model


def fsdp_trees(rank):
    """The second rank has a sequence of 300 tokens, too."""
    trees = families.forest()
    ids = [3 + 7 * place % 90 for place in range(300)]
    return trees[:2] if rank == 0 else [*trees[2:], Tree(Branch(ids, [True] * 300), row=4)]


def fsdp(out, _):
    for case in FSDP_CASES:
        gradient, logp_N = sharded(*case, half=sys.argv[4] == "bf16")
        name = "-".join(map(str, case))
        torch.save(logp_N, out / f"logp-{name}-{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"fsdp-{name}.pt")
        dist.barrier()


FSDP_CASES = [
    (False, False, False, False),
    (False, True, False, False),
    (False, False, True, False),
    (False, True, False, True),
    (True, False, False, False),
    (True, True, False, True),
]


def deepspeed_settings(stage, half=False):
    config = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }
    if half:
        config["bf16"] = {"enabled": True}
    return {"deepspeed": config, "bf16": half, "use_cpu": False}  # else accelerate leaves DeepSpeed out


def deepspeed_runs(name, path, tokenizer, batch, **settings):
    """Three steps, the last two of which depend on how the first was taken."""
    settings = {"max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, **settings}
    if name == "grpo":
        rows = test_online.PROMPTS[:2]
        return test_online.make(path, tokenizer, rows=rows, beta=0.1, max_tokens_per_micro_batch=20, **settings)
    return preference("DPO", path, tiny(tokenizer), tokenizer, pair_rows(8), **settings)


CHOSEN, REJECTED = -123.4567, -234.5678  # which bf16 does not hold


def start_deepspeed():
    """Without its kernel for processes on CPUs, which would be compiled first: that takes minutes, and a process that
    is killed meanwhile leaves a lock for which all later ones wait."""
    import deepspeed as library

    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    library.init_distributed("gloo")


def deepspeed(out, tokenizer):
    start_deepspeed()
    stage, half = int(sys.argv[4]), sys.argv[5] == "bf16"
    if half:
        data = [{**row, "ref_chosen_logps": CHOSEN, "ref_rejected_logps": REJECTED} for row in pair_rows(8)]
        run = preference("DPO", out / "run", tiny(tokenizer), tokenizer, data, max_steps=1, beta=0.1,
                         per_device_train_batch_size=4, **deepspeed_settings(stage, half))  # fmt: skip
        run.train()
        assert next(run.model_wrapped.module.parameters()).dtype == torch.bfloat16
        if dist.get_rank() == 0:
            (out / "half.json").write_text(json.dumps(run.state.log_history[:1]))
        return
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

    def sync(self, model, version):
        self.sampler.sync(model, version)

    def generate(self, requests, sampling):
        self.drawn = self.sampler.generate(requests, sampling)
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
    """Sharded weights: a rank with many samples, with one, and with none. Weights are gathered for each call of a
    layer, then once for the round."""
    model = families.build("llama").eval()
    attach(model)
    shard(model)
    gathered = counted_gathers()
    for way, share in (("layers", 0.0), ("round", round_weights.SHARE)):
        round_weights.SHARE = share
        for case, both in enumerate(shared_requests()):
            gathered.clear()
            drawn = sample(InProcessSampler(max_rows=4), model, both[dist.get_rank()], SHARED)
            found = {"drawn": drawn, "gathers": len(gathered), "sharded": all_sharded(model)}
            (out / f"shares-{way}-{case}-{dist.get_rank()}.json").write_text(json.dumps(found))
    thrown = thrown_within(model, both[dist.get_rank()])
    (out / f"thrown-{dist.get_rank()}.json").write_text(json.dumps(thrown))
    refused = []
    unserved = families.build("falcon_mamba").eval()
    fully_shard(unserved, mesh=init_device_mesh("cpu", (2,)))
    for sampler, each in ((InProcessSampler(), unserved), (ContinuousSampler(), model)):
        try:
            sample(sampler, each, both[dist.get_rank()], SHARED)
        except ValueError as error:
            refused.append(str(error))
    (out / f"refused-{dist.get_rank()}.json").write_text(json.dumps(refused))


def counted_gathers():
    """A list that gets an entry for each group of weights that is gathered."""
    group, found = FSDPParamGroup, []
    own = group.wait_for_unshard

    def wait(self):
        if self._all_gather_result is not None:
            found.append(self)
        own(self)

    group.wait_for_unshard = wait
    return found


def all_sharded(model):
    return all(isinstance(each, DTensor) for each in model.parameters())


def thrown_within(model, requests):
    """A layer's forward pass that fails within a round, then another round."""
    layer, weights = model.model.layers[1], {key: each.clone() for key, each in local_weights(model).items()}
    before = [each.post_forward_mesh_info for each in groups_of(model)]
    calls, message = [], None

    def fail(*_):
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("within a forward pass")

    hook = layer.mlp.register_forward_pre_hook(fail)
    asked = requests or [Request([3, 4, 5], 2, (1,))]
    try:
        sample(InProcessSampler(max_rows=4), model, asked, SHARED)
    except KeyError as error:
        message = str(error)
    hook.remove()
    same = all(torch.equal(each, weights[key]) for key, each in local_weights(model).items())
    found = {"message": message, "sharded": all_sharded(model), "same": same,
             "settings": before == [each.post_forward_mesh_info for each in groups_of(model)]}  # fmt: skip
    return {**found, "drawn": sample(InProcessSampler(max_rows=4), model, asked, SHARED)}


def groups_of(model):
    modules = [each for each in model.modules() if isinstance(each, FSDPModule)]
    return [group for each in modules for group in round_weights._groups(each._get_fsdp_state())]


SHARED = Sampling(max_new_tokens=20, temperature=0.9, stop_ids=tuple(range(0, 128, 9)))


def shared_requests():
    many = [Request(list(range(start, start + length)), 5, (start,)) for start, length in ((5, 3), (20, 9), (40, 1))]
    one = [Request([7, 8, 9, 10], 1, (9,))]
    return [(many, one), (one, many), ([], many), ([], [])]


def few(name, path, tokenizer, rows, ranks):
    """Two steps and evaluations on one row or three, each step a line of the log."""
    batch = rows if ranks == 1 else 1
    settings = {"max_steps": 2, "per_device_eval_batch_size": batch, "eval_strategy": "steps", "eval_steps": 1}
    if name in ("GRPO", "RLOO"):
        return test_online.make(
            path, tokenizer, name, rows=test_online.PROMPTS[:rows], eval_rows=test_online.PROMPTS[:rows],
            shuffle_dataset=False, num_generations=2, gradient_accumulation_steps=1, beta=0.1,
            per_device_train_batch_size=4 // ranks, **settings,
        )  # fmt: skip
    settings["per_device_train_batch_size"] = batch
    if name == "KTO" and rows == 1:
        settings["loss_type"] = "apo_zero_unpaired"  # the other compares with rows of other prompts
    kinds = {"SFT": chat_rows, "KTO": labelled_rows, "BCO": labelled_rows, "PRM": step_rows}
    data = kinds.get(name, pair_rows)(4)[:rows]
    if name == "SFT":
        return sft(path, tiny(tokenizer), tokenizer, data, eval_rows=data, **settings)
    scores = name in ("Reward", "PRM")
    model = tiny_scorer(tokenizer, per_token=name == "PRM") if scores else tiny(tokenizer)
    return preference(name, path, model, tokenizer, data, eval_rows=data, **settings)


JUDGED = ("SFT", "DPO", "KTO", "BCO", "ORPO", "CPO", "Reward", "PRM")
DRAWN = ("GRPO", "RLOO")


def lines(run):
    """What a run logged, without times."""
    apart = ("runtime", "second", "preparation_time", "step_time")
    return [
        {key: value for key, value in line.items() if not key.endswith(apart)}
        for line in run.state.log_history
        if "train_runtime" not in line
    ]


def few_rows(out, tokenizer):
    """More ranks than rows: some have nothing."""
    names(out)
    for name in sys.argv[4:]:
        for rows in (1, 3):
            run = few(name, out / "run", tokenizer, rows, dist.get_world_size())
            run.train()
            if dist.get_rank() == 0:
                (out / f"{name}-{rows}.json").write_text(json.dumps(lines(run)))


def names(out):
    """Metrics that some ranks have and others do not, over three log lines."""
    rank, device, totals, found = dist.get_rank(), torch.device("cpu"), Totals(), []
    gathered = []
    original = torch.distributed.all_gather

    def counted(*args, **kwargs):
        gathered[-1] += 1
        return original(*args, **kwargs)

    torch.distributed.all_gather = counted
    for line in range(3):
        own = {"all": mean_metric(torch.tensor([float(rank)] * (rank + 1)))}
        if rank % 2:
            own["odd"] = Metric(torch.tensor(10.0 * rank), 2.0)
        if rank == 3 and line != 1:
            own |= {"low": smallest(torch.tensor([4.0, 9.0])), "high": largest(torch.tensor([-7.0, -8.0]))}
        if rank == 0 and line != 1:
            own |= {"low": smallest(torch.tensor([5.0])), "late" if line else "early": mean_metric(torch.ones(1))}
        totals.add(own)
        if rank < 3:
            totals.add(own)
        gathered.append(0)
        found.append(totals.reduced(device, dist.get_world_size(), tokens=rank))
    torch.distributed.all_gather = original
    # One kind on one rank, another on the rest.
    totals.add({"mixed": mean_metric(torch.ones(1)) if rank else smallest(torch.ones(1))})
    try:
        totals.reduced(device, dist.get_world_size())
    except ValueError as error:
        found.append(str(error))
    (out / f"names-{rank}.json").write_text(json.dumps([found, gathered]))


def predictions(out, tokenizer):
    """Five rows: of batches of two, one rank's last has none; of batches of three, one's has a row less."""
    found = []
    for batch in (2, 3):
        run = predicting(out / "run", tokenizer, batch)
        found.append(run.evaluate())
    rank = dist.get_rank()
    run.train()
    resumed = predicting(out / "again", tokenizer, 3)
    resumed.train(resume_from_checkpoint=str(out / "run" / "checkpoint-1"))
    ours, theirs = resumed.reference.policy.weights(), run.reference.policy.weights()
    found.append(all(torch.equal(ours[name], weight) for name, weight in theirs.items()))
    state = torch.load(out / "run" / "checkpoint-1" / f"trl_state_{rank}.pt", weights_only=True)
    found.append(sorted(state["method"]))
    (out / f"predictions-{rank}.json").write_text(json.dumps(found))


def predicting(path, tokenizer, batch):
    """DPO with metrics of the user's own, and a reference that follows."""

    def metrics(prediction):
        chosen, shift = prediction.label_ids[:, 1:], prediction.predictions["best"][:, :-1]
        best = prediction.predictions["logit"][:, :-1]
        at = chosen != -100
        return {"right": float((shift == chosen)[at].mean()), "logit": float(best[at].mean()), "rows": len(chosen),
                "tokens": int(at.sum()), "inputs": len(prediction.inputs)}  # fmt: skip

    def best(logits, labels):
        return {"best": logits.argmax(-1), "logit": logits.amax(-1)}

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "include_for_metrics": ["inputs"]}
    config = trl.DPOConfig(
        **{**DEFAULTS, **settings}, output_dir=str(path), per_device_eval_batch_size=batch,
        per_device_train_batch_size=batch, sync_ref_model=True, ref_model_sync_steps=1,
    )  # fmt: skip
    return trl.DPOTrainer(
        tiny(tokenizer), None, config, train_dataset=pair_rows(5), eval_dataset=pair_rows(5),
        processing_class=tokenizer, compute_metrics=metrics, preprocess_logits_for_metrics=best,
    )  # fmt: skip


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
    if mode in ("fsdp", "shares", "few_rows"):
        dist.init_process_group("gloo")
    modes = {"ddp": ddp, "online": online, "preferences": preferences, "fsdp": fsdp, "throws": throws}
    modes = {**modes, "resumes": resumes, "samples": samples, "shares": shares, "few_rows": few_rows}
    modes["predictions"] = predictions
    modes["own_losses"] = own_losses
    {**modes, "sharded_preferences": sharded_preferences, "deepspeed": deepspeed}[mode](out, tokenizer)
    if dist.is_initialized():
        dist.destroy_process_group()
