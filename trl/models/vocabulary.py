"""Chat templates from elsewhere, and the tokens they bring: vocabulary, embeddings and end token change together."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl.notices import notify_once

from .load import ModelError, load_tokenizer
from .shards import whole, whole_shape

_ROWS = 1000  # of a data set, read at once
_TEMPLATE_FILES = (".jinja", ".jinja2", ".j2", ".txt")


def set_chat_template(tokenizer: Any, source: Any) -> Any:
    """Set the chat template of a tokenizer (or processor) to that of `source`; returns the tokenizer.

    `source` is a template file, a jinja string, a tokenizer, or a tokenizer's name or folder. The template's tokens
    must be in the vocabulary: `clone_chat_template` adds them.
    """
    text = _template_text(source)
    tokenizer.chat_template = text if text is not None else _template_of(_tokenizer_of(source), source)
    return tokenizer


def use_chat_template(model: Any, tokenizer: Any, source: Any) -> tuple[Any, Any, list[int]]:
    """Apply the option `chat_template_path`: a file or a jinja string sets the template; a tokenizer's name or folder
    also adds its special tokens. Returns the model, the tokenizer and the ids of added tokens."""
    if _template_text(source) is not None:
        return model, set_chat_template(tokenizer, source), []
    return clone_chat_template(model, tokenizer, source)


def clone_chat_template(
    model: Any, tokenizer: Any, source_tokenizer_path: Any, resize_to_multiple_of: int | None = 64
) -> tuple[Any, Any, list[int]]:
    """Give a model and its tokenizer the chat format of another tokenizer (a name, a folder or an object).

    The template is copied. Added tokens of the other tokenizer that this one lacks are added. Its end token becomes
    this one's, also in the model's configuration and generation configuration. Embeddings and head grow to hold the
    vocabulary, to a multiple of `resize_to_multiple_of`, and the tokenizer is filled up with `<extra_id_0>`,
    `<extra_id_1>`, ... so that every row has a token. Spare rows of the model are used first; embeddings never shrink.
    A new row is the mean of the old ones.

    Returns the model, the tokenizer and the ids of all added tokens. Raises `ModelError` for a model with an adapter:
    clone first, because an adapter freezes the new rows unless it is set to train them (`check_added_tokens`).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "peft_config") or base is not model:
        raise ModelError("clone the chat template before adding an adapter: cloning changes the embeddings beneath it")
    source = _tokenizer_of(source_tokenizer_path)
    template = _template_of(source, source_tokenizer_path)
    target = getattr(tokenizer, "tokenizer", tokenizer)
    known = target.get_vocab()
    missing = [token for _, token in sorted(source.added_tokens_decoder.items()) if token.content not in known]
    if source.eos_token is not None and source.eos_token not in known:
        if source.eos_token not in {token.content for token in missing}:
            missing.append(source.eos_token)

    tokenizer.chat_template = target.chat_template = template
    added = _add(target, [token for token in missing if not getattr(token, "special", True)], special=False)
    added += _add(target, [token for token in missing if getattr(token, "special", True)], special=True)
    if source.eos_token is not None:
        target.eos_token = source.eos_token
        model.config.eos_token_id = target.eos_token_id
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = target.eos_token_id
    if grow_embeddings(model, len(target), resize_to_multiple_of):
        rows = whole_shape(model.get_input_embeddings().weight)[0]
        known, index = target.get_vocab(), 0
        fillers: list[str] = []
        while len(target) + len(fillers) < rows:
            if f"<extra_id_{index}>" not in known:
                fillers.append(f"<extra_id_{index}>")
            index += 1
        added += _add(target, fillers, special=False)
    return model, tokenizer, sorted(added)


def grow_embeddings(model: Any, tokens: int, multiple_of: int | None = None) -> bool:
    """Give the model at least `tokens` embedding rows; returns whether it had to grow.

    New rows of the embeddings and of an untied head are the mean of the old rows. No random numbers are drawn, so every
    run and every process gets the same. Tied weights stay tied, and the configuration has the new size.
    """
    rows = whole_shape(model.get_input_embeddings().weight)[0]
    if tokens <= rows:
        return False
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple_of, mean_resizing=False)
    weights = _rows(model)
    with torch.no_grad(), whole(weights, written=True):
        for weight in weights:
            mean = weight[:rows].float().mean(0)
            weight[rows:] = mean.to(weight.dtype)
    return True


# --- tokens that have no row ----------------------------------------------------------------------------------------


def check_special_tokens(model: Any, tokenizer: Any) -> None:
    """Raise `ModelError` for a special token of the tokenizer without a row in the embedding: the saved model could not
    be opened with its id. A padding token in the model's configuration without a row is replaced by the tokenizer's."""
    rows = vocabulary_size(model)
    target = getattr(tokenizer, "tokenizer", tokenizer)
    if rows is None:
        return
    for what in ("pad_token", "eos_token", "bos_token"):
        number = getattr(target, f"{what}_id", None)
        if number is not None and number >= rows:
            raise ModelError(_no_row(f"the tokenizer's {what}", getattr(target, what), number, rows, target))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = [base.config, base.config.get_text_config(), getattr(base, "generation_config", None)]
    for config in configs:
        pad = getattr(config, "pad_token_id", None)
        if pad is not None and pad >= rows:
            notify_once(f"the model's pad_token_id {pad} is outside its vocabulary of {rows:,} tokens: it is replaced")
            config.pad_token_id = getattr(target, "pad_token_id", None)


