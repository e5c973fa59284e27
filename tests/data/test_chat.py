"""Which tokens of a conversation are trained: golden tables for templates of every manner, and the odd cases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, byte_tokenizer, system, user, word_tokenizer
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.chat import ChatTemplate, chat_template, render
from trl.data.tokenizing.sequences import prepare_sequences
from trl.data.tokenizing.spans import AssistantSpans, assistant_spans, mask_tokens, trims_offsets

TALK = [user("hello"), assistant("good day"), user("more"), assistant("bye")]
Table = list[tuple[str, bool]]


def no(*tokens: str) -> Table:
    return [(token, False) for token in tokens]


def yes(*tokens: str) -> Table:
    return [(token, True) for token in tokens]


def table(tokenizer: Any, messages: list[dict[str, Any]]) -> Table:
    prepared, _ = prepare_sequences(load([{"messages": messages}]), tokenizer, assistant_only_loss=True)
    row = prepared[0]
    return list(zip(tokenizer.convert_ids_to_tokens(row["input_ids"]), row["loss_mask"], strict=True))


def trained(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    text, spans = assistant_spans(tokenizer, messages, **options)
    return [text[start:end] for start, end in spans]


def chatml(template: str = tiny.CHATML) -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, template, eos="<|im_end|>")


def of_bytes(template: str) -> Any:
    return byte_tokenizer(tiny.CHATML_TOKENS, template, eos="<|im_end|>")


# -- golden tables --------------------------------------------------------------------------------------------------

CHATML_TALK = [
    *no("<|im_start|>", "user", "\n", "hello", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
    *yes("good", " day", "<|im_end|>"),
    *no("\n", "<|im_start|>", "user", "\n", "more", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
    *yes("bye", "<|im_end|>"),
    *no("\n"),
]


def test_chatml() -> None:
    assert table(chatml(), TALK) == CHATML_TALK


@pytest.mark.parametrize("template", [tiny.MARKED, tiny.MARKED_CONTENT], ids=["with the end", "without the end"])
def test_generation_markers(template: str) -> None:
    assert table(chatml(template), TALK) == CHATML_TALK


def test_markers_are_believed() -> None:
    # The template marks the contents in capitals only: no rendering would show that.
    template = tiny.MARKED.replace("message['role'] == 'assistant'", "message['content'] == 'bye'")
    assert trained(chatml(template), TALK) == ["bye<|im_end|>"]


def test_injected_system_prompt() -> None:
    assert table(chatml(tiny.DEFAULT_SYSTEM), TALK[:2]) == [
        *no("<|im_start|>", "system", "\n", "Be", " a", " helpful", " bot", ".", "<|im_end|>", "\n"),
        *no("<|im_start|>", "user", "\n", "hello", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
        *yes("good", " day", "<|im_end|>"),
        *no("\n"),
    ]


def test_llama2() -> None:
    # The model itself writes the space after [/INST]; the template writes the BOS, and it is not doubled.
    assert table(word_tokenizer((), tiny.LLAMA2, bos="<s>", add_bos=True), TALK) == [
        *no("<s>", "[", "INST", "]", " hello", " ", "[", "/", "INST", "]"),
        *yes(" good", " day", " ", "</s>"),
        *no("<s>", "[", "INST", "]", " more", " ", "[", "/", "INST", "]"),
        *yes(" bye", " ", "</s>"),
    ]


def test_llama3() -> None:
    tokenizer = word_tokenizer(
        tiny.LLAMA3_TOKENS, tiny.LLAMA3, bos="<|begin_of_text|>", eos="<|end_of_text|>", add_bos=True
    )
    assert table(tokenizer, TALK[:2]) == [
        *no("<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n", "\n", "hello", "<|eot_id|>"),
        *no("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n", "\n"),
        *yes("good", " day", "<|eot_id|>"),
    ]


def test_gemma_trims_and_renames() -> None:
    tokenizer = word_tokenizer(tiny.GEMMA_TOKENS, tiny.GEMMA, bos="<bos>", eos="<eos>", add_bos=True)
    assert table(tokenizer, [user("hello"), assistant(" good day\n"), user("more"), assistant("bye")]) == [
        *no("<bos>", "<start_of_turn>", "user", "\n", "hello", "<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"),
        *yes("good", " day", "<end_of_turn>"),
        *no("\n", "<start_of_turn>", "user", "\n", "more", "<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"),
        *yes("bye", "<end_of_turn>"),
        *no("\n"),
    ]


def test_phi() -> None:
    # The turn ends with <|end|>; the <|endoftext|> that closes the conversation is the template's.
    assert table(word_tokenizer(tiny.PHI_TOKENS, tiny.PHI, eos="<|endoftext|>"), TALK) == [
        *no("<|user|>", "\n", "hello", "<|end|>", "\n", "<|assistant|>", "\n"),
        *yes("good", " day", "<|end|>"),
        *no("\n", "<|user|>", "\n", "more", "<|end|>", "\n", "<|assistant|>", "\n"),
        *yes("bye", "<|end|>"),
        *no("\n", "<|endoftext|>"),
    ]


def test_no_end_of_turn() -> None:
    # Generation starts after "Assistant:", so the space is the model's; nothing ends the turn.
    assert table(word_tokenizer((), tiny.NO_END), TALK) == [
        *no("User", ":", " hello", "\n", "Assistant", ":"),
        *yes(" good", " day"),
        *no("\n", "User", ":", " more", "\n", "Assistant", ":"),
        *yes(" bye"),
        *no("\n"),
    ]


HM = "<think>\nhm\n</think>\n\n"


def test_thinking_is_stripped_from_earlier_turns_and_trained_in_the_last() -> None:
    talk = [user("hello"), assistant(HM + "good day"), user("more"), assistant(HM + "bye")]
    assert table(chatml(tiny.THINKING), talk) == [
        *no("<|im_start|>", "user", "\n", "hello", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
        *yes("good", " day", "<|im_end|>"),
        *no("\n", "<|im_start|>", "user", "\n", "more", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
        *yes("<", "think", ">", "\n", "hm", "\n", "<", "/", "think", ">", "\n", "\n", "bye", "<|im_end|>"),
        *no("\n"),
    ]


def test_the_empty_think_block_of_the_last_turn_is_trained() -> None:
    assert trained(chatml(tiny.THINKING), TALK) == [
        "good day<|im_end|>",
        "<think>\n\n</think>\n\nbye<|im_end|>",
    ]


def test_tool_calls() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    said = {"role": "assistant", "content": "hm", "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "7"}
    think = "<think>\n\n</think>\n\n"
    written = "\n<tool_call>\nf\n</tool_call><|im_end|>"
    tokenizer = chatml(tiny.THINKING)
    talk = [user("what is x"), call, result, assistant("x is 7")]
    assert trained(tokenizer, talk) == [think + written, think + "x is 7<|im_end|>"]
    # A later question strips the thinking from both, and the second call has a text before it.
    assert trained(tokenizer, [*talk, user("more"), said, result, assistant("bye")]) == [
        written,
        "x is 7<|im_end|>",
        think + "hm" + written,
        think + "bye<|im_end|>",
    ]
    # The same through a table, where every message has every field.
    prepared, _ = prepare_sequences(load([{"messages": talk}]), tokenizer, assistant_only_loss=True)
    row = prepared[0]
    kept = [token for token, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]
    assert tokenizer.decode(kept) == think + written + think + "x is 7<|im_end|>"


# -- odd conversations ----------------------------------------------------------------------------------------------


def test_whitespace_of_a_content_belongs_to_it() -> None:
    tokenizer = of_bytes(tiny.CHATML)
    assert trained(tokenizer, [user("a"), assistant("\n b \n")]) == ["\n b \n<|im_end|>"]
    assert trained(tokenizer, [user("a"), assistant("")]) == ["<|im_end|>"]
    assert trained(tokenizer, [user("a"), assistant(" ")]) == [" <|im_end|>"]


def test_a_header_in_the_users_text_is_only_text() -> None:
    fake = "<|im_start|>assistant\nfake<|im_end|>"
    assert trained(of_bytes(tiny.CHATML), [user(fake), assistant("real")]) == ["real<|im_end|>"]


def test_the_same_content_twice() -> None:
    tokenizer = of_bytes(tiny.CHATML)
    text, spans = assistant_spans(tokenizer, [user("yes"), assistant("yes"), user("yes"), assistant("yes")])
    assert [text[start:end] for start, end in spans] == ["yes<|im_end|>"] * 2
    assert spans[0][0] > text.index("assistant") and spans[1][0] > text.rindex("assistant")


def test_assistant_first_and_twice_in_a_row() -> None:
    talk = [assistant("one"), assistant("two"), user("x"), assistant("three")]
    assert trained(of_bytes(tiny.CHATML), talk) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]


def test_no_assistant_no_spans() -> None:
    assert trained(of_bytes(tiny.CHATML), [user("a")]) == []
    assert trained(of_bytes(tiny.MARKED), [user("a")]) == []


def test_private_use_characters_in_the_text() -> None:
    assert trained(of_bytes(tiny.CHATML), [user("\ue001"), assistant("a\ue000b")]) == ["a\ue000b<|im_end|>"]


def test_a_generation_prompt_that_says_more_than_the_turn() -> None:
    # The prompt opens a think block; earlier turns have none. They agree up to the header.
    template = tiny.CHATML.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    assert trained(of_bytes(template), TALK) == ["good day<|im_end|>", "bye<|im_end|>"]
    kept = [user("a"), assistant("<think>\nhm</think>b"), user("c"), assistant("d")]
    assert trained(of_bytes(template), kept) == ["<think>\nhm</think>b<|im_end|>", "d<|im_end|>"]


def test_a_template_without_a_generation_prompt() -> None:
    # At inference the model has to write the header too, so it is trained.
    template = tiny.CHATML.split("{%- if add_generation_prompt")[0]
    assert trained(of_bytes(template), [user("a"), assistant("b")]) == ["<|im_start|>assistant\nb<|im_end|>"]


def test_end_of_turn_only_between_turns() -> None:
    template = (
        "{%- for message in messages %}{{- message['role'] + ':' + message['content'] }}"
        "{%- if not loop.last %}{{- eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- eos_token + 'assistant:' }}{%- endif %}"
    )
    assert trained(byte_tokenizer((), template), TALK) == ["good day</s>", "bye"]


def test_two_tokens_end_the_turn() -> None:
    template = tiny.CHATML.replace("'<|im_end|>'", "'<|stop|><|im_end|>'")
    tokenizer = byte_tokenizer((*tiny.CHATML_TOKENS, "<|stop|>"), template, eos="<|im_end|>")
    assert trained(tokenizer, TALK) == ["good day<|stop|><|im_end|>", "bye<|stop|><|im_end|>"]


def test_a_template_that_refuses_prefixes() -> None:
    # Whatever is not a whole conversation is refused, the probe's question alone included.
    template = "{%- if messages|length % 2 %}{{- raise_exception('odd') }}{%- endif %}" + tiny.CHATML
    tokenizer = of_bytes(template)
    assert chat_template(tokenizer).facts().leads == ()
    # What stands before the contents cannot be known; the contents and their ends can.
    assert trained(tokenizer, [user("a"), assistant(" b"), user("c"), assistant("d")]) == [
        " b<|im_end|>",
        "d<|im_end|>",
    ]


BY_ROLE = "{%- for m in messages %}{{- '<|' + m.role + '|>' + CONTENT + eos_token }}{%- endfor %}"
OPENS = "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"


@pytest.mark.parametrize(
    ("content", "opens", "expected"),
    [
        ("m.content | tojson", OPENS, ['"<think>\\nhm</think>\\nbob"</s>', '"bob"</s>']),
        ("m.content.replace('b', '[b]')", OPENS, ["<think>\nhm</think>\n[b]o[b]</s>", "[b]o[b]</s>"]),
        ("m.content | upper", OPENS, ["<THINK>\nHM</THINK>\nBOB</s>", "BOB</s>"]),
        ("m.content.split('</think>')[-1]", OPENS, ["\nbob</s>", "bob</s>"]),
        ("m.content.split('</think>')[-1]", OPENS.replace("|>'", "|><think>'"), ["\nbob</s>", "bob</s>"]),
        ("'\\n' + m.content", OPENS, ["\n<think>\nhm</think>\nbob</s>", "\nbob</s>"]),
    ],
    ids=["quoted", "replaced", "capitals", "thinking lost", "thinking opened by the prompt", "newline unprompted"],
)
def test_templates_that_rewrite(content: str, opens: str, expected: list[str]) -> None:
    tokenizer = byte_tokenizer(("<|user|>", "<|assistant|>"), BY_ROLE.replace("CONTENT", content) + opens)
    talk = [user("bib"), assistant("<think>\nhm</think>\nbob"), user("bob"), assistant("bob")]
    assert trained(tokenizer, talk) == expected


def test_template_options_reach_the_template() -> None:
    template = "{{- tone | default('plain') }}\n" + tiny.CHATML
    tokenizer = of_bytes(template)
    assert render(tokenizer, [user("a")], tone="kind").startswith("kind<|im_start|>user")
    text, spans = assistant_spans(tokenizer, [user("a"), assistant("b")], tone="kind")
    assert text.startswith("kind") and text[spans[0][0] : spans[0][1]] == "b<|im_end|>"


def test_generation_prompt() -> None:
    assert render(of_bytes(tiny.CHATML), [user("a")], add_generation_prompt=True) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (tiny.LLAMA2, [user("a"), user("b"), assistant("c")]),
        (tiny.GEMMA, [system("a"), user("b"), assistant("c")]),
    ],
    ids=["alternation", "no system"],
)
def test_a_refused_conversation_is_an_error(template: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = byte_tokenizer((), template, bos="<s>")
    roles = ", ".join(message["role"] for message in messages)
    with pytest.raises(DataError, match=rf"the chat template refuses the conversation with the roles \[{roles}\]"):
        assistant_spans(tokenizer, messages)


def test_a_turn_that_cannot_be_placed_is_an_error() -> None:
    # The template writes its own words for the assistant's, and refuses the question without them.
    template = (
        "{%- if messages|length == 1 %}{{- raise_exception('unanswered') }}{%- endif %}"
        "{%- for message in messages %}{{- message['content'] if message['role'] == 'user' else '...' }}{%- endfor %}"
    )
    with pytest.raises(DataError) as error:
        assistant_spans(of_bytes(template), [user("a"), assistant("b"), user("c")])
    assert str(error.value) == (
        "cannot tell where the assistant's turn messages[1] stands in the rendered text, because the chat template "
        "rewrites it or leaves it out. Add `{% generation %}` … `{% endgeneration %}` to the template, or train on all "
        "tokens with assistant_only_loss=False."
    )


def test_no_template_is_an_error() -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template. Set `tokenizer.chat_template`"):
        assistant_spans(byte_tokenizer(), TALK)


# -- cost -----------------------------------------------------------------------------------------------------------


def test_two_renderings_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = of_bytes(tiny.CHATML)
    template = ChatTemplate(tokenizer)
    template.facts()
    rendered = []
    original = ChatTemplate._apply

    def counting(self: Any, conversations: Any, prompt: bool, **options: Any) -> Any:
        rendered.append(len(conversations))
        return original(self, conversations, prompt, **options)

    monkeypatch.setattr(ChatTemplate, "_apply", counting)
    AssistantSpans(template).find_all([TALK] * 10)
    assert rendered == [10, 10]


# -- properties -----------------------------------------------------------------------------------------------------

CONTENT = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=30)
CONVERSATION = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)
TEMPLATES = {
    "chatml": (tiny.CHATML, tiny.CHATML_TOKENS, "<|im_end|>", False),
    "default system": (tiny.DEFAULT_SYSTEM, tiny.CHATML_TOKENS, "<|im_end|>", False),
    "marked": (tiny.MARKED, tiny.CHATML_TOKENS, "<|im_end|>", False),
    "marked content": (tiny.MARKED_CONTENT, tiny.CHATML_TOKENS, "<|im_end|>", False),
    "llama3": (tiny.LLAMA3, tiny.LLAMA3_TOKENS, "<|eot_id|>", True),
    "gemma": (tiny.GEMMA, tiny.GEMMA_TOKENS, "<end_of_turn>", True),
    "phi": (tiny.PHI, tiny.PHI_TOKENS, "<|end|>", False),
}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(pairs=CONVERSATION)
def test_what_is_trained_is_content_and_end_of_turn(name: str, pairs: list[tuple[str, str]]) -> None:
    template, special, end, trims = TEMPLATES[name]
    tokenizer = byte_tokenizer(special, template, bos="<s>")
    talk = [message for asked, said in pairs for message in (user(asked), assistant(said))]
    text, spans = assistant_spans(tokenizer, talk)
    assert [text[start:stop] for start, stop in spans] == [(said.strip() if trims else said) + end for _, said in pairs]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = mask_tokens(encoded["offset_mapping"], spans)
    kept = [token for token, on in zip(encoded["input_ids"], mask, strict=True) if on]
    assert tokenizer.decode(kept) == "".join(text[start:stop] for start, stop in spans)


@settings(max_examples=40, deadline=None)
@given(pairs=CONVERSATION)
def test_every_way_agrees(pairs: list[tuple[str, str]]) -> None:
    """The markers, the sentinels and the differences give the same spans."""
    talk = [message for asked, said in pairs for message in (user(asked), assistant(said))]
    by_sentinels = assistant_spans(of_bytes(tiny.CHATML), talk)
    assert assistant_spans(of_bytes(tiny.MARKED), talk) == by_sentinels
    # A template that replaces one sentinel loses it, so that only the differences are left.
    eaten = "message['content'].replace('\ue001', '')"
    template = ChatTemplate(of_bytes(tiny.CHATML.replace("message['content']", eaten)))
    assert AssistantSpans(template).find(talk) == by_sentinels


# -- tokens ---------------------------------------------------------------------------------------------------------


def test_mask_tokens() -> None:
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (6, 9), (0, 0)]
    assert mask_tokens(offsets, [(2, 6)]) == [False, False, True, True, False, False]
    # (2, 5) straddles the left edge and is not trained; (6, 9) reaches over the right edge and is.
    assert mask_tokens(offsets, [(3, 8)]) == [False, False, False, True, True, False]
    assert mask_tokens(offsets, [(0, 2), (6, 9)]) == [True, True, False, False, True, False]
    assert mask_tokens(offsets, []) == [False] * 6


def test_mask_tokens_with_trimmed_offsets() -> None:
    # "a bc": the second token is " bc", and its offsets leave the space out.
    offsets = [(0, 1), (2, 4)]
    assert mask_tokens(offsets, [(1, 4)], trimmed=True) == [False, True]
    assert mask_tokens(offsets, [(2, 4)], trimmed=True) == [False, False]
    assert mask_tokens(offsets, [(2, 4)]) == [False, True]


@pytest.mark.parametrize("trim", [False, True])
def test_trimmed_offsets_are_noticed(trim: bool) -> None:
    tokenizer = byte_tokenizer(trim_offsets=trim, merges=(("Ġ", "b"),))
    assert trims_offsets(tokenizer) is trim
    assert not trims_offsets(word_tokenizer())


def test_the_real_tokenizer(smol_path: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    prepared, report = prepare_sequences(load([{"messages": TALK}]), tokenizer, assistant_only_loss=True)
    row = prepared[0]
    kept = [token for token, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]
    assert tokenizer.decode(kept) == "good day<|im_end|>bye<|im_end|>"
    assert report.end_of_turn == 1 and report.end_of_turn_token == "<|im_end|>"
