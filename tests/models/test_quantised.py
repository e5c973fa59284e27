"""4-bit and 8-bit weights under an adapter: the engine, the gradients, a few steps of training, saving and loading."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import trl
from tests.rollout.helpers import sample
from tests.trainer.helpers import DEFAULTS, chat_rows, sft
from trl.data.batching.collate import Branch, Tree
from trl.engine.forest import flat, padded
from trl.engine.head import plain_linear
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models import adapters, load
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request, Sampling

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NF4 = {**FOUR, "bnb_4bit_compute_dtype": "bfloat16"}
IDS = torch.arange(5, 25)[None]


@pytest.fixture(autouse=True, scope="module")
def quiet_bitsandbytes() -> Any:
    # On a CPU it tells in every process about kernels that could be fetched, when it is first imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def lora(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**settings, **changes})


def four_bit(path: str, config: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return load.load_causal_lm(path, quantization_config=config or NF4, **{"dtype": "bfloat16", **kwargs})


def adapted(path: str, peft_config: Any = None, **kwargs: Any) -> Any:
    model = four_bit(path, **kwargs)
    torch.manual_seed(0)
    return adapters.for_training(model, peft_config or lora())


def forest(path: str) -> list[Tree]:
    tokenizer = AutoTokenizer.from_pretrained(path)

    def branch(text: str, trained: bool = True) -> Branch:
        ids = tokenizer(text)["input_ids"]
        return Branch(ids, [trained] * len(ids))

    question = branch("The capital of France is", trained=False)
    answers = (branch(" Paris, a city of light."), branch(" Lyon"))
    return [Tree(question, answers), Tree(branch("A quiet river runs by old stone walls"))]


def gradients(model: Any) -> torch.Tensor:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


# --- what a quantised model needs ---------------------------------------------------------------------------------


def test_without_an_adapter_the_remedy_is_named(smol2_path: str) -> None:
    with pytest.raises(ValueError, match=r"rounded weights cannot be trained. Pass peft_config=LoraConfig"):
        adapters.for_training(four_bit(smol2_path))


def test_nothing_is_upcast_and_the_adapter_is_in_the_compute_dtype(tiny_path: str) -> None:
    model = adapted(tiny_path, lora(use_dora=True, modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]))
    kinds: dict[str, set] = {"lora": set(), "magnitude": set(), "saved": set(), "base": set()}
    for name, parameter in model.named_parameters():
        kind = next((each for each in ("magnitude", "lora") if each in name), "saved" if "to_save" in name else "base")
        kinds[kind].add((parameter.dtype, parameter.requires_grad))
    assert kinds == {
        "lora": {(torch.bfloat16, True)},
        "magnitude": {(torch.float32, True)},
        "saved": {(torch.bfloat16, True)},
        "base": {(torch.uint8, False), (torch.bfloat16, False)},
    }
    # 4-bit weights count as the weights they stand for.
    plain = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny_path).parameters())
    assert adapters.trainable(four_bit(tiny_path))[1] == plain


def test_a_float32_adapter_where_the_layers_compute_in_float32(smol2_path: str) -> None:
    model = adapted(smol2_path, config={**FOUR, "bnb_4bit_compute_dtype": "float32"})
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert adapters.compute_dtype(model) == torch.float32


def test_other_models_need_nothing(tiny_path: str) -> None:
    assert adapters.prepare_quantised(AutoModelForCausalLM.from_pretrained(tiny_path)) is False


def test_an_evaluation_does_not_cut_the_gradient(smol2_path: str) -> None:
    """bitsandbytes repacks a layer that runs without gradients on some CPUs, for a kernel without a backward pass."""
    first = adapted(smol2_path)
    expected = gradients(first.train())
    with torch.no_grad():
        first.eval()(input_ids=IDS)
    assert distance(gradients(first.train()), expected) == 0.0

    # Nor does one that came before the model was prepared; the scales are rounded once then.
    late = four_bit(smol2_path)
    torch.manual_seed(0)
    late = adapters.wrap(late, lora())
    with torch.no_grad():
        late.eval()(input_ids=IDS)
    adapters.prepare_quantised(late)
    assert distance(gradients(late.train()), expected) < 0.05


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flat_rows_equal_padded_rows_and_every_adapter_weight_learns(smol2_path: str, dtype: str) -> None:
    model = adapted(smol2_path, dtype=dtype).eval()
    attachment = attach(model)
    assert (attachment.is_flat, attachment.reason, attachment.head_reason) == (True, None, None)
    trees = forest(smol2_path)
    grads = []
    found = []
    for layout in (flat, padded):
        model.zero_grad()
        stats = score(model, layout(trees))
        stats.logp_N.sum().backward()
        found.append(stats.logp_N.detach())
        named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(named) == 28 and all(grad.abs().max() > 0 for grad in named.values())
        grads.append(torch.cat([grad.flatten().float() for grad in named.values()]))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0.1)
    assert distance(grads[0], grads[1]) < 2e-2


def test_the_log_probs_are_those_of_the_rounded_weights(smol2_path: str) -> None:
    """The same numbers as an ordinary model that holds the dequantised weights, in float32."""
    import bitsandbytes as bnb

    model = four_bit(smol2_path, {**FOUR, "bnb_4bit_compute_dtype": "float32"}, dtype="float32")
    adapters._keep_gradients(model)
    plain = AutoModelForCausalLM.from_pretrained(smol2_path)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            rounded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(rounded)
    batches = []
    for each in (model.eval(), plain.eval()):
        attach(each)
        with torch.no_grad():
            batches.append(score(each, flat(forest(smol2_path)), entropy=True))
    torch.testing.assert_close(batches[0].logp_N, batches[1].logp_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batches[0].entropy_N, batches[1].entropy_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["all-linear", "lm_head"])
def test_a_head_that_is_quantised_or_adapted(tiny_path: str, target: str) -> None:
    config = NF4 if target == "lm_head" else {**NF4, "llm_int8_skip_modules": ["nothing"]}
    targets = ["q_proj", "lm_head"] if target == "lm_head" else ["q_proj"]
    model = adapted(tiny_path, lora(target_modules=targets), config=config).eval()
    head = model.get_base_model().get_output_embeddings()
    assert plain_linear(head) is None
    attachment = attach(model)
    assert (attachment.is_flat, attachment.head_reason) == (True, None)
    batch = flat([Tree(Branch(IDS[0].tolist(), [True] * IDS.shape[1]))])
    stats = score(model, batch)
    stats.logp_N.sum().backward()
    logits = model(input_ids=IDS).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(stats.logp_N, expected, rtol=1e-2, atol=1e-2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_training_saving_loading(smol2_path: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = four_bit(smol2_path, device_map="auto")
    torch.manual_seed(0)
    model = adapters.for_training(model, lora(init_lora_weights=True, **changes))
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters() if not p.requires_grad})
    tokenizer = AutoTokenizer.from_pretrained(smol2_path)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(4), max_steps=3, per_device_train_batch_size=4)
    assert trainer.attachment.is_flat
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[2] < losses[0] - 3.0
    for name, weight in before.items():
        assert torch.equal(weight, model.get_parameter(name)), name

    trainer.save_model(str(tmp_path / "final"))
    again = load.load_causal_lm(tmp_path / "final", quantization_config=NF4, dtype="bfloat16")
    adapters.prepare_quantised(again)
    with torch.no_grad():
        ours, theirs = (each.eval()(input_ids=IDS).logits for each in (model, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


ONLINE = {
    "PPO": {},
    "OnlineDPO": {},
    "GKD": {"lmbda": 1.0, "max_new_tokens": 6, "teacher": "teacher_model"},
    "MiniLLM": {"num_generations": 2, "teacher": "teacher_model"},
    "IterativeSFT": {},
}


@pytest.mark.parametrize("method", ONLINE)
def test_methods_with_models_beside_the_policy(smol2_path: str, tmp_path: Path, method: str) -> None:
    """The adapter learns, the 4-bit weights stay, and what is saved is an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(smol2_path)
    further = dict(ONLINE[method])
    given = {further.pop("teacher"): four_bit(smol2_path)} if "teacher" in further else {}
    if method in ("PPO", "OnlineDPO"):
        given["reward_funcs"] = lambda completions, **rest: [float(len(text)) for text in completions]
    if method not in ("IterativeSFT", "GKD"):
        further["max_completion_length"] = 6
        given["train_dataset"] = [{"prompt": f"say {word}"} for word in ("red", "old", "cat", "mat")]
    if method == "GKD":
        given["train_dataset"] = chat_rows(4)
    settings = {**DEFAULTS, "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 2, **further}
    model = four_bit(smol2_path)
    args = getattr(trl, f"{method}Config")(**settings, bf16=True)
    trainer = getattr(trl, f"{method}Trainer")(
        model=model, args=args, processing_class=tokenizer, peft_config=lora(), **given
    )
    named = dict(trainer.model.named_parameters())
    before = {name: each.detach().clone() for name, each in named.items()}
    if method == "IterativeSFT":
        trainer.step(texts=["a quiet river runs", "an old red wall"])
    else:
        trainer.train()
    moved = {name for name, each in named.items() if not torch.equal(each, before[name])}
    assert all("lora_" in name or "value" in name or "v_head" in name for name in moved), sorted(moved)
    assert {name for name, each in named.items() if "lora_B.default" in name} <= moved
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_an_adapter_that_peft_loads_back_keeps_its_dtype(tiny_path: str, tmp_path: Path) -> None:
    """PEFT loads a checkpoint's adapter as float32; preparing the model again gives back what was saved, to the bit."""
    model = adapted(tiny_path, lora(target_modules=["q_proj"]))
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    adapters.prepare_quantised(model)
    for name, weight in saved.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=0, atol=0)


