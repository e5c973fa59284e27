"""The plan: counts of weights and bytes as real models have them, activations as a real run has them."""

import copy

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    Qwen3MoeConfig,
)

import trl
from tests.plan.models import LLAMA_8B
from tests.plan.models import LORA as LORA_16
from trl.data.batching.collate import Branch, Tree
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.offload import enable_checkpointing
from trl.plan import CARDS, Card, Run, plan, tokens_that_fit
from trl.plan.advice import divided, fitted
from trl.plan.cost import cache_bytes, flops_of_step
from trl.plan.memory import GIB, RESERVE
from trl.plan.page import page
from trl.plan.reading import run_of
from trl.plan.shapes import tree, trees
from trl.plan.trace import _Alive, micro_batch
from trl.plan.weights import state_bytes, step_bytes, weights_of

SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def test_weights_are_counted_as_the_model_has_them():
    model = AutoModelForCausalLM.from_config(SMALL)
    found = weights_of(Run(SMALL))
    assert found.total == found.trained == sum(each.numel() for each in model.parameters())
    assert found.head == found.largest == 512 * 64  # the head is the embedding
    assert found.total_bytes == found.trained_bytes == 2 * found.total == 2 * sum(found.half)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert found.products == found.quantised == 3 * layer
    adapted = weights_of(Run(SMALL, adapter=LORA))
    assert adapted.trained == 3 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert adapted.trained_bytes == 4 * adapted.trained and adapted.half == ()  # PEFT's adapters are float32
    assert adapted.total - adapted.trained == found.total
    nested = adapted.frozen_bytes(4, True) - 2 * (found.total - adapted.quantised)
    assert nested == pytest.approx(adapted.quantised * (0.5 + 0.127 / 8))
    assert weights_of(Run(SMALL, dtype=torch.float16)).total_bytes == 4 * found.total  # held in float32


def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to():
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    whole = weights_of(Run(config, dtype=torch.float32))
    experts = 2 * 8 * 3 * 64 * 32
    assert whole.quantised >= experts
    rest = whole.quantised - experts
    assert whole.products == pytest.approx(rest + experts * 2 / 8)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_micro_batch_takes_what_it_takes_in_a_real_run(adapter, checkpointing, accumulation):
    """A run of three layers has what one and two layers on tensors without values foretell."""
    run = Run(SMALL, "kto", torch.float32, None, adapter, rows=2, prompt=30, completion=50, device="cpu",
              checkpointing=checkpointing, accumulation=accumulation)  # fmt: skip
    sections = micro_batch(run, 2)

    model = AutoModelForCausalLM.from_config(copy.deepcopy(SMALL))
    if adapter is not None:
        from peft import get_peft_model

        model = get_peft_model(model, copy.deepcopy(adapter))
    attachment = attach(model)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    model.train()
    if accumulation > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    batch = attachment.batch(trees(run, 2))
    with _Alive() as alive:
        score(model, batch, entropy=True, mean_logit=True).logp_N.sum().backward()
    assert max(held.total for held in sections) == pytest.approx(alive.peak, rel=0.02)


def test_parts_and_phases():
    run = Run(LLAMA_8B, "sft", adapter=LORA_16,
              bits=4, nested=True, rows=2, prompt=64, completion=64)  # fmt: skip
    found = plan(run, "rtx-3090")
    parts = {phase.name: phase.parts for phase in found.phases()}
    linear = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096 + 65 * 4096
    assert parts["backward"]["weights"] == pytest.approx(linear * (0.5 + 0.127 / 8) + 2 * rest)
    adapter = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert parts["backward"]["adapter"] == parts["optimizer step"]["gradients"] == 2 * adapter  # under 4 bits: bfloat16
    assert parts["optimizer step"]["optimizer"] == (8 + 2) * adapter
    assert found.held["reserve"] == RESERVE["cuda"]
    assert found.fits() and "to spare" in next(found.advice())
    most = found.largest_rows()
    assert found.fits(most) and not found.fits(most + 1)
    assert found.peak.total < 10 * GIB


def test_a_run_that_does_not_fit_is_told_what_would():
    run = Run(SMALL, "dpo", dtype=torch.float32, rows=8, prompt=40, completion=40, has_reference=True)
    roomy = plan(run, Card(10.0, 100, 100))
    assert "reference" in roomy.held
    peak = roomy.peak.total
    tight = plan(run, Card((peak - 0.5 * (roomy.activations(8) - roomy.activations(1))) / GIB, 100, 100))
    said = list(tight.advice())
    assert said[0].startswith("does not fit")
    most = tight.largest_rows()
    assert 1 <= most < 8 and f"--per_device_train_batch_size {divided(8, most)} " in said[1]
    assert tight.fits(most) and not tight.fits(most + 1)
    with pytest.raises(ValueError, match="there is no card 'a1000'; known are t4"):
        plan(run, "a1000")


