"""LoRA layers in one function: the numbers of PEFT, forward and backward; its own forward where they are not plain."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import trl
from trl.engine import lora
from trl.engine.linear import few_rows, half_products
from trl.models.offload import _policy
from trl.plan import Run
from trl.plan.trace import _fake_model, micro_batch


class Pair(nn.Module):
    """Two layers in turn, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **settings: Any) -> tuple[Any, Any]:
    """A model with an adapter as PEFT has it, and the same with our function."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["up", "down"], "init_lora_weights": False, **settings}
    base = base or Pair()
    if dtype != torch.float32:
        base.to(dtype)
    plain = peft.get_peft_model(base, peft.LoraConfig(**settings))
    ours = copy.deepcopy(plain)
    lora.attach(ours)
    return plain, ours


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that our function computed."""
    found: list[int] = []
    product = lora._product
    monkeypatch.setattr(lora, "_product", lambda *args: (found.append(1), product(*args))[1])
    return found


def results(model: Any, x: Tensor, seed: int = 0, run: Any = None) -> dict[str, Tensor]:
    """Outputs and all gradients, those of x among them where it takes one."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    out = (model if run is None else run)(x)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    (out * weight).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"out": out.detach(), **found, **({"x": x.grad} if x.requires_grad else {})}


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], distance: float = 1e-5) -> None:
    assert list(ours) == list(theirs)
    for name, own in ours.items():
        other = theirs[name]
        assert own.dtype == other.dtype and own.shape == other.shape, name
        assert (own - other).double().norm() <= distance * other.double().norm() + 1e-12, name


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (24,), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("wants", [True, False], ids=["gradient of x", "no gradient of x"])
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...], wants: bool, calls: list[int]) -> None:
    plain, ours = adapted()
    x = torch.randn(shape).requires_grad_(wants)
    check_equal(results(ours, x), results(plain, x))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"up": 7}, "alpha_pattern": {"down": 3}},
        {"lora_dropout": 0.3},
        {"target_modules": ["up"]},
        {"modules_to_save": ["down"], "target_modules": ["up"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_of_the_adapter(settings: dict[str, Any], calls: list[int]) -> None:
    plain, ours = adapted(**settings)
    x = torch.randn(3, 50, 24).requires_grad_()
    for training in (True, False):
        plain.train(training)
        ours.train(training)
        check_equal(results(ours, x), results(plain, x))
    assert calls


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_half_of_an_adapter_is_frozen(name: str, calls: list[int]) -> None:
    plain, ours = adapted()
    for model in (plain, ours):
        for key, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad and name not in key)
    for wants in (True, False):
        x = torch.randn(5, 24).requires_grad_(wants)
        check_equal(results(ours, x), results(plain, x))
    assert len(calls) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", ["bfloat16", "float16", "bfloat16 adapter", "autocast", "autocast over bfloat16"])
def test_half_precision_is_as_near_to_the_exact_numbers_as_peft(case: str, dropout: float, calls: list[int]) -> None:
    """Against float64, with the same entries dropped: rounding may differ, its size may not."""
    dtype = torch.float32 if case == "autocast" else torch.float16 if case == "float16" else torch.bfloat16
    plain, ours = adapted(dtype, lora_dropout=dropout)
    if case == "bfloat16 adapter":
        for model in (plain, ours):
            model.to(torch.bfloat16)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(3, 50, 24).to(dtype).requires_grad_()
    truth = results(exact, x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
        found, theirs = results(ours, x), results(plain, x)
    assert len(calls) == 2
    for name, own in found.items():
        assert own.dtype == theirs[name].dtype and own.shape == theirs[name].shape
        distances = [
            ((each[name].double() - truth[name]).norm() / truth[name].norm()).item() for each in (found, theirs)
        ]
        assert distances[0] <= max(1.5 * distances[1], 2 * torch.finfo(torch.bfloat16).eps), (name, distances)


def test_half_precision_on_a_processor_without_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.engine.linear._has_half_products", lambda: False)
    plain, ours = adapted(torch.bfloat16)
    x = torch.randn(9, 24).bfloat16().requires_grad_()
    with half_products(torch.device("cpu"), half=True):
        found = results(ours, x)
    check_equal(found, results(plain, x), 2e-2)


@pytest.mark.parametrize("way", ["reentrant", "recomputed", "selective"])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_checkpointing(way: str, precision: str, calls: list[int]) -> None:
    plain, ours = adapted(lora_dropout=0.2)
    x = torch.randn(3, 5, 24).requires_grad_()
    further: dict[str, Any] = {}
    if way == "selective":
        further["context_fn"] = lambda: create_selective_checkpoint_contexts(_policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected = results(ours, x)
        assert len(calls) == 2
        found = results(ours, x, run=lambda x: checkpoint(ours, x, use_reentrant=way == "reentrant", **further))
        assert len(calls) == 6
        check_equal(found, expected)
        check_equal(found, results(plain, x), 1e-5 if precision == "float32" else 2e-2)


def saved(model: Any, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights aside."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("case", ["float32", "dropout", "bfloat16", "bfloat16, dropout", "autocast"])
def test_fewer_bytes_are_kept(case: str) -> None:
    plain, ours = adapted(
        torch.bfloat16 if "bfloat16" in case else torch.float32, lora_dropout=0.1 if "dropout" in case else 0.0
    )
    x = torch.randn(64, 24).to(plain.base_model.model.up.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        own, other = saved(ours, x), saved(plain, x)
    # What both keep: that of tanh, twice in half precision as its input of the second layer, and x A'.
    size = x.element_size()
    entries = 64 * (24 + 40)
    if case == "float32":
        assert own == size * (entries + 2 * 64 * 4) <= other
    elif case == "dropout":
        assert own == size * (entries + 2 * 64 * 4) + entries < 0.6 * other
    elif case == "bfloat16":
        assert own == size * (entries + 2 * 64 * 4) < 0.4 * other
    elif case == "bfloat16, dropout":
        assert own == size * (entries + 2 * 64 * 4) + entries < 0.4 * other
    else:
        assert own < other - 2 * (24 * 40 + 40 * 16)  # PEFT keeps copies of the weights


# --- where PEFT's own forward runs ----------------------------------------------------------------------------------


class Packed(nn.Linear):
    """A stand-in for a quantised layer."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


