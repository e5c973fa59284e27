"""Odds-ratio preference optimisation: fine-tuning on the better completion and a preference, without a reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.config import BaseConfig, PreferenceFields, RouterFields
from trl.data.batching import collate
from trl.data.batching.collate import Branch, Tree
from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.reference_free import log_odds, orpo
from trl.losses.tokens import Metric, masked_mean_metric, mean_metric, seq_mean, seq_sum

from .attributes import shows
from .preference import ReferenceFreeTrainer
from .step import Step

COMPLETIONS = ("chosen_ids", "rejected_ids")


@dataclass
class ORPOConfig(PreferenceFields, RouterFields, BaseConfig):
    """Options of `ORPOTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the odds-ratio term (lambda in the paper)."})


@shows("beta", "generate_during_eval", fixed=("max_length", "max_completion_length"))
class ORPOTrainer(ReferenceFreeTrainer):
    """Trains a causal language model on pairs: the likelihood of prompt and chosen completion, and the odds of the
    chosen over the rejected one. No reference is needed. Hong et al. 2024, arXiv:2403.07691.
    """

    config_class = ORPOConfig
    method = "orpo"

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        """The prompt is trained too: a sequence of its own, before the completions. `place_P3` says which sequences are
        the prompt, the chosen and the rejected completion of each pair."""
        rows = [rows[index] for index in collate.by_prompt(rows)]
        trees, places, sequences = [], [], 0
        for tree in collate.under_prompts(rows, COMPLETIONS):
            # Nothing predicts a first token: a prompt that is nothing else is a sequence without trained tokens.
            root = Branch(tree.root.ids, [place > 0 for place in range(len(tree.root.ids))])
            lone = () if len(root.ids) > 1 else (Branch([], []),)
            trees.append(tree._replace(root=root, branches=lone + tree.branches))
            first = sequences + 1
            places += [(sequences, first + pair, first + pair + 1) for pair in range(0, len(tree.branches), 2)]
            sequences = first + len(tree.branches)
        batch = to_batch(trees)
        batch["place_P3"] = torch.tensor(places, dtype=torch.long).view(-1, 3)
        batch["tokens"] = collate.tokens_of(rows, COMPLETIONS)
        batch["nll_tokens"] = sum(len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) for row in rows)
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": batch["place_P3"].shape[0], "nll_tokens": batch["nll_tokens"]}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        beta, balance = self.args.beta, self.router_aux_loss_coef
        stats = score(model, batch, mean_logit=True, router=balance > 0)
        assert stats.mean_logit_N is not None
        sum_S = seq_sum(stats.logp_N, stats.seq_N, stats.sequences)
        mean_S = seq_mean(stats.logp_N, stats.seq_N, stats.sequences)
        place_P3 = batch["place_P3"]
        kind_S = place_P3.new_zeros(stats.sequences)
        kind_S[place_P3[:, 1]], kind_S[place_P3[:, 2]] = 1, 2
        kind_N = kind_S[stats.seq_N]  # prompt, chosen, rejected
        prompt_P, chosen_P, _ = sum_S[place_P3].unbind(1)
        _, chosen_mean_P, rejected_mean_P = mean_S[place_P3].unbind(1)
        odds_P = orpo(chosen_mean_logp_P=chosen_mean_P, rejected_mean_logp_P=rejected_mean_P, beta=beta)
        nll = -(prompt_P + chosen_P).sum()
        log_odds_P = log_odds(chosen_mean_logp_P=chosen_mean_P, rejected_mean_logp_P=rejected_mean_P).detach()
        metrics = {
            **mean_logp_metrics(chosen_mean_P, rejected_mean_P, beta),
            "logits/chosen": masked_mean_metric(stats.mean_logit_N, kind_N == 1),
            "logits/rejected": masked_mean_metric(stats.mean_logit_N, kind_N == 2),
            "nll_loss": Metric(nll.detach(), float(batch["nll_tokens"])),
            "log_odds_ratio": mean_metric(torch.nn.functional.logsigmoid(log_odds_P)),
            "log_odds_chosen": mean_metric(log_odds_P),
        }
        pairs = odds_P.sum()
        if stats.aux is not None:
            pairs = pairs + balance * stats.aux * chosen_P.shape[0]
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {"pairs": pairs, "nll_tokens": nll}, metrics


def mean_logp_metrics(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> dict[str, Metric]:
    """What is logged of pairs whose reward is beta times a log-prob, under upstream's names."""
    chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
    return {
        "rewards/chosen": mean_metric(beta * chosen_P),
        "rewards/rejected": mean_metric(beta * rejected_P),
        "rewards/accuracies": mean_metric((chosen_P > rejected_P).float()),
        "rewards/margins": mean_metric(beta * (chosen_P - rejected_P)),
        "logps/chosen": mean_metric(chosen_P),
        "logps/rejected": mean_metric(rejected_P),
    }
