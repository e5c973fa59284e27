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


METHODS = {
    "sft": Method(
        "SFT",
        "supervised fine-tuning",
        "texts, chats, prompts with completions",
        "trl.trainer.sft",
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
    ),
    "kto": Method(
        "KTO",
        "Kahneman-Tversky optimisation",
        "completions labelled good or bad",
        "trl.trainer.kto",
        Paper("KTO: Model Alignment as Prospect Theoretic Optimization", "Ethayarajh, Kawin", 2024, "2402.01306"),
        experimental=True,
    ),
    "orpo": Method(
        "ORPO",
        "odds-ratio preference optimisation",
        "pairs, fine-tuning and preferring at once, without a reference",
        "trl.trainer.orpo",
        Paper("ORPO: Monolithic Preference Optimization without Reference Model", "Hong, Jiwoo", 2024, "2403.07691"),
        experimental=True,
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
    ),
    "prm": Method(
        "PRM",
        "process reward modelling",
        "solutions whose steps are labelled",
        "trl.trainer.prm",
        Paper("Let's Verify Step by Step", "Lightman, Hunter", 2023, "2305.20050"),
        head="TokenClassification",
        experimental=True,
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
    ),
    "minillm": Method(
        "MiniLLM",
        "distillation by the reverse KL as a reward",
        "prompts; a teacher rewards each token of the model's completions",
        "trl.trainer.minillm",
        Paper("MiniLLM: Knowledge Distillation of Large Language Models", "Gu, Yuxian", 2023, "2306.08543"),
        experimental=True,
    ),
}
