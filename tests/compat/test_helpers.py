"""Upstream's helpers, by values: worked out by hand, or what upstream 0.11.4, 1.12 and 1.16 give for the same input."""

import asyncio
import functools
import math
import random

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.trainer_utils import EvalPrediction

import trl
from tests.trainer.helpers import tiny, tiny_scorer
from trl import core
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    parse_response,
    supports_tool_calling,
)
from trl.compat import imports
from trl.compat.table import HELPERS, PLACES
from trl.data_utils import get_dataset_column_names, pack_examples, truncate_dataset
from trl.extras.dataset_formatting import get_formatting_func_from_dataset
from trl.extras.profiling import profiling_decorator
from trl.models import utils as of_models
from trl.trainer import utils

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
NAN = torch.nan


def equal(one, other):
    torch.testing.assert_close(one, torch.as_tensor(other, dtype=one.dtype), rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("name", "place"), [*HELPERS.items(), *PLACES.items()])
def test_the_table_names_what_is_there(name, place):
    assert hasattr(__import__(place[0], fromlist=[place[1]]), place[1])
    if isinstance(name, str):
        assert getattr(utils, name) is not None and name not in trl.__all__


def test_a_helper_is_importable_from_everywhere():
    from trl import set_seed, setup_chat_format
    from trl.models import setup_chat_format as again
    from trl.trainer.utils import pad
    from trl.trainer.utils import pad as same

    assert setup_chat_format is again and pad is same and imports.helper("pad") == ("trl.compat.helpers.tensors", "pad")
    assert set_seed.__module__.startswith("transformers")
    with pytest.raises(ImportError, match="neftune_noise_alpha in the trainer's config"):
        from trl.trainer.utils import neftune_post_forward_hook  # noqa: F401


# --- padding --------------------------------------------------------------------------------------------------------


def test_pad():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    equal(utils.pad(rows), [[1, 2, 3], [4, 5, 0]])
    equal(utils.pad(rows, 9, "left", pad_to_multiple_of=4), [[9, 1, 2, 3], [9, 9, 4, 5]])
    equal(utils.pad([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7]])]), [
        [[1, 2, 0], [3, 4, 0]], [[5, 6, 7], [0, 0, 0]],
    ])  # fmt: skip
    with pytest.raises(ValueError, match="padding_side='up' is neither 'left' nor 'right'"):
        utils.pad(rows, padding_side="up")
    with pytest.raises(ValueError, match="no tensor to pad"):
        utils.pad([])
    equal(utils.pad_to_length(X, 5, 0), [[1, 2, 3, 0, 0], [4, 5, 9, 0, 0]])
    equal(utils.pad_to_length(X, 3, 7, dim=0), [[1, 2, 3], [4, 5, 9], [7, 7, 7]])
    assert utils.pad_to_length(X, 2, 0) is X


def test_flush():
    mask, ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]), torch.tensor([[9, 9, 2, 3, 4], [9, 5, 6, 9, 9]])
    left = utils.flush_left(mask, ids, ids.float())
    equal(left[0], [[1, 1, 1], [1, 1, 0]])
    equal(left[1], [[2, 3, 4], [5, 6, 0]])
    assert left[2].dtype == torch.float32 and isinstance(left, tuple)
    right = utils.flush_right(mask, ids)
    equal(right[0], [[1, 1, 1], [0, 1, 1]])
    equal(right[1], [[2, 3, 4], [0, 5, 6]])
    equal(utils.flush_left(torch.tensor([[1, 0, 1, 0]]), torch.tensor([[7, 8, 9, 6]]))[1], [[7, 9]])
    assert utils.flush_left(torch.zeros(2, 3)).shape == utils.flush_right(torch.zeros(2, 3)).shape == (2, 0)


# --- log-probs ------------------------------------------------------------------------------------------------------