def test_shards_divide_what_they_divide():
    run = {"config": SMALL, "dtype": torch.float32, "processes": 4, "prompt": 8, "completion": 8}
    total = 4 * weights_of(Run(SMALL, dtype=torch.float32)).total
    for sharding, (weights, gradients, state) in {
        "ddp": (1, 1, 1), "zero1": (1, 1, 4), "zero2": (1, 4, 4), "fsdp2": (4, 4, 4), "zero3": (4, 4, 4)
    }.items():  # fmt: skip
        found = plan(Run(**run, sharding=sharding))
        assert found.held["weights"] == total / weights
        assert found.held["optimizer"] == 2 * total / state
        step = {phase.name: phase.parts for phase in found.phases()}["optimizer step"]
        assert step["gradients"] == total / gradients
        assert ("buckets" in step) is (gradients == 1)


def test_the_cache_of_the_sampler_is_that_of_transformers():
    model = AutoModelForCausalLM.from_config(SMALL)
    out = model(input_ids=torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.layers)
    assert cache_bytes(SMALL, 7, torch.float32) * 3 == real
    run = Run(SMALL, "grpo", dtype=torch.float32, rows=4, prompt=8, completion=8, device="cpu")
    sampling = {phase.name: phase.parts for phase in plan(run).phases()}["sampling"]
    assert sampling["cache of 4 rows"] == 4 * cache_bytes(SMALL, 16, torch.float32)


def test_operations():
    """Six for each weight and token where all weights train and nothing is recomputed; an adapter saves two."""
    run = Run(SMALL, dtype=torch.float32, rows=2, prompt=16, completion=16, checkpointing=False)
    weights = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 512 * 64
    attention = 3 * 2.0 * 3 * 64 * 32 * 64
    assert flops_of_step(run, weights_of(run).products) == pytest.approx(6 * weights * 64 + attention)


def test_a_run_by_the_arguments_of_a_trainer(tmp_path):
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_completion_length=64, max_prompt_length=32,
        num_generations=4, per_device_train_batch_size=8, beta=0.1,
    )  # fmt: skip
    run = run_of("grpo", SMALL, args, dtype="float32", adapter=LORA)
    assert (run.prompt, run.completion, run.generations, run.rows) == (32, 64, 4, 8)
    assert run.has_reference and run.samples and run.dtype == torch.float32
    assert run.tokens_of_step == 8 * 64 + 2 * 32
    args = trl.OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=8)
    run = run_of("online-dpo", SMALL, args, prompt=32, completion=64)  # 8 prompts, of two completions each
    assert run.tokens_of_step == 8 * (32 + 2 * 64)


def test_cards_are_in_order():
    assert all(card.memory > 10 and card.tflops > 10 and card.bandwidth > 100 for card in CARDS.values())
    assert [Tree(Branch([1], [False])).row, len(tree(3, 4, [2, 2]).branches)] == [-1, 2]


def test_models_that_score_and_value_functions_are_planned_as_they_are():
    """Without the head of a language model: no logits, and a matrix of H numbers in its place."""
    sizes = {"dtype": torch.float32, "rows": 2, "prompt": 40, "completion": 40, "device": "cpu"}
    causal = weights_of(Run(SMALL, **sizes))
    for method, head, labels in (("reward", "SequenceClassification", 1), ("prm", "TokenClassification", 2)):
        run = Run(SMALL, method, head=head, **sizes)
        config = copy.deepcopy(SMALL)
        config.num_labels = labels
        model = {1: AutoModelForSequenceClassification, 2: AutoModelForTokenClassification}[labels].from_config(config)
        assert weights_of(run).total == sum(each.numel() for each in model.parameters())
        assert plan(run).activations(2) < plan(Run(SMALL, "orpo", **sizes)).activations(2)
    assert weights_of(Run(SMALL, "ppo", **sizes)).total == causal.total + 64 + 1
    whole = plan(Run(SMALL, "ppo", critic=SMALL, **sizes))
    assert whole.held["critic"] == 4 * (causal.total + 64)  # the embedding is no head there, and stays
    assert whole.held["weights"] == 4 * causal.total
    assert whole.held["optimizer"] == 8 * (2 * causal.total + 64)