class Quantised(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Packed(24, 40), Packed(40, 16, bias=False)


def own_forward(model: Any) -> None:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.forward = lambda x, base=layer.base_layer: 2 * nn.functional.linear(x, base.weight, base.bias)


def each_layer(model: Any) -> Iterator[Any]:
    yield from (model.base_model.model.up, model.base_model.model.down)


def hooked(model: Any) -> None:
    for layer in each_layer(model):
        layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: 3 * output)


def in_bfloat16(model: Any) -> None:
    for layer in each_layer(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()


def sharded(model: Any) -> None:
    for layer in each_layer(model):
        layer.base_layer.weight.ds_id = 1  # as ZeRO-3 marks it


def second_adapter(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


CHANGES = {
    "merged": lambda model: model.merge_adapter(),
    "two adapters": second_adapter,
    "base trains": lambda model: [layer.base_layer.weight.requires_grad_() for layer in each_layer(model)],
    "own forward": own_forward,
    "hooks": hooked,
    "other dtype": in_bfloat16,
    "sharded": sharded,
    "scale of a tensor": lambda model: [
        layer.scaling.update(default=torch.tensor(2.0)) for layer in each_layer(model)
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_keeps_the_forward_of_peft(change: str, calls: list[int]) -> None:
    plain, ours = adapted()
    for model in (plain, ours):
        CHANGES[change](model)
    x = torch.randn(5, 24).requires_grad_()
    if change == "merged":
        assert torch.equal(ours(x), plain(x))
    else:
        check_equal(results(ours, x), results(plain, x), 0.0)
    assert not calls


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}], ids=str)
def test_other_variants_keep_the_forward_of_peft(settings: dict[str, Any], calls: list[int]) -> None:
    plain, ours = adapted(**settings)
    x = torch.randn(5, 24).requires_grad_()
    check_equal(results(ours, x), results(plain, x), 0.0)
    assert not calls


def test_quantised_layers_keep_the_forward_of_peft(calls: list[int]) -> None:
    plain, ours = adapted(base=Quantised())
    x = torch.randn(5, 24).requires_grad_()
    check_equal(results(ours, x), results(plain, x), 0.0)
    assert not calls


def test_the_adapter_is_switched_off_and_on(calls: list[int]) -> None:
    plain, ours = adapted()
    x = torch.randn(5, 24)
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(x), plain.get_base_model().down.base_layer(
            torch.tanh(plain.get_base_model().up.base_layer(x))))  # fmt: skip
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    assert torch.equal(ours(x).detach(), ours(x))  # with gradients as without: ratios start at 1