def test_selective_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    index = torch.tensor([[0, 1, 2], [3, 4, 0]])
    wanted = logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
    found = utils.selective_log_softmax(logits, index)
    torch.testing.assert_close(found, wanted)
    (one,) = torch.autograd.grad(found.sum(), logits)
    (other,) = torch.autograd.grad(wanted.sum(), logits)
    torch.testing.assert_close(one, other)
    several = utils.selective_log_softmax(logits, torch.stack([index, index.flip(-1)], -1))
    torch.testing.assert_close(several[..., 0], wanted)
    cooler = utils.selective_log_softmax(logits, index, temperature=2.0)
    torch.testing.assert_close(cooler, (logits / 2).log_softmax(-1).gather(-1, index[..., None])[..., 0])
    half = utils.selective_log_softmax(logits.bfloat16(), index)
    assert half.dtype == torch.bfloat16 and (half - wanted).abs().max() < 0.02
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    torch.testing.assert_close(utils.selective_log_softmax(logits, index, row_mask=mask), wanted * mask)
    torch.testing.assert_close(core.logprobs_from_logits(logits, index), wanted)
    torch.testing.assert_close(core.logprobs_from_logits(logits, None, gather=False), logits.log_softmax(-1))


def test_entropy():
    equal(utils.entropy_from_logits(X, chunk_size=1), [0.8324, 0.1291])
    assert utils.entropy_from_logits(torch.zeros(2, 0, 7)).shape == (2, 0)
    equal(utils.entropy_from_logits(torch.tensor([0.0, 0.0, -math.inf])), math.log(2))
    logp, entropy = utils.selective_log_softmax_and_entropy(X.requires_grad_(), torch.tensor([0, 2]), False)
    X.requires_grad_(False)
    equal(entropy, [0.8324, 0.1291])
    assert logp.requires_grad and not entropy.requires_grad


def test_dft_loss_and_log1mexp():
    from trl.trainer.sft_trainer import dft_loss

    class Output:
        logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]]))

    wanted = -(0.75 * math.log(0.75) + 0.5 * math.log(0.5))
    equal(dft_loss(Output, torch.tensor([[-100, 1, 0]])), wanted / 2)
    equal(dft_loss(Output, torch.tensor([[-100, 1, 0]]), 4), wanted / 4)
    from trl.experimental.orpo.orpo_trainer import log1mexp

    equal(log1mexp(torch.tensor([-0.1, -2.0, -1e-5])), [-2.3522, -0.1454, -11.5129])


def test_filtering():
    low = -math.inf
    equal(core.top_k_top_p_filtering(X, top_k=2), [[low, 2, 3], [low, 5, 9]])
    equal(core.top_k_top_p_filtering(X, top_p=0.9), [[low, 2, 3], [low, low, 9]])
    equal(core.top_k_top_p_filtering(X, top_p=0.1, min_tokens_to_keep=2), [[low, 2, 3], [low, 5, 9]])
    equal(core.top_k_top_p_filtering(X, top_k=1, top_p=0.5, filter_value=-9), [[-9, -9, 3], [-9, -9, 9]])
    equal(core.top_k_top_p_filtering(X, top_k=20), X)


