"""The model card that is saved beside the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml

from trl import checkpoint
from trl.methods import METHODS
from trl.models.unwrap import unwrap
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


def write_card(
    trainer: Any,
    folder: Path,
    name: str | None,
    datasets_used: Any,
    tags: str | Sequence[str] | None,
    header: dict[str, Any],
) -> None:
    """Write the card of a trainer's model into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    base, args, seen = unwrap(trainer.model), trainer.args, trainer.state
    header = dict(header)
    card = model_card(
        name=name or args.hub_model_id or checkpoint.published_name(folder),
        base=header.pop("finetuned_from", None) or getattr(base.config, "_name_or_path", None) or None,
        model_class=type(base).__name__,
        method=trainer.method,
        adapter=hasattr(trainer.model, "peft_config"),
        data=[line for report in trainer.reports.values() for line in report.lines()[:2]],
        facts={
            "learning rate": args.learning_rate,
            "rows a step": trainer.rows_of_a_step(),
            "steps": seen.global_step,
            "epochs": round(seen.epoch or 0.0, 2),
            "seed": args.seed,
        },
        datasets_used=datasets_used or header.pop("dataset", None),
        tags=[tags] if isinstance(tags, str) else tags or (),
        header=header,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
