"""The model card that is saved beside the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import yaml

from trl import __version__

_CARD = """---
{header}---

# {name}

{what}

## Use

```python
{use}
```

## Training

{training}

| | |
|---|---|
{facts}

Written by trl {version} (transformers {transformers}, torch {torch}, datasets {datasets}).
{citation}"""



class Paper(NamedTuple):
    title: str
    author: str  # the first of them
    year: int
    arxiv: str

    def bibtex(self) -> str:
        family = self.author.partition(",")[0].lower()
        return (
            f"@misc{{{family}{self.year},\n  title = {{{{{self.title}}}}},\n  author = {{{self.author} and others}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n}}"
        )


# How a method is called in words and as a tag of upstream's cards, and its paper. Others go by their own names.
_METHODS: dict[str, tuple[str, str, Paper | None]] = {
    "sft": ("supervised fine-tuning", "sft", None),
    "dpo": (
        "direct preference optimisation",
        "dpo",
        Paper(
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "Rafailov, Rafael",
            2023,
            "2305.18290",
        ),
    ),
    "kto": (
        "Kahneman–Tversky optimisation",
        "kto",
        Paper("KTO: Model Alignment as Prospect Theoretic Optimization", "Ethayarajh, Kawin", 2024, "2402.01306"),
    ),
    "orpo": (
        "odds-ratio preference optimisation",
        "orpo",
        Paper("ORPO: Monolithic Preference Optimization without Reference Model", "Hong, Jiwoo", 2024, "2403.07691"),
    ),
    "cpo": (
        "contrastive preference optimisation",
        "cpo",
        Paper(
            "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
            "Xu, Haoran",
            2024,
            "2401.08417",
        ),
    ),
    "bco": (
        "binary classifier optimisation",
        "bco",
        Paper(
            "Binary Classifier Optimization for Large Language Model Alignment", "Jung, Seungjae", 2024, "2404.04656"
        ),
    ),
    "reward": (
        "reward modelling",
        "reward-trainer",
        Paper(
            "Training Language Models to Follow Instructions with Human Feedback", "Ouyang, Long", 2022, "2203.02155"
        ),
    ),
    "grpo": (
        "group-relative policy optimisation",
        "grpo",
        Paper(
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            "Shao, Zhihong",
            2024,
            "2402.03300",
        ),
    ),
    "rloo": (
        "REINFORCE leave-one-out",
        "rloo",
        Paper(
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            "Ahmadian, Arash",
            2024,
            "2402.14740",
        ),
    ),
    "prm": (
        "process reward modelling",
        "prm",
        Paper("Let's Verify Step by Step", "Lightman, Hunter", 2023, "2305.20050"),
    ),
}
_HEADS = ("SequenceClassification", "TokenClassification")


def model_card(
    *,
    name: str,
    base: str | None,
    model_class: str,
    method: str,
    adapter: bool,
    data: list[str],
    facts: dict[str, Any],
    datasets_used: Any = None,
    tags: Sequence[str] = (),
    header: Mapping[str, Any] | None = None,
) -> str:
    """A README.md: what was trained from what, on which data, with which settings, and how to open it.

    `header` holds further entries of the metadata block, as the Hub reads them: language, license and the like.
    """
    words, tag, paper = _METHODS.get(method, (f"the method `{method}`", method, None))
    entries: dict[str, Any] = {
        "base_model": base if base and not Path(base).exists() else None,
        "datasets": datasets_used,
        "library_name": "peft" if adapter else "transformers",
        "model_name": name,
        **(header or {}),
        "tags": list(dict.fromkeys(["generated_from_trainer", "trl", tag, *tags])),
    }
    head = next((each for each in _HEADS if model_class.endswith(f"For{each}")), "CausalLM")
    opener = f"AutoPeftModelFor{head}" if adapter else f"AutoModelFor{head}"
    package = "peft" if adapter else "transformers"
    # The folder of an adapter does not say how many numbers its head gives; transformers would guess two.
    more = ", num_labels=1" if adapter and head == "SequenceClassification" else ""
    # Nor with what it pads: a score is read at the last token that is not padding.
    padding = "\nmodel.config.pad_token_id = tokenizer.pad_token_id" if more else ""
    thing = "A LoRA adapter for" if adapter else "A model fine-tuned from"
    return _CARD.format(
        header=yaml.safe_dump(
            {key: value for key, value in entries.items() if value}, sort_keys=False, allow_unicode=True
        ),
        name=name,
        what=f"{thing} `{base or 'a model built in code'}`, trained by {words}.",
        use=f"from {package} import {opener}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {opener}.from_pretrained("{name}"{more})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"){padding}',
        training="\n".join(f"- {line}" for line in data),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        version=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        datasets=datasets.__version__,
        citation=f"\n## The method\'s paper\n\n```bibtex\n{paper.bibtex()}\n```\n" if paper else "",
    )