def test_ends_of_completions():
    equal(utils.first_true_indices(torch.tensor([[False, True, True], [False, False, False]])), [1, 3])
    ids = torch.tensor([[5, 6, 2, 7, 2], [5, 5, 5, 5, 5]])
    equal(utils.truncate_response(2, 0, ids), [[5, 6, 2, 0, 0], [5, 5, 5, 5, 5]])
    cut, mask = utils.truncate_right(ids, [7, 6], 0)
    equal(cut, [[5, 6, 0, 0, 0], [5, 5, 5, 5, 5]])
    equal(mask, [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def test_bounds():
    equal(core.clip_by_value(X, 2.0, torch.full((2, 3), 4.0)), [[2, 2, 3], [4, 4, 4]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cap = utils.get_exp_cap(torch.zeros(1, dtype=dtype))
        assert cap.exp().isfinite().all() and cap.dtype == dtype
    equal(utils.get_exp_cap(X), [88.7228])
    equal(utils.cap_exp(torch.tensor([1.0, 200.0]), 2), [math.e, math.e**2])
    assert utils.cap_exp(torch.tensor([200.0])).isfinite()


# --- statistics -----------------------------------------------------------------------------------------------------


def test_nan_statistics():
    some = torch.tensor([1.0, NAN, 3.0, 4.0])
    equal(utils.nanstd(some), 1.5275)
    equal(utils.nanmin(some), 1)
    equal(utils.nanmax(some), 4)
    table = torch.tensor([[1.0, NAN], [2.0, 4.0]])
    equal(utils.nanstd(table, dim=0), [0.7071, NAN])
    equal(utils.nanstd(table, dim=1, keepdim=True), [[NAN], [1.4142]])
    equal(utils.nanstd(table, dim=(0, 1)), 1.5275)
    for none in (torch.tensor([NAN]), torch.tensor([])):
        assert utils.nanmin(none).isnan() and utils.nanmax(none).isnan() and utils.nanstd(none).isnan()


def test_masked_statistics():
    equal(core.masked_mean(X, MASK), 4.2)
    equal(core.masked_mean(X, MASK, axis=1), [1.5, 6.0])
    equal(core.masked_mean(X, MASK, axis=0), [2.5, 3.5, 9.0])
    equal(core.masked_var(X, MASK), 9.7)
    equal(core.masked_var(X, MASK, unbiased=False), 7.76)
    with pytest.raises(ValueError, match="the mask leaves 1 values, too few for a variance: give at least 2"):
        core.masked_var(X, torch.tensor([[1, 0, 0], [0, 0, 0]]))
    equal(core.masked_whiten(X, MASK), [[-1.0275, -0.7064, -0.3853], [-0.0642, 0.2569, 1.5412]])
    equal(core.masked_whiten(X, MASK, shift_mean=False)[0], [3.1725, 3.4936, 3.8147])
    equal(core.whiten(X), [[-1.0607, -0.7071, -0.3536], [0.0, 0.3536, 1.7678]])
    equal(core.whiten(X, shift_mean=False)[0], [2.9393, 3.2929, 3.6464])


def test_running_moments():
    class Accelerator:
        use_distributed = True

        @staticmethod
        def reduce(values):
            return values

    for accelerator in (None, Accelerator):
        moments = utils.RunningMoments(accelerator)
        assert moments.update(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2, 1))
        assert moments.update(torch.tensor([5.0, 6.0])) == pytest.approx((5.5, 0.70711), abs=1e-5)
        assert (moments.mean, moments.var, moments.count) == pytest.approx((3.4, 3.44, 5))
        assert moments.std == pytest.approx(2.07364, abs=1e-5)
    mean, variance, count = utils.get_global_statistics(Accelerator, X, MASK)
    assert (mean.item(), variance.item(), count) == pytest.approx((4.2, 7.76, 5))


def test_length_sampler():
    random.seed(0)
    draw = core.LengthSampler(2, 5)
    assert {draw() for _ in range(100)} == {2, 3, 4}
    with pytest.raises(ValueError, match="no length lies from 4 up to 4"):
        core.LengthSampler(4, 4)


# --- dictionaries ---------------------------------------------------------------------------------------------------


def test_split_and_shuffle():
    given = {"x": torch.arange(14).reshape(7, 2), "none": None, "scalar": torch.tensor(3.0)}
    parts = utils.split_tensor_dict(given, 3)
    assert [part["x"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert all(part["none"] is None and part["scalar"] == 3 for part in parts)
    with pytest.raises(ValueError, match="no tensor with rows"):
        utils.split_tensor_dict({"none": None}, 2)
    torch.manual_seed(0)
    found = utils.shuffle_sequence_dict({"x": torch.arange(6).reshape(3, 2), "y": ["a", "b", "c"], "none": None})
    assert found["x"].tolist() == [[4, 5], [0, 1], [2, 3]] and found["y"] == ["c", "a", "b"] and found["none"] is None


def test_records():
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3, "f": {}}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    stacked = core.stack_dicts([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([4.0])}])
    equal(stacked["a"], [[1, 2], [4, -1]])
    assert core.convert_to_scalar({"a": torch.tensor(1.5), "b": 3, "c": X}) == {"a": 1.5, "b": 3, "c": X}
    arrays = core.stats_to_np({"a": torch.tensor(1.5), "b": torch.tensor([1.0]).bfloat16(), "c": 3, "d": "x"})
    assert isinstance(arrays["a"], float) and arrays["b"].dtype == numpy.float32 and arrays["d"] == "x"
    nested = [{"a": {"aa": None, "ab": 1}, "b": [None, {"c": None}]}]
    assert utils.remove_none_values(nested) == [{"a": {"ab": 1}, "b": [None, {}]}]
    with pytest.raises(TypeError, match="int is neither a list nor a mapping"):
        utils.remove_none_values(3)
    assert utils.exact_div(6, 3) == 2 and utils.identity("x") == "x"
    with pytest.raises(ValueError, match="sizes, 7 / 3 = 2.3333333333333335 is inexact"):
        utils.exact_div(7, 3, "sizes")


def test_words_and_callables():
    from trl.env_utils import strtobool

    assert strtobool("Yes") and not strtobool("off")
    with pytest.raises(ValueError, match="'maybe' means neither yes nor no"):
        strtobool("maybe")

    class Judge:
        async def __call__(self, completions):
            return [1.0 for _ in completions]

    def plain():
        return None

    assert utils.get_callable_name(functools.partial(plain)) == "plain" and utils.get_callable_name(Judge()) == "Judge"
    assert utils.is_async_callable(functools.partial(Judge())) and not utils.is_async_callable(plain)
    assert asyncio.run(Judge()(["a"])) == [1.0]


def test_accuracy(capsys):
    pairs = EvalPrediction(numpy.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), numpy.array([0, 0, 0]))
    assert utils.compute_accuracy(pairs) == {"accuracy": 0.5}
    assert "1 of 3 pairs have equal scores" in capsys.readouterr().out
    scores = numpy.array([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 2.0], [1.0, 2.0]]])
    steps = EvalPrediction(scores, numpy.array([[0, -100], [1, 1]]))
    assert utils.compute_accuracy(steps) == {"accuracy": pytest.approx(2 / 3)}