def test_a_teacher_is_held_and_asked():
    sizes = {"dtype": torch.float32, "rows": 2, "prompt": 40, "completion": 40, "device": "cpu"}
    taught, alone = plan(Run(SMALL, "gkd", teacher=SMALL, **sizes)), plan(Run(SMALL, "sft", **sizes))
    assert taught.held["teacher"] == alone.held["weights"]
    assert taught.activations(2) > alone.activations(2)


def test_a_step_on_bfloat16_weights_has_whole_ones():
    found = plan(Run(SMALL, prompt=8, completion=8))
    step = {phase.name: phase.parts for phase in found.phases()}["optimizer step"]["step"]
    total, largest = found.weights.total, 512 * 64
    # All are one chunk: float32 weights and gradients in the place of lower halves, or the largest being split.
    assert step == max(6 * total, 2 * total + 14 * largest)


def test_a_large_bfloat16_weight_steps_in_slices_where_the_optimizer_allows_it():
    weights = weights_of(Run(LLAMA_8B))
    assert weights.largest == 128256 * 4096 == 525336576  # eight slices of 65,667,072 weights
    assert step_bytes(Run(LLAMA_8B), weights) == 8 * 65667072
    assert step_bytes(Run(LLAMA_8B, optim="adafactor"), weights) == (6 + 8) * 128256 * 4096
    assert step_bytes(Run(LLAMA_8B), weights, shards=8) < 8 * 2**26
    assert state_bytes(Run(LLAMA_8B, optim="adamw_8bit"), weights) == 4 * weights.total + 6 * weights.largest


def test_tokens_that_fit_a_memory():
    run = Run(SMALL, "sft", dtype=torch.float32, prompt=32, completion=32, device="cpu", checkpointing=False)
    for tokens in (64, 256):
        memory = plan(run.having(rows=tokens // 64)).peak.total
        assert tokens_that_fit(run, memory + 1) == pytest.approx(tokens, abs=64)
    assert tokens_that_fit(run, 1000.0) == 0
    sampled = Run(SMALL, "grpo", dtype=torch.float32, prompt=32, completion=32, rows=8, budget=256, device="cpu")
    assert tokens_that_fit(sampled, plan(sampled).highest(512) + 1) == pytest.approx(512, rel=0.1)


def test_a_plan_allocates_no_weights_and_calls_no_device(monkeypatch: pytest.MonkeyPatch):
    """Eight billion weights would be 16 GB."""

    def touched(*args, **kwargs):
        raise AssertionError("a device was touched")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    state, before = torch.get_rng_state(), psutil.Process().memory_info().rss
    assert plan(Run(LLAMA_8B, rows=2), "h100").peak.total > 80 * GIB
    assert psutil.Process().memory_info().rss - before < 2**29
    assert torch.equal(torch.get_rng_state(), state)


def test_options_that_fit_have_the_same_rows_in_a_step():
    run = Run(SMALL, "sft", dtype=torch.float32, rows=12, prompt=200, completion=200, device="cpu")
    roomy = plan(run)
    tight = Card((roomy.highest(4) + 1) / GIB / 0.95, 0.0, 0.0)
    options, changed = fitted(plan(run, tight))
    assert options == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert changed.fits() and changed.run.rows * changed.run.accumulation == 12
    assert divided(12, 5) == 4 and divided(12, 100) == 12 and divided(7, 6) == 1 and divided(7, 0.5) == 0
    kept = run.having(checkpointing=False)
    smaller = Card((plan(run).highest(1) + 1) / GIB / 0.95, 0.0, 0.0)
    assert plan(kept, smaller).largest() == 0
    assert fitted(plan(kept, smaller))[0]["gradient_checkpointing"] is True
    options, changed = fitted(plan(run, Card(0.01, 0.0, 0.0)))  # nothing fits: the least that a step can take
    assert options == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12} and not changed.fits()


def test_the_estimate_without_a_trace_is_near():
    for run in (
        Run(SMALL, dtype=torch.float32, rows=4, prompt=100, completion=100, device="cpu"),
        Run(LLAMA_8B, rows=2),
        Run(LLAMA_8B, "dpo", adapter=LORA, rows=2, checkpointing=False),
    ):
        assert plan(run, rough=True).peak.total == pytest.approx(plan(run).peak.total, rel=0.3)


def test_a_page_needs_nothing_else():
    found = plan(Run(SMALL, "grpo", prompt=16, completion=16), "t4").to_dict()
    text = page(found)
    assert text.count("<svg") == 1 and "http" not in text and "src=" not in text
    assert all(phase["name"] in text for phase in found["phases"]) and "the card: 15.0 GiB" in text
