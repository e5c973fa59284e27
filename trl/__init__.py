"""trl: post-training for language models. Public names are resolved lazily, so that `import trl` costs milliseconds."""

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compat import imports
from .methods import METHODS
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .callbacks import (
        BEMACallback as BEMACallback,
    )
    from .callbacks import (
        LogCompletionsCallback as LogCompletionsCallback,
    )
    from .callbacks import (
        MergeModelCallback as MergeModelCallback,
    )
    from .callbacks import (
        SyncRefModelCallback as SyncRefModelCallback,
    )
    from .callbacks import (
        WeaveCallback as WeaveCallback,
    )
    from .callbacks import (
        WinRateCallback as WinRateCallback,
    )
    from .cli.parser import (
        TrlParser as TrlParser,
    )
    from .compat.table import (
        FDivergenceType as FDivergenceType,
    )
    from .config import (
        ModelConfig as ModelConfig,
    )
    from .config import (
        ScriptArguments as ScriptArguments,
    )
    from .data.batching.completion_only import DataCollatorForCompletionOnlyLM as DataCollatorForCompletionOnlyLM
    from .data.batching.packing import pack_dataset as pack_dataset
    from .data.convert import (
        apply_chat_template as apply_chat_template,
    )
    from .data.convert import (
        extract_prompt as extract_prompt,
    )
    from .data.convert import (
        is_conversational as is_conversational,
    )
    from .data.convert import (
        is_conversational_from_value as is_conversational_from_value,
    )
    from .data.convert import (
        maybe_apply_chat_template as maybe_apply_chat_template,
    )
    from .data.convert import (
        maybe_convert_to_chatml as maybe_convert_to_chatml,
    )
    from .data.convert import (
        maybe_extract_prompt as maybe_extract_prompt,
    )
    from .data.convert import (
        maybe_unpair_preference_dataset as maybe_unpair_preference_dataset,
    )
    from .data.convert import (
        unpair_preference_dataset as unpair_preference_dataset,
    )
    from .data.mixture import (
        DatasetMixtureConfig as DatasetMixtureConfig,
    )
    from .data.mixture import (
        get_dataset as get_dataset,
    )
    from .engine.reference import (
        create_reference_model as create_reference_model,
    )
    from .models.adapters import (
        get_peft_config as get_peft_config,
    )
    from .models.load import (
        get_quantization_config as get_quantization_config,
    )
    from .models.vocabulary import (
        clone_chat_template as clone_chat_template,
    )
    from .models.with_value_head import (
        AutoModelForCausalLMWithValueHead as AutoModelForCausalLMWithValueHead,
    )
    from .models.with_value_head import (
        AutoModelForSeq2SeqLMWithValueHead as AutoModelForSeq2SeqLMWithValueHead,
    )
    from .rewards.pairwise import (
        AllTrueJudge as AllTrueJudge,
    )
    from .rewards.pairwise import (
        BaseBinaryJudge as BaseBinaryJudge,
    )
    from .rewards.pairwise import (
        BaseJudge as BaseJudge,
    )
    from .rewards.pairwise import (
        BasePairwiseJudge as BasePairwiseJudge,
    )
    from .rewards.pairwise import (
        BaseRankJudge as BaseRankJudge,
    )
    from .rewards.pairwise import (
        FunctionJudge as FunctionJudge,
    )
    from .rewards.pairwise import (
        HfPairwiseJudge as HfPairwiseJudge,
    )
    from .rewards.pairwise import (
        OpenAIPairwiseJudge as OpenAIPairwiseJudge,
    )
    from .rewards.pairwise import (
        PairRMJudge as PairRMJudge,
    )
    from .rewards.pairwise import (
        RewardModelJudge as RewardModelJudge,
    )
    from .rollout.best_of_n import (
        BestOfNSampler as BestOfNSampler,
    )
    from .trainer.bco import (
        BCOConfig as BCOConfig,
    )
    from .trainer.bco import (
        BCOTrainer as BCOTrainer,
    )
    from .trainer.cpo import (
        CPOConfig as CPOConfig,
    )
    from .trainer.cpo import (
        CPOTrainer as CPOTrainer,
    )
    from .trainer.distillation import (
        DistillationConfig as DistillationConfig,
    )
    from .trainer.distillation import (
        DistillationTrainer as DistillationTrainer,
    )
    from .trainer.dpo import (
        DPOConfig as DPOConfig,
    )
    from .trainer.dpo import (
        DPOTrainer as DPOTrainer,
    )
    from .trainer.gkd import (
        GKDConfig as GKDConfig,
    )
    from .trainer.gkd import (
        GKDTrainer as GKDTrainer,
    )
    from .trainer.grpo import (
        GRPOConfig as GRPOConfig,
    )
    from .trainer.grpo import (
        GRPOTrainer as GRPOTrainer,
    )
    from .trainer.iterative_sft import (
        IterativeSFTConfig as IterativeSFTConfig,
    )
    from .trainer.iterative_sft import (
        IterativeSFTTrainer as IterativeSFTTrainer,
    )
    from .trainer.kl_control import (
        AdaptiveKLController as AdaptiveKLController,
    )
    from .trainer.kl_control import (
        FixedKLController as FixedKLController,
    )
    from .trainer.kto import (
        KTOConfig as KTOConfig,
    )
    from .trainer.kto import (
        KTOTrainer as KTOTrainer,
    )
    from .trainer.minillm import (
        MiniLLMConfig as MiniLLMConfig,
    )
    from .trainer.minillm import (
        MiniLLMTrainer as MiniLLMTrainer,
    )
    from .trainer.nash_md import (
        NashMDConfig as NashMDConfig,
    )
    from .trainer.nash_md import (
        NashMDTrainer as NashMDTrainer,
    )
    from .trainer.online_dpo import (
        OnlineDPOConfig as OnlineDPOConfig,
    )
    from .trainer.online_dpo import (
        OnlineDPOTrainer as OnlineDPOTrainer,
    )
    from .trainer.orpo import (
        ORPOConfig as ORPOConfig,
    )
    from .trainer.orpo import (
        ORPOTrainer as ORPOTrainer,
    )
    from .trainer.ppo import (
        PPOConfig as PPOConfig,
    )
    from .trainer.ppo import (
        PPOTrainer as PPOTrainer,
    )
    from .trainer.prm import (
        PRMConfig as PRMConfig,
    )
    from .trainer.prm import (
        PRMTrainer as PRMTrainer,
    )
    from .trainer.progress import (
        RichProgressCallback as RichProgressCallback,
    )
    from .trainer.reward import (
        RewardConfig as RewardConfig,
    )
    from .trainer.reward import (
        RewardTrainer as RewardTrainer,
    )
    from .trainer.rloo import (
        RLOOConfig as RLOOConfig,
    )
    from .trainer.rloo import (
        RLOOTrainer as RLOOTrainer,
    )
    from .trainer.sft import (
        SFTConfig as SFTConfig,
    )
    from .trainer.sft import (
        SFTTrainer as SFTTrainer,
    )
    from .trainer.xpo import (
        XPOConfig as XPOConfig,
    )
    from .trainer.xpo import (
        XPOTrainer as XPOTrainer,
    )