def test_table_of_completions(capsys):
    message = {"role": "assistant", "content": "bonjour"}
    utils.print_prompt_completions_sample(
        ["The sky", [{"role": "user", "content": "hi"}]], [" blue", [message]], {"Right": [0.126, None]}, [0.98, -1], 42
    )
    said = capsys.readouterr().out
    for part in ("Step 42", "Prompt", "Right", "Advantage", "The sky", "bonjour", "0.13", "-1.00"):
        assert part in said
    utils.print_prompt_completions_sample(["a"], ["b"], {}, None, 1, num_samples=0)
    assert capsys.readouterr().out == ""


# --- rows -----------------------------------------------------------------------------------------------------------


def test_repeat_sampler():
    plain = utils.RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=False)
    assert list(plain) == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 3, 3, 4, 4, 5, 5]
    assert len(plain) == 24
    seeded = utils.RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=42)
    assert list(seeded) == [1, 1, 6, 6, 3, 3, 1, 1, 6, 6, 3, 3, 5, 5, 4, 4, 0, 0, 5, 5, 4, 4, 0, 0]
    again = utils.RepeatSampler(range(4), 1, seed=1)
    assert [list(again), list(again)] == [[1, 3, 2, 0], [0, 2, 3, 1]]
    stream = Dataset.from_dict({"row": range(7)}).to_iterable_dataset()
    repeated = utils.repeat_iterable_dataset(stream, 2, batch_size=3, repeat_count=2)
    assert [each["row"] for each in repeated] == list(plain)