def test_rows_of_different_adapters(calls: list[int]) -> None:
    plain, ours = adapted()
    for model in (plain, ours):
        model.eval()
    names = ["default", "__base__", "default"]
    x = torch.randn(3, 24)
    found = [model.base_model.model.up(x, adapter_names=names) for model in (ours, plain)]
    assert torch.equal(*found) and not calls


def test_one_of_two_adapters_is_active(calls: list[int]) -> None:
    plain, ours = adapted()
    for model in (plain, ours):
        second_adapter(model)
        model.set_adapter("second")
    x = torch.randn(5, 24).requires_grad_()
    check_equal(results(ours, x), results(plain, x))
    assert len(calls) == 2


def test_few_rows_have_the_products_of_decoding(calls: list[int]) -> None:
    plain, ours = adapted()
    x = torch.randn(4, 24)
    with torch.no_grad(), few_rows(ours), few_rows(plain):
        assert torch.equal(ours(x), plain(x))
    assert not calls


def test_a_compiled_model_has_no_function_of_ours(calls: list[int]) -> None:
    plain, ours = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(5, 24).requires_grad_()
    check_equal(results(ours, x, run=compiled), results(plain, x))
    assert not calls


def test_transforms_of_functions_see_the_forward_of_peft(calls: list[int]) -> None:
    plain, ours = adapted()
    x = torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(plain)(x))
    assert not calls


# --- the model as it is ---------------------------------------------------------------------------------------------


def test_copies_and_files_are_those_of_peft(tmp_path: Any, calls: list[int]) -> None:
    plain, ours = adapted()
    x = torch.randn(5, 24)
    expected = ours(x)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not twin(x).any() and torch.equal(ours(x), expected)
    assert list(ours.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected, rtol=1e-5, atol=1e-6)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Pair(), tmp_path)
    lora.attach(again)
    again.get_base_model().load_state_dict(ours.get_base_model().state_dict())
    assert torch.equal(again(x), expected)
    lora.attach(ours)  # once more changes nothing
    assert torch.equal(ours(x), expected)
    merged = copy.deepcopy(ours).merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    lora.detach(ours)
    assert all("forward" not in vars(each) for each in ours.modules())
    calls.clear()
    assert torch.equal(ours(x), plain(x)) and not calls


def test_tensors_without_values(calls: list[int]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ours = _fake_model(adapted(lora_dropout=0.1)[1], mode)
    with mode:
        x = torch.randn(3, 5, 24, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = results(ours, x)
    assert found["out"].shape == (3, 5, 16) and found["x"].shape == x.shape
    assert len(calls) == 2


SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("bits", [0, 4])
def test_the_plan_counts_the_same_function(bits: int, calls: list[int]) -> None:
    """Not over quantised weights, where PEFT's forward runs."""
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    micro_batch(Run(SMALL, "sft", adapter=adapter, bits=bits, prompt=10, completion=20, checkpointing=False), 1)
    assert len(calls) == (0 if bits else 3 * 7)  # of a model of one layer, and one of two


# --- a step of training ---------------------------------------------------------------------------------------------

TICKETS = [
    {"prompt": "Anna wants 2 soup.", "chosen": '{"item": "soup"}', "rejected": "Here you are: one pizza."},
    {"prompt": "Ben wants 3 tacos, please.", "chosen": '{"item": "taco"}', "rejected": "No."},
]


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_loss_and_gradients_of_peft(
    method: str, checkpointing: bool, tiny_path: str, tmp_path: Any, calls: list[int]
) -> None:
    def trained(ours: bool) -> tuple[float, dict[str, Tensor]]:
        kind, config = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[method]
        args = config(
            output_dir=str(tmp_path / str(ours)), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            gradient_checkpointing=checkpointing, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
        )  # fmt: skip
        rows = TICKETS if method == "dpo" else [
            {"prompt": row["prompt"], "completion": row["chosen"]} for row in TICKETS
        ]  # fmt: skip
        torch.manual_seed(0)
        trainer = kind(
            AutoModelForCausalLM.from_pretrained(tiny_path), args=args, train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny_path),
            peft_config=peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        if not ours:
            lora.detach(trainer.model)
        calls.clear()
        trainer.train()
        assert bool(calls) == ours
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return losses[-1], {name: each.detach().clone() for name, each in trainer.model.named_parameters()}

    loss, weights = trained(True)
    expected, others = trained(False)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        # Adam's first steps go by the sign of a gradient: equal weights have equal gradients.
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5, msg=name)