def _of_methods() -> dict[str, str]:
    return {f"{row.name}{part}": row.module for row in METHODS.values() for part in ("Config", "Trainer")}


_JUDGES = (
    *("AllTrueJudge", "BaseBinaryJudge", "BaseJudge", "BasePairwiseJudge", "BaseRankJudge", "FunctionJudge"),
    *("HfPairwiseJudge", "OpenAIPairwiseJudge", "PairRMJudge", "RewardModelJudge"),
)
_HOMES = {
    **_of_methods(),
    "AdaptiveKLController": "trl.trainer.kl_control",
    "BEMACallback": "trl.callbacks",
    "BestOfNSampler": "trl.rollout.best_of_n",
    "AutoModelForCausalLMWithValueHead": "trl.models.with_value_head",
    "AutoModelForSeq2SeqLMWithValueHead": "trl.models.with_value_head",
    **dict.fromkeys(_JUDGES, "trl.rewards.pairwise"),
    "DataCollatorForCompletionOnlyLM": "trl.data.batching.completion_only",
    "DatasetMixtureConfig": "trl.data.mixture",
    "FDivergenceType": "trl.compat.table",
    "FixedKLController": "trl.trainer.kl_control",
    "LogCompletionsCallback": "trl.callbacks",
    "MergeModelCallback": "trl.callbacks",
    "ModelConfig": "trl.config",
    "RichProgressCallback": "trl.trainer.progress",
    "ScriptArguments": "trl.config",
    "SyncRefModelCallback": "trl.callbacks",
    "TrlParser": "trl.cli.parser",
    "WeaveCallback": "trl.callbacks",
    "WinRateCallback": "trl.callbacks",
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
    "pack_dataset": "trl.data.batching.packing",
    "unpair_preference_dataset": "trl.data.convert",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or _of_methods().get(name)  # a row may have come since
    if home is None:
        if today := imports.renamed(name):
            return getattr(import_module("trl"), today)
        if place := imports.helper(name):
            return getattr(import_module(place[0]), place[1])
        raise AttributeError(imports.absence("trl", name))
    collects = gc.isenabled()
    gc.disable()  # what is imported is no garbage, and would be looked through again and again while it grows
    try:
        value = getattr(import_module(home), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


imports.install()
