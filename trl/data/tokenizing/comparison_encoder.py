"""The encoder of comparisons: batches of judged completions to tokens.

A prompt and each of its completions are tokenised as one text. The prompt's tokens are those with which the prompt
alone and all of these texts begin. What follows them is the completion, so that all completions continue one prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from trl.data.reading import samples
from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape
from trl.data.reading.messages import place
from trl.data.reading.readings import (
    PAIR_READINGS,
    STEP_READINGS,
    UNDERSTOOD_PAIRS,
    UNDERSTOOD_STEPS,
    UNDERSTOOD_UNPAIRED,
    UNPAIRED_READINGS,
    Reading,
)
from trl.data.reading.samples import EMPTY, IDENTICAL, NO_CHOICE, NO_PROMPT, Sample, number_of, truth_of
from trl.data.tokenizing.chat import chat_template, common_prefix_length
from trl.data.tokenizing.encode import Encoder, Text, Tokens

EQUAL_CUT, PROMPT_FILLS, ALL_CUT = range(NO_CHOICE + 1, NO_CHOICE + 4)
COUNTERS = (
    *("_dropped", "_prompt", "_first", "_second", "_prompt_kept", "_kept", "_trainable", "_trained"),
    *("_end", "_bos_doubled", "_straddles", "_empty"),
)
_IDS = datasets.List(datasets.Value("int32"))
_NUMBER = datasets.Value("float64")


class Kind(NamedTuple):
    """A kind of comparison.

    `readings` are tried in their order, and `understood` describes them. `columns` are the features that every prepared
    row has, and `extras` those that it has if the data have them.
    """

    readings: tuple[Reading, ...]
    understood: str
    columns: Mapping[str, Any]
    extras: Mapping[str, Any] = {}


KINDS = {
    "pairs": Kind(
        PAIR_READINGS,
        UNDERSTOOD_PAIRS,
        {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS},
        {"margin": _NUMBER, "ref_chosen_logps": _NUMBER, "ref_rejected_logps": _NUMBER},
    ),
    "unpaired": Kind(
        UNPAIRED_READINGS,
        UNDERSTOOD_UNPAIRED,
        {"prompt_ids": _IDS, "completion_ids": _IDS, "label": datasets.Value("bool")},
        {"ref_logps": _NUMBER, "kl_completion_ids": _IDS, "ref_KL_logps": _NUMBER},
    ),
    "steps": Kind(
        STEP_READINGS,
        UNDERSTOOD_STEPS,
        {
            "prompt_ids": _IDS,
            "completion_ids": _IDS,
            "step_mask": datasets.List(datasets.Value("bool")),
            "step_labels": _IDS,
        },
    ),
}


@dataclass
class _Encoded:
    """A sample as tokens, before it is cut.

    `labels` has an entry for each completion. A sample of steps has one completion; its `mask` is true at the last
    token of each step, and `labels` has an entry for each step. `straddles` says that the prompt alone has other tokens
    at its end than before a completion. `empty` counts the completions without text.
    """

    prompt: list[int] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    labels: tuple[bool, ...] = ()
    mask: list[bool] = field(default_factory=list)
    dropped: int = KEPT
    bos_doubled: bool = False
    straddles: bool = False
    empty: int = 0


class ComparisonEncoder(Encoder):
    """Batches of rows to prompts and completions."""

    features: datasets.Features

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, recipe: Any, first_row: int = 0):
        super().__init__(tokenizer, shape, recipe, first_row)
        kind = KINDS[recipe.kind]
        parts = set(shape.columns)
        if recipe.kind == "unpaired" and {"ref_chosen_logps", "ref_rejected_logps"} <= parts:
            parts.add("ref_logps")
        self.extras = [column for column in kind.extras if column in parts]
        self.features = datasets.Features(
            {
                **kind.columns,
                "row": datasets.Value("int64"),
                **{column: kind.extras[column] for column in self.extras},
                **{counter: datasets.Value("int32") for counter in COUNTERS},
            }
        )

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        columns = self.shape.columns
        rows = [{part: batch[column][position] for part, column in columns.items()} for position in range(len(indices))]
        if self.shape.kind == "tokens":
            encoded = [self._given(values, row) for values, row in zip(rows, indices, strict=True)]
        else:
            read = [samples.read(self.shape, values, row) for values, row in zip(rows, indices, strict=True)]
            options = self._template_options(batch, indices)
            tokenise = self._steps if self.recipe.kind == "steps" else self._continuations
            encoded = tokenise(read, options, indices)
        made: list[dict[str, Any]] = []
        stops = self._stops()
        for sample, values, row in zip(encoded, rows, indices, strict=True):
            for found in self._rows(sample, stops):
                found.update(self._extras(values, row, found.get("label", True)))
                found["row"] = self.first_row + int(row if values.get("row") is None else values["row"])
                made.append(found)
        return {column: [found[column] for found in made] for column in self.features}

    def _extras(self, values: Mapping[str, Any], row: int, label: bool) -> dict[str, Any]:
        """The values of a row that are not texts: log-probs, a margin, given token ids."""
        extras = {}
        for column in self.extras:
            part = column
            if column == "ref_logps" and column not in values:
                part = "ref_chosen_logps" if label else "ref_rejected_logps"
            where = place(row, self.shape.columns[part])
            ids = column == "kl_completion_ids"
            extras[column] = self._check_ids(values[part], where) if ids else number_of(values[part], where)
        return extras

    # -- prompts and completions -------------------------------------------------------------------------------------

    def _continuations(
        self, read: list[Sample], options: list[dict[str, Any]] | None, indices: list[int]
    ) -> list[_Encoded]:
        usable = [position for position, sample in enumerate(read) if sample.dropped == KEPT]
        full_texts = [(position, completion) for position in usable for completion in read[position].completions]
        if self.shape.conversational:
            texts = self._rendered(read, usable, full_texts, options, indices)
        else:
            texts = [Text(read[position].prompt, open=True) for position in usable]
            texts += [Text(read[position].prompt + completion) for position, completion in full_texts]
        tokens = self._each_once(texts, plain=not self.shape.conversational)
        prompts, rest = tokens[: len(usable)], iter(tokens[len(usable) :])
        encoded = [_Encoded(labels=sample.labels, dropped=sample.dropped) for sample in read]
        for position, prompt in zip(usable, prompts, strict=True):
            sample = read[position]
            found = [next(rest) for _ in sample.completions]
            if not self.shape.conversational and prompt.ids:
                found = [
                    self._separated(prompt, full_text, sample.prompt, text)
                    for full_text, text in zip(found, sample.completions, strict=True)
                ]
            common = min(common_prefix_length(prompt.ids, full_text.ids) for full_text in found)
            completions = [full_text.ids[common:] for full_text in found]
            encoded[position] = _Encoded(
                prompt=found[0].ids[:common],
                completions=completions,
                labels=sample.labels,
                dropped=_fault(common, completions),
                bos_doubled=any(full_text.bos_doubled for full_text in found),
                # A prompt that two texts share was inferred, so its end is not reported as a boundary problem.
                straddles=common < len(prompt.ids) and (self.shape.conversational or self.shape.kind != "implicit"),
                empty=sum(map(_is_blank, sample.completions)),
            )
        return encoded

    def _separated(self, prompt: Tokens, full_text: Tokens, before: str, after: str) -> Tokens:
        """The tokens of a prompt and its completion.

        If one token covers all of the prompt and the beginning of the completion, no prompt would be left: the two are
        then tokenised separately.
        """
        if common_prefix_length(prompt.ids, full_text.ids):
            return full_text
        text = before + after
        return self._tokenise_pieces(Text(text, [(len(before), len(text))]), plain=True)

    def _rendered(
        self,
        read: list[Sample],
        usable: list[int],
        full_texts: list[tuple[int, Any]],
        options: list[dict[str, Any]] | None,
        indices: list[int],
    ) -> list[Text]:
        """The prompts with the generation prompt, then all prompts with a completion, as texts.

        Text that the template adds after the last turn is removed: the model should not learn it.
        """

        def rendered(conversations: list[Any], of: list[int], part: str, prompt: bool) -> list[str]:
            own = None if options is None else [options[position] for position in of]
            column = self.shape.columns[part if part in self.shape.columns else completion_part]
            return self._render(conversations, own, [indices[position] for position in of], column, prompt)

        template = chat_template(self.tokenizer)
        completion_part = next(part for part in ("chosen", "completion", "responses") if part in self.shape.columns)
        prompts = rendered([read[position].prompt for position in usable], usable, "prompt", True) if usable else []
        conversations = [read[position].prompt + completion for position, completion in full_texts]
        owners = [position for position, _ in full_texts]
        texts = rendered(conversations, owners, completion_part, False) if usable else []
        ended = [
            template.without_tail(text, **(options[position] if options is not None else {}))
            for text, (position, _) in zip(texts, full_texts, strict=True)
        ]
        return [*(Text(prompt, open=True) for prompt in prompts), *map(Text, ended)]

    def _each_once(self, texts: list[Text], plain: bool) -> list[Tokens]:
        """The tokens of texts. Equal texts are tokenised once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        tokens = self._tokenise(list(places), plain)
        return [tokens[places[text]] for text in texts]

    # -- steps --------------------------------------------------------------------------------------------------------

    def _steps(self, read: list[Sample], options: list[dict[str, Any]] | None, indices: list[int]) -> list[_Encoded]:
        """Tokenises every step by itself, followed by the tokens of the separator."""
        prompts = [sample.prompt for sample in read]
        if self.shape.conversational:
            prompts = self._render(prompts, options, indices, self.shape.columns["prompt"], True)
        texts = [*prompts, *(step for sample in read for step in sample.completions), self.recipe.step_separator]
        *tokens, separator = self._each_once([Text(text, open=True) for text in texts], plain=False)
        rest = iter(tokens[len(read) :])
        bos = self.tokenizer.bos_token_id
        encoded = []
        for sample, prompt in zip(read, tokens[: len(read)], strict=True):
            # The prompt begins a text, so it begins with BOS, even if the tokenizer adds none.
            begins = bos is None or self.shape.conversational or prompt.ids[:1] == [bos]
            steps = [next(rest).ids for _ in sample.completions]
            mask = [
                number + 1 == len(step) + len(separator.ids)
                for step in steps
                for number in range(len(step) + len(separator.ids))
            ]
            if self.recipe.train_on_last_step_only and mask:
                mask = [False] * (len(mask) - 1) + [True]
            ids = prompt.ids if begins else [bos, *prompt.ids]
            encoded.append(
                _Encoded(
                    prompt=ids,
                    completions=[[token for step in steps for token in (*step, *separator.ids)]],
                    labels=sample.labels[-1:] if self.recipe.train_on_last_step_only else sample.labels,
                    mask=mask,
                    dropped=NO_PROMPT if not ids else EMPTY if not steps else KEPT,
                    empty=sum(not step.strip() for step in sample.completions),
                )
            )
        return encoded

    # -- tokens given by the user -------------------------------------------------------------------------------------

    def _given(self, values: Mapping[str, Any], row: int) -> _Encoded:
        wheres = {part: place(row, column) for part, column in self.shape.columns.items()}
        parts = [part for part in ("chosen_ids", "rejected_ids", "completion_ids") if part in values]
        completions = [self._check_ids(values[part], wheres[part]) for part in parts]
        if "prompt_ids" in values:
            prompt = self._check_ids(values["prompt_ids"], wheres["prompt_ids"])
        else:  # each completion contains its prompt
            common = min(common_prefix_length(*completions), *(max(len(ids) - 1, 0) for ids in completions))
            prompt, completions = completions[0][:common], [ids[common:] for ids in completions]
        labels: tuple[bool, ...] = (True, False)
        mask: list[bool] = []
        if "label" in values:
            labels = (truth_of(values["label"], wheres["label"]),)
        elif self.recipe.kind == "steps":
            mask, judged = values["step_mask"], values["step_labels"]
            if mask is None or judged is None or len(mask) != len(completions[0]) or sum(mask) != len(judged):
                raise DataError(
                    f"{wheres['step_mask']} does not fit: it needs one entry for each of the {len(completions[0])} "
                    "tokens of `completion_ids`, and as many true ones as `step_labels` has entries."
                )
            labels = tuple(truth_of(label, wheres["step_labels"]) for label in judged)
        return _Encoded(prompt, completions, labels, list(mask), _fault(len(prompt), completions))

    # -- cutting and counting -----------------------------------------------------------------------------------------

    def _rows(self, sample: _Encoded, stops: set[int]) -> list[dict[str, Any]]:
        """The rows of a sample, without the values that are not texts."""
        if self.recipe.kind != "unpaired":
            return [self._row(sample, sample.completions, stops)]
        rows = []
        for number, label in enumerate(sample.labels):
            row = self._row(sample, sample.completions[number : number + 1], stops)
            rows.append({**row, "label": label, "_empty": row["_empty"] if number == 0 else 0})
        return rows

    def _row(self, sample: _Encoded, completions: list[list[int]], stops: set[int]) -> dict[str, Any]:
        kind, dropped = self.recipe.kind, sample.dropped
        cut = self.recipe.cut(len(sample.prompt), list(map(len, completions))) if dropped == KEPT else None
        kept: list[list[int]] = [[] for _ in range(2 if kind == "pairs" else 1)]
        prompt: list[int] = []
        mask: list[bool] = []
        labels: tuple[bool, ...] = ()
        if cut is not None:
            begin, slices = cut
            prompt = sample.prompt[begin:]
            kept = [ids[which] for ids, which in zip(completions, slices, strict=True)]
            if kind == "steps":
                before, mask = sum(sample.mask[: slices[0].start]), sample.mask[slices[0]]
                labels = sample.labels[before : before + sum(mask)]
            if kind == "pairs" and kept[0] == kept[1]:
                dropped = EQUAL_CUT
            elif kind == "steps" and not labels:
                dropped = ALL_CUT
        elif dropped == KEPT:
            dropped = PROMPT_FILLS
        if dropped != KEPT:
            prompt, kept, mask, labels = [], [[] for _ in kept], [], ()
        row: dict[str, Any] = {"prompt_ids": prompt}
        row.update(zip(("chosen_ids", "rejected_ids") if kind == "pairs" else ("completion_ids",), kept, strict=True))
        if kind == "steps":
            row.update(step_mask=mask, step_labels=[int(label) for label in labels])
        lengths = [*map(len, completions), -1, -1]
        total = sum(map(len, kept))
        row.update(
            _dropped=dropped,
            _prompt=len(sample.prompt),
            _first=lengths[0],
            _second=lengths[1],
            _prompt_kept=len(prompt),
            _kept=total,
            _trainable=len(sample.labels) if kind == "steps" else sum(map(len, completions)),
            _trained=len(labels) if kind == "steps" else total,
            _end=-1 if kind == "steps" or dropped != KEPT or cut is None else _ends(completions, cut[1], stops),
            _bos_doubled=int(sample.bos_doubled),
            _straddles=int(sample.straddles),
            _empty=sample.empty,
        )
        return row


def _fault(prompt: int, completions: Sequence[Sequence[int]]) -> int:
    if not prompt:
        return NO_PROMPT
    if not all(completions):
        return EMPTY
    return IDENTICAL if len(completions) == 2 and completions[0] == completions[1] else KEPT


def _is_blank(completion: Any) -> bool:
    """Whether a completion, a text or messages, has no text and no tool calls."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(str(message.get("content") or "").strip() or message.get("tool_calls") for message in completion)


def _ends(completions: Sequence[Sequence[int]], kept: Sequence[slice], stops: set[int]) -> int:
    """The token that ends the first completion, or -1 if the kept part of a completion lacks its last end of turn."""
    ends = []
    for ids, part in zip(completions, kept, strict=True):
        last = next((at for at in reversed(range(len(ids))) if ids[at] in stops), -1)
        ends.append(ids[last] if last in range(len(ids))[part] else -1)
    return -1 if -1 in ends else ends[0]
