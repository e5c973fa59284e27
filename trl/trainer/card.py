"""The model card that is saved beside the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml

from trl.methods import METHODS
from trl.version import __version__

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


_HEADS = {row.head for row in METHODS.values()} - {"CausalLM"}


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
    row = METHODS.get(method)
    title, paper = (row.title, row.paper) if row else (f"the method `{method}`", None)
    tag = row.tag or method if row else method
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
        what=f"{thing} `{base or 'a model built in code'}`, trained by {title}.",
        use=f"from {package} import {opener}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {opener}.from_pretrained("{name}"{more})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"){padding}',
        training="\n".join(f"- {line}" for line in data),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        version=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        datasets=datasets.__version__,
        citation=f"\n## The method's paper\n\n```bibtex\n{paper.bibtex()}\n```\n" if paper else "",
    )
