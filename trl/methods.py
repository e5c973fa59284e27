"""The methods of post-training, one row each.

The public names, the commands, the model card and the table of older import paths are made of these rows. Nothing is
imported here: `import trl` reads this module.
"""

from typing import NamedTuple


class Paper(NamedTuple):
    title: str
    author: str  # the first author: family name, given name
    year: int
    arxiv: str

    def bibtex(self) -> str:
        family = self.author.partition(",")[0].lower()
        return (
            f"@misc{{{family}{self.year},\n  title = {{{{{self.title}}}}},\n  author = {{{self.author} and others}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n}}"
        )


class Method(NamedTuple):
    """A method: `module` has its classes, `<name>Config` and `<name>Trainer`."""

    name: str
    title: str  # in words, as in "trained by <title>"
    summary: str  # what it trains on
    module: str
    paper: Paper | None = None
    head: str = "CausalLM"  # the kind of model that is trained, as in transformers' AutoModelFor<head>
    judged: bool = False  # by reward functions: its command takes --reward_funcs
    tag: str = ""  # of the model card; default: the method's own key
    experimental: bool = False  # upstream keeps it in trl.experimental
    command: bool = True  # whether the command line runs it; not where the loop is the user's own
    metrics: tuple[str, ...] = ("loss", "grad_norm")  # those that the screen shows; the run is about the first


_TOKENS = ("loss", "mean_token_accuracy", "entropy", "grad_norm")
_PAIRS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "grad_norm")
_LABELLED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "delta", "grad_norm")
_COMPLETIONS = ("completions/mean_length", "completions/clipped_ratio")
_GROUPS = (
    "reward",
    "reward_std",
    "rewards/*/mean",
    "frac_reward_zero_std",
    *_COMPLETIONS,
    "kl",
    "entropy",
    "grad_norm",
)
_SCORES = ("objective/scores", "objective/kl", "objective/entropy", "val/error", "policy/clipfrac_avg", *_COMPLETIONS)
# `_OWN_LOOP`: as PPO's `step` and `log_stats` name them.
_OWN_LOOP = ("env/reward_mean", "ppo/loss/policy", "ppo/loss/value")
_SAMPLED_PAIRS = ("loss", "reward", "rewards/accuracies", "rewards/margins", "objective/kl", *_COMPLETIONS, "grad_norm")

