"""Models that answer prompts: options, and the model, the tokenizer and the sampling that they describe."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trl import options
from trl.compat.arguments import Adoptable
from trl.config import ModelFields, SamplingFields
from trl.models.load import load_causal_lm, load_tokenizer, loading_arguments, quantization_config
from trl.notices import notify_once

from .generate import sampling_of
from .types import Completion, Sampling


@dataclass
class AnswerFields(ModelFields, SamplingFields, Adoptable):
    """The model that answers, and how."""

    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of an adapter for the model, in place of the base that it names."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of an answer in tokens."})
    do_sample: bool = field(
        default=True, metadata={"help": "false: take the most likely token, as temperature 0 does."}
    )
    num_beams: int = field(default=1, metadata={"help": "1: beams are not searched here."})
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end an answer."})
    eos_tokens: list[str] | None = field(default=None, metadata={"help": "More tokens that end an answer."})
    eos_token_ids: list[str] | None = field(default=None, metadata={"help": "The same, by their ids."})
    system_prompt: str | None = field(default=None, metadata={"help": "Message of the system at the beginning."})
    seed: int = field(default=0, metadata={"help": "Random seed of the answers."})
    device: str | None = field(
        default=None, metadata={"help": "Device, such as cpu or cuda:1. Default: the accelerator."}
    )

    def __post_init__(self) -> None:
        if self.temperature == 0:
            self.temperature, self.do_sample = 1.0, False
        if self.num_beams != 1:
            raise ValueError(f"num_beams={self.num_beams}: answers are sampled, or greedy with do_sample=False")
        options.check(self)
        for sentence in options.unused(self):
            notify_once(sentence)
        self.eos_tokens, self.eos_token_ids = _parts(self.eos_tokens), _parts(self.eos_token_ids)

    def sampling(self, model: Any, tokenizer: Any) -> Sampling:
        """The sampling of a model's answers. ValueError for a token to stop at that the tokenizer does not know."""
        known = tokenizer.get_vocab()
        unknown = [token for token in self.eos_tokens or () if token not in known]
        if unknown:
            raise ValueError(f"eos_tokens: {unknown[0]!r} is not a token of the model")
        stops = [known[token] for token in self.eos_tokens or ()] + [int(each) for each in self.eos_token_ids or ()]
        asked: dict[str, Any] = {"eos_token_id": stops} if stops else {}
        asked |= {"stop_strings": self.stop_strings} if self.stop_strings else {}
        asked |= {} if self.do_sample else {"temperature": 0}
        return sampling_of(self, model, tokenizer, self.max_new_tokens, **asked)


def _parts(words: list[str] | str | None) -> list[str] | None:
    """Words, each of which may hold several, separated by commas."""
    words = [words] if isinstance(words, str) else words
    return words and [part for word in words for part in str(word).split(",") if part]


def open_model(settings: AnswerFields, name: str | None = None, adapter: str | None = None) -> tuple[Any, Any]:
    """The model and the tokenizer that `settings` describe, or another model with the same options. Errors are those of
    `load_causal_lm`."""
    name = name or settings.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path is missing: the model that answers, a folder or a model's name")
    device = settings.device or str(torch.accelerator.current_accelerator() or "cpu")
    arguments = loading_arguments(settings)
    quantised = quantization_config(settings)
    if quantised is not None:
        arguments |= {"quantization_config": quantised, "device_map": {"": device}}
    model = load_causal_lm(name, adapter=adapter, **arguments)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = model if quantised is not None else model.to(device)
    try:
        tokenizer = load_tokenizer(adapter or name)
    except ValueError:
        if adapter is None:
            raise
        tokenizer = load_tokenizer(name)
    return model.eval(), tokenizer


def window_of(model: Any) -> int | None:
    """The most tokens of a sequence that the model has positions for, or None."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def pieces(tokenizer: Any, parts: Iterator[Completion]) -> Iterator[tuple[str, Completion]]:
    """New text and the completion so far, each time that there is new text, and at the end. A character of several
    tokens comes with the last of them. Special tokens are left out."""
    shown, last = "", None
    for last in parts:
        text = tokenizer.decode(last.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(shown):
            yield text[len(shown) :], last
            shown = text
    if last is not None:
        text = tokenizer.decode(last.ids, skip_special_tokens=True)
        yield text[len(shown) :] if text.startswith(shown) else "", last