def test_truncate_and_pack():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]], "name": ["aaa", "b", "c"]})
    assert truncate_dataset(rows, 2)[:] == {"input_ids": [[1, 2], [4, 5], [8]], "name": ["aaa", "b", "c"]}
    assert truncate_dataset(DatasetDict({"train": rows}), 1)["train"]["input_ids"][1] == [4]
    assert [row["input_ids"] for row in truncate_dataset(rows.to_iterable_dataset(), 2)] == [[1, 2], [4, 5], [8]]
    assert get_dataset_column_names(rows.to_iterable_dataset()) == ["input_ids", "name"]
    packed = pack_examples({"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]]}, 5)
    assert packed == {"input_ids": [[1, 2, 3, 4, 5], [6, 7, 8]]}
    assert trl.trainer.utils.common_prefix_length([1, 2, 3], [1, 2, 4]) == 2


def test_constant_length_dataset():
    class Words:
        eos_token_id = 0

        def __call__(self, texts, **options):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    rows = Dataset.from_list([{"text": "a bb ccc"}, {"text": "dddd e ff ggg"}, {"text": "hhhhh i"}])
    made = utils.ConstantLengthDataset(
        Words(), rows, dataset_text_field="text", seq_length=4, shuffle=False, num_of_sequences=1
    )
    assert [row["input_ids"].tolist() for row in made] == [[1, 2, 3, 0], [4, 1, 2, 3], [0, 5, 1, 0]]
    endless = iter(utils.ConstantLengthDataset(Words(), rows, "text", infinite=True, seq_length=4, num_of_sequences=1))
    assert len([next(endless) for _ in range(9)]) == 9
    with pytest.raises(ValueError, match="give dataset_text_field"):
        utils.ConstantLengthDataset(Words(), rows)


def test_formatting_functions():
    class Template:
        def apply_chat_template(self, messages, tokenize=False):
            return " ".join(f"{message['role']}:{message['content']}" for message in messages)

    turn = [{"role": "user", "content": "x"}]
    chats = Dataset.from_list([{"messages": turn}])
    made = get_formatting_func_from_dataset(chats, Template())
    assert made({"messages": turn}) == "user:x" and made({"messages": [turn, turn]}) == ["user:x"] * 2
    pairs = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    made = get_formatting_func_from_dataset(pairs, Template())
    assert made(pairs[0]) == "user:a assistant:b" and made(pairs[:]) == ["user:a assistant:b"]
    assert get_formatting_func_from_dataset(Dataset.from_list([{"text": "a"}]), Template()) is None


def test_special_tokens():
    rows = [{"prompt_input_ids": ids, "prompt_attention_mask": [1] * len(ids)} for ids in ([5, 6], [1, 6], [])]
    found = utils.add_bos_token_if_needed(1, 2, rows[0], 2, rows[1], 0, rows[2])
    assert [each["prompt_input_ids"] for each in found] == [[1, 5, 6], [1, 6], [1]]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([5, 6], [5, 2])]
    assert [each["input_ids"] for each in utils.add_eos_token_if_needed(2, *rows)] == [[5, 6, 2], [5, 2]]


# --- collators ------------------------------------------------------------------------------------------------------


def test_collator_of_dpo():
    rows = [
        {"prompt_input_ids": [1, 2], "chosen_input_ids": [3], "chosen_labels": [3], "ref_chosen_logps": 1.0, "x": "a"},
        {
            "prompt_input_ids": [1],
            "chosen_input_ids": [3, 4],
            "chosen_labels": [3, 4],
            "ref_chosen_logps": 2.0,
            "x": "b",
        },  # fmt: skip
    ]
    batch = utils.DPODataCollatorWithPadding(pad_token_id=9)(rows)
    equal(batch["prompt_input_ids"], [[1, 2], [9, 1]])
    equal(batch["chosen_input_ids"], [[3, 9], [3, 4]])
    equal(batch["chosen_labels"], [[3, -100], [3, 4]])
    equal(batch["ref_chosen_logps"], [1, 2])
    assert batch["x"] == ["a", "b"]


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


@pytest.fixture
def with_template(tokenizer):
    own = tokenizer.chat_template

    def set_template(template):
        tokenizer.chat_template = template
        return tokenizer

    yield set_template
    tokenizer.chat_template = own
    if hasattr(tokenizer, "response_template"):
        tokenizer.response_template = None


def test_collators_that_tokenise(tokenizer):
    pairs = [
        {
            "input_ids_chosen": [1, 2, 3][:size],
            "attention_mask_chosen": [1] * size,
            "input_ids_rejected": [4],
            "attention_mask_rejected": [1],
            "margin": size,
        }
        for size in (2, 3)
    ]
    batch = utils.RewardDataCollatorWithPadding(tokenizer)(pairs)
    assert batch["input_ids_chosen"].shape == (2, 3) and batch["margin"].tolist() == [2, 3] and batch["return_loss"]
    with pytest.raises(ValueError, match="the rows have no `input_ids_chosen`"):
        utils.RewardDataCollatorWithPadding(tokenizer)([{"chosen": "a"}])
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yo yo"}]}
        for text in ("hi", "hi there")
    ]
    batch = utils.DataCollatorForChatML(tokenizer)(chats)
    trained = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert trained == ["yo yo<|im_end|>\n"] * 2
    assert tokenizer.decode(batch["prompts"][0][batch["prompt_attention_mask"][0] == 1]).endswith("assistant\n")
    assert utils.DataCollatorForChatML(tokenizer, max_length=8)(chats)["input_ids"].shape == (2, 8)
    padded = torch.tensor([[tokenizer.pad_token_id, *tokenizer("hello")["input_ids"]]])
    assert utils.decode_and_strip_padding(padded, tokenizer) == ["hello"]


