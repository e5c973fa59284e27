"""The model card that is saved beside the weights."""

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

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

# How a method is called, and its paper.
_METHODS = {
    "sft": ("supervised fine-tuning", ""),
    "dpo": ("direct preference optimisation", "Rafailov et al. 2023, arXiv:2305.18290"),
    "kto": ("Kahneman–Tversky optimisation", "Ethayarajh et al. 2024, arXiv:2402.01306"),
    "orpo": ("odds-ratio preference optimisation", "Hong et al. 2024, arXiv:2403.07691"),
    "cpo": ("contrastive preference optimisation", "Xu et al. 2024, arXiv:2401.08417"),
    "bco": ("binary classifier optimisation", "Jung et al. 2024, arXiv:2404.04656"),
    "reward": ("reward modelling", "Ouyang et al. 2022, arXiv:2203.02155"),
    "grpo": ("group-relative policy optimisation", "Shao et al. 2024, arXiv:2402.03300"),
    "rloo": ("REINFORCE leave-one-out", "Ahmadian et al. 2024, arXiv:2402.14740"),
    "prm": ("process reward modelling", "Lightman et al. 2023, arXiv:2305.20050"),
}


def model_card(
    *, name: str, base: str | None, method: str, adapter: bool, data: list[str], facts: dict[str, Any]
) -> str:
    """A README.md: what was trained from what, on which data, with which settings, and how to open it."""
    words, citation = _METHODS[method]
    header = "library_name: " + ("peft" if adapter else "transformers") + "\n"
    if base and not Path(base).exists():
        header += f"base_model: {base}\n"
    header += f"tags:\n- trl\n- {method}\n"
    head = {"reward": "SequenceClassification", "prm": "TokenClassification"}.get(method, "CausalLM")
    opener = f"AutoPeftModelFor{head}" if adapter else f"AutoModelFor{head}"
    package = "peft" if adapter else "transformers"
    # The folder of an adapter does not say how many numbers its head gives; transformers would guess two.
    more = ", num_labels=1" if adapter and method == "reward" else ""
    thing = "A LoRA adapter for" if adapter else "A model fine-tuned from"
    return _CARD.format(
        header=header,
        name=name,
        what=f"{thing} `{base or 'a model built in code'}`, trained by {words}.",
        use=f"from {package} import {opener}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {opener}.from_pretrained("{name}"{more})\ntokenizer = AutoTokenizer.from_pretrained("{name}")',
        training="\n".join(f"- {line}" for line in data),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        version=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        datasets=datasets.__version__,
        citation=f"\nMethod: {citation}.\n" if citation else "",
    )
