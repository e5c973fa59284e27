"""trl: post-training for language models. Public names are resolved lazily, so that `import trl` costs milliseconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat

__version__ = "2.0.0.dev0"

if TYPE_CHECKING:
    from .config import ModelConfig, ScriptArguments
    from .data.completion_only import DataCollatorForCompletionOnlyLM
    from .data.mixture import DatasetMixtureConfig
    from .data.packing import pack_dataset
    from .models.adapters import get_peft_config
    from .models.load import get_quantization_config
    from .models.vocabulary import clone_chat_template
    from .trainer.sft import SFTConfig, SFTTrainer

_home = {
    "DataCollatorForCompletionOnlyLM": "trl.data.completion_only",
    "DatasetMixtureConfig": "trl.data.mixture",
    "ModelConfig": "trl.config",
    "ScriptArguments": "trl.config",
    "SFTConfig": "trl.trainer.sft",
    "SFTTrainer": "trl.trainer.sft",
    "clone_chat_template": "trl.models.vocabulary",
    "get_peft_config": "trl.models.adapters",
    "get_quantization_config": "trl.models.load",
    "pack_dataset": "trl.data.packing",
}

__all__ = [
    "DataCollatorForCompletionOnlyLM",
    "DatasetMixtureConfig",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "__version__",
    "clone_chat_template",
    "get_peft_config",
    "get_quantization_config",
    "pack_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _home:
        if today := compat.renamed(name):
            return getattr(import_module("trl"), today)
        raise AttributeError(f"module 'trl' has no attribute {name!r}")
    value = getattr(import_module(_home[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


compat.install()