METHODS = {
    "sft": Method(
        "SFT",
        "supervised fine-tuning",
        "texts, chats, prompts with completions",
        "trl.trainer.sft",
        metrics=_TOKENS,
    ),
    "iterative-sft": Method(
        "IterativeSFT",
        "iterative supervised fine-tuning",
        "texts or token ids, a step at a time in a loop of one's own",
        "trl.trainer.iterative_sft",
        command=False,
    ),
    "dpo": Method(
        "DPO",
        "direct preference optimisation",
        "pairs of a chosen and a rejected completion",
        "trl.trainer.dpo",
        Paper(
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "Rafailov, Rafael",
            2023,
            "2305.18290",
        ),
        metrics=_PAIRS,
    ),
    "kto": Method(
        "KTO",
        "Kahneman-Tversky optimisation",
        "completions labelled good or bad",
        "trl.trainer.kto",
        Paper("KTO: Model Alignment as Prospect Theoretic Optimization", "Ethayarajh, Kawin", 2024, "2402.01306"),
        experimental=True,
        metrics=_LABELLED,
    ),
    "orpo": Method(
        "ORPO",
        "odds-ratio preference optimisation",
        "pairs, fine-tuning and preferring at once, without a reference",
        "trl.trainer.orpo",
        Paper("ORPO: Monolithic Preference Optimization without Reference Model", "Hong, Jiwoo", 2024, "2403.07691"),
        experimental=True,
        metrics=("loss", "nll_loss", "rewards/accuracies", "log_odds_ratio", "grad_norm"),
    ),
    "cpo": Method(
        "CPO",
        "contrastive preference optimisation",
        "pairs, without a reference; also SimPO and AlphaPO",
        "trl.trainer.cpo",
        Paper(
            "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
            "Xu, Haoran",
            2024,
            "2401.08417",
        ),
        experimental=True,
        metrics=("loss", "nll_loss", *_PAIRS[1:]),
    ),
    "bco": Method(
        "BCO",
        "binary classifier optimisation",
        "completions labelled good or bad",
        "trl.trainer.bco",
        Paper(
            "Binary Classifier Optimization for Large Language Model Alignment", "Jung, Seungjae", 2024, "2404.04656"
        ),
        experimental=True,
        metrics=_LABELLED,
    ),
    "grpo": Method(
        "GRPO",
        "group-relative policy optimisation",
        "prompts; the model's completions are judged by reward functions",
        "trl.trainer.grpo",
        Paper(
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            "Shao, Zhihong",
            2024,
            "2402.03300",
        ),
        judged=True,
        metrics=_GROUPS,
    ),
    "rloo": Method(
        "RLOO",
        "REINFORCE leave-one-out",
        "prompts; the model's completions are judged by reward functions",
        "trl.trainer.rloo",
        Paper(
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            "Ahmadian, Arash",
            2024,
            "2402.14740",
        ),
        judged=True,
        metrics=_GROUPS,
    ),
    "ppo": Method(
        "PPO",
        "proximal policy optimisation",
        "prompts; the model's completions are judged, and a value function says which tokens were worth it",
        "trl.trainer.ppo",
        Paper("Proximal Policy Optimization Algorithms", "Schulman, John", 2017, "1707.06347"),
        judged=True,
        experimental=True,
        metrics=(*_SCORES, *_OWN_LOOP),
    ),
    "online-dpo": Method(
        "OnlineDPO",
        "online direct preference optimisation",
        "prompts; two completions of the model are compared by reward functions or a judge",
        "trl.trainer.online_dpo",
        Paper("Direct Language Model Alignment from Online AI Feedback", "Guo, Shangmin", 2024, "2402.04792"),
        judged=True,
        experimental=True,
        metrics=_SAMPLED_PAIRS,
    ),
    "xpo": Method(
        "XPO",
        "exploratory preference optimisation",
        "prompts; a completion of the model and one of the reference are compared by a reward function or a judge",
        "trl.trainer.xpo",
        Paper(
            "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF",
            "Xie, Tengyang",
            2024,
            "2405.21046",
        ),
        judged=True,
        experimental=True,
        metrics=_SAMPLED_PAIRS,
    ),
    "nash-md": Method(
        "NashMD",
        "Nash learning by mirror descent",
        "prompts; completions of the model and of a mixture with the reference are compared by a reward function or a "
        "judge",
        "trl.trainer.nash_md",
        Paper("Nash Learning from Human Feedback", "Munos, Rémi", 2023, "2312.00886"),
        judged=True,
        experimental=True,
        metrics=_SAMPLED_PAIRS,
    ),
    "reward": Method(
        "Reward",
        "reward modelling",
        "pairs of a chosen and a rejected completion",
        "trl.trainer.reward",
        Paper(
            "Training Language Models to Follow Instructions with Human Feedback", "Ouyang, Long", 2022, "2203.02155"
        ),
        head="SequenceClassification",
        tag="reward-trainer",
        metrics=("loss", "accuracy", "margin", "grad_norm"),
    ),
    "prm": Method(
        "PRM",
        "process reward modelling",
        "solutions whose steps are labelled",
        "trl.trainer.prm",
        Paper("Let's Verify Step by Step", "Lightman, Hunter", 2023, "2305.20050"),
        head="TokenClassification",
        experimental=True,
        metrics=("loss", "accuracy", "grad_norm"),
    ),
    "gkd": Method(
        "GKD",
        "generalised knowledge distillation",
        "texts, chats, prompts with completions, and completions of the model; a teacher judges each token",
        "trl.trainer.gkd",
        Paper(
            "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
            "Agarwal, Rishabh",
            2023,
            "2306.13649",
        ),
        experimental=True,
        metrics=_TOKENS,
    ),
    "distillation": Method(
        "Distillation",
        "on-policy distillation",
        "prompts; a teacher judges each token of the model's completions",
        "trl.trainer.distillation",
        Paper(
            "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
            "Agarwal, Rishabh",
            2023,
            "2306.13649",
        ),
        experimental=True,
        metrics=("loss", "entropy", *_COMPLETIONS, "grad_norm"),
    ),
    "minillm": Method(
        "MiniLLM",
        "distillation by the reverse KL as a reward",
        "prompts; a teacher rewards each token of the model's completions",
        "trl.trainer.minillm",
        Paper("MiniLLM: Knowledge Distillation of Large Language Models", "Gu, Yuxian", 2023, "2306.08543"),
        experimental=True,
        metrics=("loss", "teacher_divergence", "teacher_advantage", *_COMPLETIONS, "grad_norm"),
    ),
}