def test_a_model_saved_in_four_bits_trains_too(smol2_path: str, tmp_path: Path) -> None:
    four_bit(smol2_path).save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = adapters.for_training(load.load_causal_lm(tmp_path), lora())
    torch.testing.assert_close(gradients(again.train()), gradients(adapted(smol2_path).train()), rtol=0, atol=0)


def test_an_injected_adapter_on_four_bits(smol2_path: str, tmp_path: Path) -> None:
    reference = adapted(smol2_path)
    reference.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**NF4), dtype=torch.bfloat16
    )
    model = adapters.for_training(model)
    named = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(named) == 28 and all("lora_" in name for name in named)
    assert set(named.values()) == {torch.bfloat16}
    torch.testing.assert_close(gradients(model.train()), gradients(reference.train()), rtol=0, atol=0)


def test_eight_bits(smol2_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its matrix products treat outlying columns of the whole batch apart, so that rows agree to a few percent."""
    model = load.load_causal_lm(smol2_path, load_in_8bit=True, dtype="bfloat16")
    torch.manual_seed(0)
    model = adapters.for_training(model, lora(init_lora_weights=True))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    logging.getLogger("bitsandbytes").setLevel(logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(smol2_path)
    trainer = sft(tmp_path, model, tokenizer, chat_rows(4), max_steps=3, per_device_train_batch_size=4)
    assert trainer.attachment.is_flat
    trainer.train()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[2] < losses[0] - 3.0
    assert len([record for record in caplog.records if "will be cast" in record.message]) <= 1


def test_quantised_weights_are_found_inside_wrappers(smol2_path: str) -> None:
    assert adapters.is_quantised(adapted(smol2_path))
    assert not adapters.is_quantised(SimpleNamespace())


# --- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [InProcessSampler(max_rows=3), ContinuousSampler()], ids=["own", "continuous"])
def test_log_probs_of_what_is_drawn_are_the_engines(smol2_path: str, sampler: Any) -> None:
    model = adapted(smol2_path)
    attachment = attach(model)
    before = gradients(model)
    prompts = [list(tree.root.ids) for tree in forest(smol2_path)]
    requests = [Request(prompt, 3, (0, index)) for index, prompt in enumerate(prompts)]
    drawn = sample(sampler, model, requests, Sampling(max_new_tokens=8, temperature=0.8))
    for prompt, group in zip(prompts, drawn, strict=True):
        branches = tuple(Branch(each.ids, [True] * len(each.ids)) for each in group)
        with torch.no_grad():
            batch = attachment.batch([Tree(Branch(prompt, [False] * len(prompt)), branches)])
            expected = score(model, batch, temperature=0.8).logp_N.float()
        ours = torch.tensor([logp for each in group for logp in each.logps])
        # Logits of some tens, in half precision.
        torch.testing.assert_close(ours, expected, atol=0.2, rtol=0.05)
    assert distance(gradients(model), before) < 1e-6
