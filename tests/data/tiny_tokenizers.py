"""Tokenizers small enough to read, and chat templates in the manner of well-known ones. Nothing is downloaded."""

from __future__ import annotations

from itertools import chain

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "user assistant system model tool hello good day more bye now be kind answer the sky is blue what think hm call "
    "said asked Be User Assistant INST im SYS json f x you are a helpful bot"
).split()


def word_tokenizer(
    special: tuple[str, ...] = (),
    chat_template: str | None = None,
    eos: str = "</s>",
    bos: str | None = None,
    add_bos: bool = False,
    pad: str | None = None,
) -> PreTrainedTokenizerFast:
    """A token is a word with the space before it, a single sign, or a single space; the vocabulary is `WORDS`."""
    pieces = ["<unk>", *"\n ,.:?!</>[]{}\"'|_0123456789", *WORDS, *(f" {word}" for word in WORDS)]
    pieces += [f" {sign}" for sign in "[]<>"]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\s|[^\sA-Za-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, special, chat_template, eos, bos, add_bos, pad)


def byte_tokenizer(
    special: tuple[str, ...] = (),
    chat_template: str | None = None,
    eos: str = "</s>",
    bos: str | None = None,
    add_bos: bool = False,
    pad: str | None = None,
    trim_offsets: bool = False,
    merges: tuple[tuple[str, str], ...] = (),
) -> PreTrainedTokenizerFast:
    """Every byte is a token but for `merges`: any text comes back as it was."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, special, chat_template, eos, bos, add_bos, pad)


def _wrap(
    tokenizer: Tokenizer,
    special: tuple[str, ...],
    chat_template: str | None,
    eos: str,
    bos: str | None,
    add_bos: bool,
    pad: str | None,
) -> PreTrainedTokenizerFast:
    names = dict.fromkeys(chain(special, (eos, *([bos] if bos else []), *([pad] if pad else []))))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if add_bos:
        assert bos is not None
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[name for name in names if name not in (eos, bos, pad)],
    )
    fast.chat_template = chat_template
    return fast


CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

DEFAULT_SYSTEM = (
    """\
{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe a helpful bot.<|im_end|>\\n' }}{%- endif %}
"""
    + CHATML
)

LLAMA2 = """\
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must take turns, the user first') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- raise_exception('there is no system role') }}{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI = """\
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# Thinking is kept in the turns after the last question and stripped from the earlier ones; calls are written as JSON.
THINKING = """\
{%- set last = namespace(user=0) %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
  {%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
  {%- set thought = '' %}
  {%- if '</think>' in message.content %}
    {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
  {%- endif %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if loop.index0 > last.user %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
  {{- answer }}
  {%- for call in message.tool_calls or [] %}
    {{- '\\n<tool_call>\\n' + call.function.name + '\\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\\n' }}
{%- else %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MARKED_CONTENT = MARKED.replace(
    "{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}",
    "{{- message['content'] }}{%- endgeneration %}{{- '<|im_end|>' }}",
)

NO_END = """\
{%- for message in messages %}
{{- ('Assistant' if message['role'] == 'assistant' else 'User') + ': ' + message['content'] + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}
