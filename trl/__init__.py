"""trl: post-training for language models. Public names are resolved lazily, so that `import trl` costs milliseconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat

__version__ = "2.0.0.dev0"

if TYPE_CHECKING:
    from .callbacks import SyncRefModelCallback
    from .cli.parser import TrlParser
    from .compat import FDivergenceType
    from .config import ModelConfig, ScriptArguments
    from .data.completion_only import DataCollatorForCompletionOnlyLM
    from .data.convert import (
        apply_chat_template,
        extract_prompt,
        is_conversational,
        is_conversational_from_value,
        maybe_apply_chat_template,
        maybe_convert_to_chatml,
        maybe_extract_prompt,
        maybe_unpair_preference_dataset,
        unpair_preference_dataset,
    )
    from .data.mixture import DatasetMixtureConfig, get_dataset
    from .data.packing import pack_dataset
    from .engine.reference import create_reference_model
    from .models.adapters import get_peft_config
    from .models.load import get_quantization_config
    from .models.vocabulary import clone_chat_template
    from .trainer.bco import BCOConfig, BCOTrainer
    from .trainer.cpo import CPOConfig, CPOTrainer
    from .trainer.dpo import DPOConfig, DPOTrainer
    from .trainer.grpo import GRPOConfig, GRPOTrainer
    from .trainer.kto import KTOConfig, KTOTrainer
    from .trainer.orpo import ORPOConfig, ORPOTrainer
    from .trainer.prm import PRMConfig, PRMTrainer
    from .trainer.reward import RewardConfig, RewardTrainer
    from .trainer.rloo import RLOOConfig, RLOOTrainer
    from .trainer.sft import SFTConfig, SFTTrainer

_home = {
    "BCOConfig": "trl.trainer.bco",
    "BCOTrainer": "trl.trainer.bco",
    "CPOConfig": "trl.trainer.cpo",
    "CPOTrainer": "trl.trainer.cpo",
    "DPOConfig": "trl.trainer.dpo",
    "DPOTrainer": "trl.trainer.dpo",
    "DataCollatorForCompletionOnlyLM": "trl.data.completion_only",
    "DatasetMixtureConfig": "trl.data.mixture",
    "FDivergenceType": "trl.compat",
    "GRPOConfig": "trl.trainer.grpo",
    "GRPOTrainer": "trl.trainer.grpo",
    "KTOConfig": "trl.trainer.kto",
    "KTOTrainer": "trl.trainer.kto",
    "ModelConfig": "trl.config",
    "ORPOConfig": "trl.trainer.orpo",
    "ORPOTrainer": "trl.trainer.orpo",
    "PRMConfig": "trl.trainer.prm",
    "PRMTrainer": "trl.trainer.prm",
    "RLOOConfig": "trl.trainer.rloo",
    "RLOOTrainer": "trl.trainer.rloo",
    "RewardConfig": "trl.trainer.reward",
    "RewardTrainer": "trl.trainer.reward",
    "SFTConfig": "trl.trainer.sft",
    "SFTTrainer": "trl.trainer.sft",
    "ScriptArguments": "trl.config",
    "SyncRefModelCallback": "trl.callbacks",
    "TrlParser": "trl.cli.parser",
    "apply_chat_template": "trl.data.convert",
    "clone_chat_template": "trl.models.vocabulary",
    "create_reference_model": "trl.engine.reference",
    "extract_prompt": "trl.data.convert",
    "get_dataset": "trl.data.mixture",
    "get_peft_config": "trl.models.adapters",
    "get_quantization_config": "trl.models.load",
    "is_conversational": "trl.data.convert",
    "is_conversational_from_value": "trl.data.convert",
    "maybe_apply_chat_template": "trl.data.convert",
    "maybe_convert_to_chatml": "trl.data.convert",
    "maybe_extract_prompt": "trl.data.convert",
    "maybe_unpair_preference_dataset": "trl.data.convert",
    "pack_dataset": "trl.data.packing",
    "unpair_preference_dataset": "trl.data.convert",
}

__all__ = [
    "BCOConfig",
    "BCOTrainer",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForCompletionOnlyLM",
    "DatasetMixtureConfig",
    "FDivergenceType",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "ORPOConfig",
    "ORPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "SyncRefModelCallback",
    "TrlParser",
    "__version__",
    "apply_chat_template",
    "clone_chat_template",
    "create_reference_model",
    "extract_prompt",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "is_conversational",
    "is_conversational_from_value",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "pack_dataset",
    "unpair_preference_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _home:
        if today := compat.renamed(name):
            return getattr(import_module("trl"), today)
        raise AttributeError(compat.absence("trl", name))
    value = getattr(import_module(_home[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


compat.install()