# --- templates ------------------------------------------------------------------------------------------------------

TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_templates_can_do(with_template, tokenizer):
    assert is_chat_template_prefix_preserving(tokenizer) and not supports_tool_calling(tokenizer)
    assert not has_generation_markers(tokenizer.chat_template)
    assert has_generation_markers("{%- generation -%}") and has_generation_markers({"default": "{% generation %}"})
    with_template(TOOLS)
    assert is_chat_template_prefix_preserving(tokenizer) and supports_tool_calling(tokenizer)
    with_template(REWRITES)
    assert not is_chat_template_prefix_preserving(tokenizer)
    with pytest.raises(ValueError, match="writes earlier turns in another way once others follow"):
        get_training_chat_template(tokenizer)


@pytest.mark.parametrize("template", [None, TOOLS], ids=["its own", "with tools"])
def test_training_template(with_template, tokenizer, template):
    template = template or tokenizer.chat_template
    with_template(template)
    assert not is_chat_template_stop_token_trained(tokenizer)
    marked = get_training_chat_template(tokenizer)
    talk = [{"role": role, "content": text} for role, text in
            (("user", "Hi"), ("assistant", "Yes. "), ("user", "And"), ("assistant", "No"))]  # fmt: skip
    plain = [tokenizer.apply_chat_template(talk[:end], tokenize=False, add_generation_prompt=end % 2) for end in (1, 4)]
    with_template(marked)
    assert plain == [
        tokenizer.apply_chat_template(talk[:end], tokenize=False, add_generation_prompt=end % 2) for end in (1, 4)
    ]
    found = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    trained = [one for one, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "Yes. <|im_end|>No<|im_end|>"
    assert is_chat_template_stop_token_trained(tokenizer) and get_training_chat_template(tokenizer) is None


def test_tool_calls(with_template, tokenizer):
    with pytest.raises(ValueError, match="writes no tool call as JSON between two tags"):
        add_response_schema(tokenizer)
    assert add_response_schema(with_template(TOOLS)) is tokenizer
    text = '<think>\nhm\n</think>\n\nhello\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    message = parse_response(tokenizer, tokenizer(text)["input_ids"])
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert message["content"].strip() == "hello" and "hm" in message["reasoning_content"]
    broken = parse_response(tokenizer, tokenizer('<tool_call>{"x"<|im_end|>')["input_ids"])
    assert broken == {"role": "assistant", "content": '<tool_call>{"x"'}


def test_setup_chat_format(small_path):
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    model = tiny(tokenizer)
    with pytest.raises(ValueError, match="has a chat template already"):
        trl.setup_chat_format(model, tokenizer)
    tokenizer.chat_template = None
    model, tokenizer = trl.setup_chat_format(model, tokenizer, resize_to_multiple_of=64)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    talk = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = utils.SIMPLE_CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == "User: Hi\n\nAssistant:"


# --- models ---------------------------------------------------------------------------------------------------------


def test_use_adapter(tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(tokenizer), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    ids = torch.tensor([[1, 2, 3]])
    trains = [parameter.requires_grad for parameter in model.parameters()]
    own = model(ids).logits
    with utils.use_adapter(model, "other"):
        assert model.active_adapter == "other" and not torch.equal(model(ids).logits, own)
    with utils.use_adapter(model, None):
        bare = model(ids).logits
    assert torch.equal(bare, model.unload()(ids).logits) and not torch.equal(bare, own)
    model = peft.get_peft_model(tiny(tokenizer), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with utils.use_adapter(model, "other"):
        pass
    assert model.active_adapter == "default" and [p.requires_grad for p in model.parameters()] == trains


def test_hash_module():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    first = utils.hash_module(one)
    assert first == utils.hash_module(other) and len(first) == 64
    assert utils.hash_module(other.bfloat16()) != first
    one.bias.data[0] += 1e-6
    assert utils.hash_module(one) != first


def test_flops():
    sizes = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 100},
    }
    config = LlamaConfig(**sizes)
    assert [utils.compute_flops_per_token(config, length) for length in (0, 1, 1024)] == [480768, 482304, 2053632]
    assert utils.compute_flops_per_token(Qwen3Config(**sizes, head_dim=32), 128) == 1021440
    experts = {"moe_intermediate_size": 32, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
    mixed = [Qwen3MoeConfig(**sizes, **experts, decoder_sparse_step=step) for step in (1, 2)]
    assert [utils.compute_flops_per_token(each, 0) for each in mixed] == [486912, 557568]
    assert utils.compute_mfu(10**9, 1e4, 8, 1e12) == pytest.approx(125)
    assert utils.adjusted_mfu(40.0, config, 1024) == pytest.approx(24.682124, abs=1e-5)
    assert utils.get_peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert utils.get_peak_flops("NVIDIA H100 PCIe", "float16") == 756e12
    assert utils.get_peak_flops("a toaster", "bfloat16") is None


def test_modes_of_a_model(tokenizer):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    utils.disable_dropout_in_model(model)
    assert model[1].p == 0
    model = tiny(tokenizer)
    of_models.enable_gradient_checkpointing(model, {"use_reentrant": False})
    assert model.is_gradient_checkpointing
    with of_models.disable_gradient_checkpointing(model, {"use_reentrant": False}):
        assert not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing

    class Accelerator:
        @staticmethod
        def unwrap_model(model):
            return model

    before = model.generation_config.top_p
    with of_models.unwrap_model_for_generation(model, Accelerator, generation_kwargs={"top_p": 0.5}) as inner:
        assert inner is model and not model.is_gradient_checkpointing and model.generation_config.top_p == 0.5
    assert model.is_gradient_checkpointing and model.generation_config.top_p == before
    assert utils.get_kbit_device_map() == ({"": 0} if torch.cuda.is_available() else None)
    utils.empty_cache()
    ids, gradients = torch.tensor([[1, 2, 3, 4]]), []
    offload = of_models.get_act_offloading_ctx_manager(model, use_streams=False)
    for context in (offload, offload):
        with context:
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    assert torch.equal(*gradients)


def test_create_model_from_path(tiny_path):
    model = utils.create_model_from_path(tiny_path, dtype="float32")
    assert type(model).__name__ == "LlamaForCausalLM" and utils.get_config_model_id(model.config) == tiny_path
    assert isinstance(utils.create_model_from_path(tiny_path, AutoModelForCausalLM), type(model))


def test_calls_that_read_padding(tokenizer):
    scorer = tiny_scorer(tokenizer).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 0], [3, 4, 5, 6, 7, 8, 9]])
    scores, reward, last = utils.get_reward(scorer, ids, 0, 4)
    assert scores.shape == (2, 7, 1) and last.tolist() == [5, 6]
    alone = scorer.model(torch.tensor([[5, 6, 7, 8]])).last_hidden_state
    torch.testing.assert_close(reward[0], scorer.score(alone)[0, -1, 0], rtol=0, atol=1e-5)

    model = tiny(tokenizer).eval()
    greedy = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    queries = torch.tensor([[3, 4], [0, 5]])
    both, logits = utils.batch_generation(model, queries, 1, 0, greedy)
    assert both.shape == (2, 5) and torch.equal(both[:, :2], queries)
    torch.testing.assert_close(logits.argmax(-1), both[:, 2:])
    found = utils.forward(model, both, 0).logits[:, 1:-1]
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)

    torch.manual_seed(0)
    answer = core.respond_to_batch(model, queries, txt_len=4, top_k=1)
    assert answer.shape == (2, 4)
    torch.testing.assert_close(answer[0, 0], model(queries).logits[0, -1].argmax())
    wrapped = trl.AutoModelForCausalLMWithValueHead(model)
    assert torch.equal(core.respond_to_batch(wrapped, queries, txt_len=4, top_k=1), answer)
    assert isinstance(wrapped, trl.PreTrainedModelWrapper)


