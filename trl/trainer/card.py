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

_METHODS = {"sft": ("supervised fine-tuning", "")}


def model_card(
    *, name: str, base: str | None, method: str, adapter: bool, data: list[str], facts: dict[str, Any]
) -> str:
    """A README.md: what was trained from what, on which data, with which settings, and how to open it."""
    words, citation = _METHODS[method]
    header = "library_name: " + ("peft" if adapter else "transformers") + "\n"
    if base and not Path(base).exists():
        header += f"base_model: {base}\n"
    header += f"tags:\n- trl\n- {method}\n"
    opener = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    package = "peft" if adapter else "transformers"
    thing = "A LoRA adapter for" if adapter else "A model fine-tuned from"
    return _CARD.format(
        header=header,
        name=name,
        what=f"{thing} `{base or 'a model built in code'}`, trained by {words}.",
        use=f"from {package} import {opener}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {opener}.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")',
        training="\n".join(f"- {line}" for line in data),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        version=__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        datasets=datasets.__version__,
        citation=citation,
    )
