"""Reward models and pipelines: they score prompt and completion, read with the model's own tokenizer."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoConfig, Pipeline, PreTrainedTokenizerBase

from trl.data.batching.collate import Branch, Tree
from trl.data.tokenizing.chat import chat_template
from trl.engine.probe import attach
from trl.engine.scalar import scalars
from trl.engine.score import Attachment
from trl.models import load, shards
from trl.models.unwrap import evaluating, unwrap
from trl.notices import notify_once
from trl.rewards.calls import Answer, Call, Log
from trl.rewards.shapes import text_of

SHARED = 8  # minimum tokens of a common prefix that is computed once


class _Judge:
    """A reward model with its own tokenizer. It reads both shapes of rows, so `messages` does not matter."""

    name: str
    messages = False
    background = False

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any], end_of_text: int | None):
        self.tokenizer, self.template_kwargs, self.end_of_text = tokenizer, template_kwargs, end_of_text

    def texts(self, call: Call, end: str = "", whole: bool = True) -> list[str]:
        """Prompt and completion as one text per row, by the tokenizer's chat template if they are messages.

        `end` is appended to plain texts that are finished. `whole` keeps the template's text after the end of the last
        turn.
        """
        texts = []
        for prompt, completion, ids in zip(call.prompts, call.completions, call.completion_ids, strict=True):
            if isinstance(prompt, str):
                finished = len(ids) > 0 and ids[-1] == self.end_of_text
                texts.append(prompt + text_of(completion) + (end if finished else ""))
                continue
            turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else [*completion]
            if getattr(self.tokenizer, "chat_template", None):
                template = chat_template(self.tokenizer)
                text = template.render([*prompt, *turns], **self.template_kwargs)
                texts.append(text if whole else template.without_tail(text, **self.template_kwargs))
            else:
                notify_once(
                    f"the tokenizer of {self.name} has no chat template: it reads the messages' texts line by line"
                )
                texts.append("\n".join(text_of([message]) for message in (*prompt, *turns)))
        return texts


class ModelJudge(_Judge):
    """`AutoModelForSequenceClassification`, or a model with the same outputs: the reward is its first logit.

    Plain texts are read with the tokenizer's special tokens, and finished ones with its end-of-sequence token, as in
    the training of a reward model. Messages are read by the chat template. The score is read where transformers reads
    it, at the last token that is not the padding token (which may also end a turn). If the model's configuration has
    `scores_end_of_turn`, it is read at the token that ends the turn.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int, **kwargs: Any):
        super().__init__(tokenizer, **kwargs)
        self.model, self.batch_tokens = model, batch_tokens
        self.base = unwrap(model)
        self.config = self.base.config
        self.name = model_name(self.config, self.base)
        _check_whole(model, self.name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        text_config = self.config.get_text_config()
        if getattr(text_config, "pad_token_id", None) is None:  # a row is scored at its last token that is not padding
            text_config.pad_token_id = self.config.pad_token_id = tokenizer.pad_token_id
        self.pad_id = text_config.pad_token_id
        self.ends_turn = getattr(self.config, "scores_end_of_turn", False)
        labels = getattr(self.config, "num_labels", 1)
        if labels > 1:
            notify_once(f"{self.name} has {labels} labels: the logit of the first is the reward")
        self.is_decoder = hasattr(self.config, "use_cache")
        self.attachment: Attachment | None = None
        self.attached = False

    def begin(self, call: Call) -> Callable[[], Answer]:
        return lambda: Answer(self.scores(call), Log(), False)

    def scores(self, call: Call) -> list[float]:
        """One number per row."""
        self._attach()
        rows = self._token_ids(call)
        result: list[float] = [0.0] * len(rows)
        with evaluating(self.model), torch.no_grad():
            for numbers, values in self._batches(rows, call.prompts):
                for number, value in zip(numbers, values.float().tolist(), strict=True):
                    result[number] = value
        return result

    def _attach(self) -> None:
        if self.attached:
            return
        self.attached = True
        try:
            self.attachment = attach(self.model)
        except Exception as error:  # any module with logits can be used
            notify_once(
                f"{self.name} runs outside the engine ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            )

    def _token_ids(self, call: Call) -> list[list[int]]:
        plain = isinstance(call.prompts[0], str) or not getattr(self.tokenizer, "chat_template", None)
        end = (self.tokenizer.eos_token or "") if self.is_decoder else ""
        texts = self.texts(call, end, whole=not self.ends_turn)
        rows = self.tokenizer(texts, add_special_tokens=plain)["input_ids"]
        if self.is_decoder and not self.ends_turn:
            rows = [_without_last(ids, self.pad_id) for ids in rows]
        limits = (
            getattr(self.config.get_text_config(), "max_position_embeddings", None),
            self.tokenizer.model_max_length,
        )
        limit = min(int(limit) for limit in limits if limit)
        if any(len(ids) > limit for ids in rows):
            notify_once(
                f"{self.name} reads {limit} tokens at most: longer texts lose their beginning, except one token"
            )
            rows = [[ids[0], *ids[len(ids) - limit + 1 :]] if len(ids) > limit else ids for ids in rows]
        filler: int = self.pad_id or 0
        return [[filler] * (2 - len(ids)) + ids for ids in rows]  # the scored token needs a token before it

    def _batches(self, rows: list[list[int]], prompts: Sequence[Any]) -> Iterator[tuple[list[int], Tensor]]:
        """Indices of rows, and their scores."""
        if self.attachment is not None and self.attachment.is_flat:
            done = 0
            for trees in self._trees(rows, prompts):  # in the order of the rows
                count = sum(len(tree.branches) or 1 for tree in trees)
                yield list(range(done, done + count)), self._score(trees)
                done += count
            return
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        while order:
            count = max(1, min(len(order), self.batch_tokens // len(rows[order[-1]])))
            numbers, order = (
                order[-count:],
                order[:-count],
            )  # the longest first: an out-of-memory error comes at once or never
            if self.attachment is not None:
                yield numbers, self._score([Tree(_scored(rows[number], number), row=number) for number in numbers])
            else:
                inputs = self.tokenizer.pad(
                    {"input_ids": [rows[number] for number in numbers]}, padding_side="right", return_tensors="pt"
                )
                outputs = self.model(**send_to_device(dict(inputs), self._device()))
                yield numbers, outputs.logits.reshape(len(numbers), -1)[:, 0]

    def _trees(self, rows: list[list[int]], prompts: Sequence[Any]) -> Iterator[list[Tree]]:
        """Trees in micro-batches of `batch_tokens`; consecutive rows with the same prompt share their common prefix."""
        trees: list[Tree] = []
        size = start = 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and prompts[stop] == prompts[start]:
                stop += 1
            common = _common([rows[number] for number in range(start, stop)])
            if stop - start > 1 and common >= SHARED:
                root = rows[start][:common]
                branches = tuple(_scored(rows[number][common:], number) for number in range(start, stop))
                new = [Tree(Branch(root, [False] * common), branches, start)]
            else:
                new = [Tree(_scored(rows[number], number), row=number) for number in range(start, stop)]
            for tree in new:
                tokens = len(tree.root.ids) + sum(len(branch.ids) for branch in tree.branches)
                if trees and size + tokens > self.batch_tokens:
                    yield trees
                    trees, size = [], 0
                trees.append(tree)
                size += tokens
            start = stop
        if trees:
            yield trees

    def _score(self, trees: list[Tree]) -> Tensor:
        assert self.attachment is not None
        batch = send_to_device(self.attachment.batch(trees), self._device())
        return scalars(self.model, batch)[:, 0]

    def _device(self) -> torch.device:
        device = self.base.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device


def _without_last(ids: list[int], token: int) -> list[int]:
    """`ids` without trailing copies of `token`."""
    length = len(ids)
    while length and ids[length - 1] == token:
        length -= 1
    return ids[:length]


def _scored(ids: list[int], number: int) -> Branch:
    """A branch whose last token is scored."""
    return Branch(ids, [False] * (len(ids) - 1) + [True], number)


def _common(rows: list[list[int]]) -> int:
    """Length of the common prefix of all rows, without the last token of each."""
    longest = min(len(ids) for ids in rows) - 1
    first = rows[0]
    for place in range(longest):
        if any(ids[place] != first[place] for ids in rows):
            return place
    return longest


class PipelineJudge(_Judge):
    """A transformers pipeline that classifies texts.

    With one label, the reward is its raw score. With several, it is the probability of the positive label minus that of
    the negative label, recognised by their names (POSITIVE and NEGATIVE, LABEL_1 and LABEL_0). ValueError for other
    tasks or labels.
    """

    def __init__(self, pipeline: Any, **kwargs: Any):
        super().__init__(pipeline.tokenizer, **kwargs)
        self.pipeline = pipeline
        self.name = model_name(pipeline.model.config, pipeline.model)
        _check_whole(pipeline.model, self.name)
        if pipeline.task != "text-classification":
            raise ValueError(
                f"the pipeline of {self.name} is for {pipeline.task!r}: pass a text-classification pipeline, or a "
                "function that calls yours"
            )
        labels = [str(label) for label in pipeline.model.config.id2label.values()]
        self.signs = {label: _sign(label) for label in labels} if len(labels) > 1 else {}
        if self.signs and sorted(set(self.signs.values()) - {0}) != [-1, 1]:
            raise ValueError(
                f"the pipeline of {self.name} has the labels {', '.join(labels)}, which do not tell which is positive: "
                "pass a function that calls it and gives a number for each"
            )

    def begin(self, call: Call) -> Callable[[], Answer]:
        return lambda: Answer(self.scores(call), Log(), False)

    def scores(self, call: Call) -> list[float]:
        """One number per row."""
        options: dict[str, Any] = {"top_k": None, "truncation": True}
        if not self.signs:
            options["function_to_apply"] = "none"
        found = self.pipeline(self.texts(call), **options)
        if not self.signs:
            return [labels[0]["score"] for labels in found]
        return [sum(self.signs.get(each["label"], 0) * each["score"] for each in labels) for labels in found]


def _sign(label: str) -> int:
    name = label.casefold()
    if name.startswith("pos") or name == "label_1":
        return 1
    return -1 if name.startswith("neg") or name == "label_0" else 0


def model_name(config: Any, model: Any) -> str:
    """The name of a model in logs: the last part of its name or path."""
    return str(getattr(config, "_name_or_path", "") or type(model).__name__).rstrip("/").split("/")[-1]


def _check_whole(model: nn.Module, name: str) -> None:
    if shards.is_partitioned(model):
        raise ValueError(
            f"the reward model {name} was loaded under ZeRO-3, which partitioned its weights, and the processes do not "
            "call it equally often: give its name or path (it is then loaded whole), or load it before the config is "
            "made"
        )


def is_pipeline(function: Any) -> bool:
    return isinstance(function, Pipeline)


def load_judge(name: str, device: Any, model_kwargs: dict[str, Any]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A reward model by name or path, and its tokenizer. Raises `ModelError` without a trained scoring head."""
    kwargs = dict(model_kwargs)
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    labels = 1
    if load.adapter_base(name) is None:
        try:
            config = AutoConfig.from_pretrained(name, **shared)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise load.ModelError(f"cannot load the reward model {name!r}: {first}") from error
        kinds = getattr(config, "architectures", None) or []
        if kinds and not any("CausalLM" not in kind and "LMHead" not in kind for kind in kinds):
            raise load.ModelError(
                f"{name} is a language model ({kinds[0]}) and has no scoring head: train one with RewardTrainer, or "
                "name a reward model"
            )
        labels = config.num_labels
    else:
        kind = json.loads((Path(name).expanduser() / "adapter_config.json").read_text()).get("task_type")
        if kind != "SEQ_CLS":
            raise load.ModelError(
                f"{name} is an adapter of task type {kind} and has no scoring head: train one with RewardTrainer"
            )
    with shards.loaded_whole():  # each process calls it as often as it needs
        model = load.load_scorer(name, num_labels=labels, **kwargs)
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is not None and not getattr(model, "hf_device_map", None):
        model.to(device)
    return model, load.load_tokenizer(name, **shared)