def test_peft_helpers(tokenizer):
    peft = pytest.importorskip("peft")

    class Arguments:
        gradient_checkpointing = True
        gradient_checkpointing_kwargs = {"use_reentrant": False}  # noqa: RUF012

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = of_models.prepare_peft_model(tiny(tokenizer), config, Arguments)
    assert model.get_base_model().is_gradient_checkpointing and hasattr(model, "peft_config")
    utils.peft_module_casting_to_bf16(model)
    dtypes = {name.split(".")[-2 if "lora" not in name else -3]: each.dtype for name, each in model.named_parameters()}
    assert dtypes["lora_A"] == dtypes["embed_tokens"] == torch.bfloat16 and dtypes["norm"] == torch.float32


# --- the rest -------------------------------------------------------------------------------------------------------


def test_packages():
    from trl.import_utils import is_liger_kernel_available, is_peft_available, is_transformers_greater_than

    assert is_transformers_greater_than("5.0") and not is_transformers_greater_than("99")
    assert is_peft_available() in (True, False) and is_liger_kernel_available("0.1") in (True, False)
    assert imports.helper("is_rich_available") == ("trl.compat.helpers.packages", "is_rich_available")
    assert utils.is_rich_available() and utils.is_rich_available("1.0") and not utils.is_rich_available("9999")
    with pytest.raises(ImportError, match="is_nothing_available"):
        from trl.import_utils import is_nothing_available  # noqa: F401