def tokens_without_row(model: Any, tokenizer: Any) -> "TokensWithoutRow | None":
    """A check for tokens without a row in the embedding; None if every token has a row."""
    rows, target = vocabulary_size(model), getattr(tokenizer, "tokenizer", tokenizer)
    return TokensWithoutRow(rows, target) if rows is not None and len(target) > rows else None


class TokensWithoutRow:
    """Raises `ModelError` if a text contains a token without a row in the embedding. Some tokenizers have such tokens,
    but no text contains them."""

    def __init__(self, rows: int, tokenizer: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def check(self, ids: Sequence[int], where: str) -> None:
        number = max(ids, default=0)
        if number >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(number)
            raise ModelError(_no_row(where, token, number, self.rows, self.tokenizer))

    def check_dataset(self, dataset: Any, name: str) -> None:
        """Check the rows of a prepared data set. The rows of a stream are checked when they are read."""
        if not isinstance(dataset, Dataset):
            return
        columns = [column for column in dataset.column_names if column.endswith("_ids")]
        for start in range(0, len(dataset), _ROWS):
            part = dataset[start : start + _ROWS]
            numbers = part.get("row", range(start, start + _ROWS))
            for column in columns:
                for number, ids in zip(numbers, part[column], strict=False):
                    self.check(ids, f"{name} row {number}")


def vocabulary_size(model: Any) -> int | None:
    """Rows of the model's embedding; None if its configuration does not say."""
    # Not the shape of the weight, which a sharded weight does not have.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    return getattr(config.get_text_config(), "vocab_size", None) if config is not None else None


def _no_row(where: str, token: str, number: int, rows: int, tokenizer: Any) -> str:
    return (
        f"{where}: {token!r} is token {number}, but the model's embedding has {rows:,} rows and the tokenizer "
        f"{len(tokenizer):,} tokens. Call model.resize_token_embeddings(len(tokenizer)) and pass that model"
    )


# --- padding of scoring models --------------------------------------------------------------------------------------

_PADDING = ("pad", "reserved", "unused", "extra", "unk")  # in the order of preference
_ENDING = ("end", "eot", "eom", "eos", "</s>")


def padding_token(tokenizer: Any, ends: set[int], rows: int) -> str | None:
    """A special token for padding that ends no text, or None; names in `_PADDING` are preferred."""
    found = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number not in ends and number < rows
    }
    able = [each for each in found.values() if not any(word in each.lower() for word in _ENDING)]
    marked = [[each for each in able if word in each.lower()] for word in _PADDING]
    return next((each for group in [*marked, able] for each in group), None)


# --- tokens under an adapter ----------------------------------------------------------------------------------------


def check_added_tokens(model: Any, peft_config: Any, added: Sequence[int]) -> None:
    """Print a notice, with the remedy, if the adapter does not train the embeddings of added tokens."""
    if not added or peft_config is None:
        return
    saved = set(getattr(peft_config, "modules_to_save", None) or ())
    if getattr(peft_config, "trainable_token_indices", None) or any(_is_embedding(name) for name in saved):
        return
    targets = getattr(peft_config, "target_modules", None) or ()
    if not isinstance(targets, str) and any(_is_embedding(name) for name in targets):
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    layers = [embedding.rpartition(".")[2]]
    span = f"{added[0]}-{added[-1]}" if len(added) > 1 else str(added[0])
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    layers += [] if tied else ["lm_head"]
    notify_once(
        f"{len(added)} tokens were added (ids {span}), and the adapter does not train their embeddings: these stay the "
        "mean of the others. Set trainable_token_indices=[...] on the LoraConfig, the ids of those that the template "
        f"uses; or train whole layers with modules_to_save={layers}{', ensure_weight_tying=True' if tied else ''}"
    )


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")


def _rows(model: Any) -> list[Tensor]:
    """The weights with one row per token: embeddings and, untied, the head (its bias too)."""
    found: list[Tensor] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name in ("weight", "bias"):
            weight = getattr(module, name, None)
            if isinstance(weight, Tensor) and all(weight is not each for each in found):
                found.append(weight)
    return found


def _add(tokenizer: Any, tokens: list[Any], special: bool) -> list[int]:
    before = len(tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=special)
    return list(range(before, len(tokenizer)))


def _template_text(source: Any) -> str | None:
    """The template in a string or a file; None if `source` is a tokenizer, or its name."""
    if not isinstance(source, str | os.PathLike):
        return None
    text = os.fspath(source)
    if "{{" in text or "{%" in text:
        return text
    path = Path(text).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in _TEMPLATE_FILES:
        raise ModelError(f"no chat template file at {text}")
    return None


def _tokenizer_of(source: Any) -> Any:
    if isinstance(source, str | os.PathLike):
        return load_tokenizer(source)
    return getattr(source, "tokenizer", source)


def _template_of(tokenizer: Any, source: Any) -> Any:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ModelError(f"{source if isinstance(source, str) else type(source).__name__} has no chat template to copy")
    return template