def test_profiling():
    class Trainer:
        @profiling_decorator
        def step(self, by):
            return by + 1

    with torch.profiler.profile() as profile:
        assert Trainer().step(1) == 2
    assert any(event.key == "Trainer.step" for event in profile.key_averages())


def test_older_words_of_functions(capsys):
    ids = torch.tensor([[5, 2, 7]])
    equal(utils.truncate_right(ids, stop_token_id=2, pad_token_id=0)[0], [[5, 2, 0]])
    assert "`stop_token_id` of truncate_right is `stop_token_ids` today" in capsys.readouterr().out
    with pytest.raises(ValueError, match="truncate_right: `stop_token_id` and `stop_token_ids` are the same argument"):
        utils.truncate_right(ids, stop_token_id=2, stop_token_ids=2, pad_token_id=0)
    assert trl.get_peft_config(model_config=trl.ModelConfig()) is None
    assert trl.get_quantization_config(model_args=trl.ModelConfig()) is None


def test_classes_of_older_releases(capsys):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
    from trl.experimental.grpo_with_replay_buffer import GRPOWithReplayBufferConfig
    from trl.trainer.callbacks import RichProgressCallback
    from trl.trainer.ppov2_trainer import PPOv2Config, PPOv2Trainer

    quiet = {"report_to": "none", "use_cpu": True}
    assert (GMPOConfig("out", **quiet).loss_type, GMPOConfig("out", **quiet).epsilon) == ("gmpo", 0.4)
    assert GRPOWithReplayBufferConfig("out", **quiet).replay_buffer_size == 64
    assert GMPOTrainer is trl.GRPOTrainer and (PPOv2Config, PPOv2Trainer) == (trl.PPOConfig, trl.PPOTrainer)
    older = trl.SftScriptArguments("x", dataset_text_field="text", packing=True)
    assert (older.dataset_name, older.max_seq_length, older.packing) == ("x", 512, True)
    assert (trl.DpoScriptArguments().beta, trl.SFTScriptArguments) == (0.1, trl.ScriptArguments)
    assert RichProgressCallback is trl.RichProgressCallback
