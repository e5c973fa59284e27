"""What callers of upstream TRL 1.16 can name and read, against the table that `record_api.py` recorded.

Each difference that stays is listed here with its reason; a difference that is gone must leave the list.
"""

import dataclasses
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import trl
from trl.compat.arguments import rows_of
from trl.compat.imports import absence
from trl.compat.table import ArgumentError

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import tiny  # noqa: E402

TABLE = json.loads(Path(__file__).with_name("api.json").read_text(encoding="utf-8"))
METHODS = ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "ORPO", "CPO", "Distillation", "GKD"]

NO_VLLM = "drawn by the sampler of this process: compat names what stands in"
ONE_HEAD = "the head always projects trained tokens alone"
PADDED = "there are no padded batches that it could be a part of"
FIELDS = {  # which no config has, and which compat may know as older words
    "use_vllm": NO_VLLM,
    "cast_lm_head_to_fp32": ONE_HEAD,
}
HOOK = "a hook of upstream's loop, which is another loop here"
NO_TOOLS = "there are no tools and environments yet"
ATTRIBUTES = {
    "maybe_activation_offload_context": "offloading is not a context that callers enter",
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_importance_sampling_correction"), NO_VLLM),
    **dict.fromkeys(("vllm_mode", "vllm_tensor_parallel_size"), NO_VLLM),
    **dict.fromkeys(("environment_factories", "max_tool_calling_iterations"), NO_TOOLS),
    "log_multimodal": "there are no images yet",
    **dict.fromkeys(("pad_to_multiple_of", "padding_value", "pad_token_id", "use_dpo_data_collator"), PADDED),
    **dict.fromkeys(("get_gamma_weights", "get_high_entropy_mask", "get_off_policy_mask"), "functions of trl.losses"),
    **dict.fromkeys(("odds_ratio_loss", "cpo_loss"), "functions of trl.losses"),
    **dict.fromkeys(("build_tokenized_answer", "concatenated_forward", "concatenated_inputs", "tokenize_row"), HOOK),
    **dict.fromkeys(("generate_from_model", "get_batch_logps", "get_batch_loss_metrics", "store_metrics"), HOOK),
    "generalized_jsd_loss": "a measure of the engine, trl.engine.divergence",
    "generate_on_policy_outputs": HOOK,
    "model_kwarg_keys": "the engine asks the model's signature itself",
    "aux_loss_coef": "router_aux_loss_coef, as in the other trainers",
    "is_encoder_decoder": "encoder-decoders are not supported",
}
ROWS = [
    {"prompt": "w5 w6", "chosen": " w7 w8 w9", "rejected": " w10"},
    {"prompt": "w11", "chosen": " w12", "rejected": " w13 w14"},
]


@pytest.mark.parametrize("path", TABLE["names"])
def test_each_name_is_there_or_says_what_is_there_instead(path):
    try:
        module = import_module(path)
    except ImportError as error:
        assert ": " in str(error) or "`dir(trl)`" in str(error), error
        return
    for name in TABLE["names"][path]:
        try:
            found = __import__(path, fromlist=[name])
            assert getattr(found, name) is getattr(module, name)
        except ImportError as error:
            assert f"module {path!r} has no attribute {name!r}" in str(error) and ": " in str(error), error
            assert not hasattr(module, name)


def test_sentences_of_names_that_are_not_there():
    assert absence("trl", "GOLDTrainer").endswith("in this process, with the student's tokenizer")
    assert absence("trl", "SFTTrainr") == "module 'trl' has no attribute 'SFTTrainr'; did you mean `SFTTrainer`?"
    for older in ("DPPOTrainer", "DDPOTrainer", "GOLDTrainer"):
        with pytest.raises(ImportError, match=f"no attribute '{older}': "):
            __import__("trl", fromlist=[older])
    with pytest.raises(ModuleNotFoundError, match="in this process, with the student's tokenizer"):
        import_module("trl.experimental.gold")
    assert not hasattr(trl, "GOLDTrainer") and getattr(trl, "GOLDTrainer", None) is None


def test_fields():
    for config, names in TABLE["fields"].items():
        cls = getattr(trl, config)
        ours = {field.name for field in dataclasses.fields(cls)}
        older = rows_of(cls)
        missing = [name for name in names if name not in ours and name not in older and name not in FIELDS]
        assert not missing, (config, missing)


def test_arguments_stand_in_their_places():
    for trainer, names in TABLE["parameters"].items():
        ours = inspect.signature(getattr(trl, trainer)).parameters
        assert list(ours)[: len(names)] == names, trainer
        for name in list(ours)[len(names) :]:
            assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, (trainer, name)


def length(completions, **kwargs):
    return [float(len(each)) for each in completions]


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """A trainer of a method after one step and one evaluation."""
    method = request.param
    online = method in ("GRPO", "RLOO")
    more = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "log_completions": True} if online else {}
    if method in ("Distillation", "GKD"):
        more = {"max_completion_length": 6} if method == "Distillation" else {"max_new_tokens": 6}
    if method == "GRPO":
        more |= {"entropy_coef": 0.01, "use_adaptive_entropy": True}
    config = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path_factory.mktemp(method)),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=4 if online else 2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        **more,
    )
    rows = ROWS
    if method == "SFT":
        rows = [{"text": "w5 w6 w7"}, {"text": "w8 w9"}]
    elif method == "KTO":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i == 0} for i, row in enumerate(ROWS)]
    elif method == "GKD":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    elif online or method == "Distillation":
        rows = [{"prompt": row["prompt"]} for row in ROWS]
    rows = Dataset.from_list(rows)
    torch.manual_seed(0)
    trainer = getattr(trl, f"{method}Trainer")(
        model=tiny.scorer() if method == "Reward" else tiny.policy(),
        args=config,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tokenizer(),
        **({"reward_funcs": length} if online else {}),
        **({"teacher_model": tiny.reference()} if method in ("Distillation", "GKD") else {}),
        **({"ref_model": tiny.reference()} if method in ("DPO", "KTO") else {}),
    )
    trainer.train()
    return method, trainer


def test_attributes_and_metrics(run):
    method, trainer = run
    missing = [name for name in TABLE["attributes"][f"{method}Trainer"] if not hasattr(trainer, name)]
    assert [name for name in missing if name not in ATTRIBUTES] == []
    for line, kind in zip(trainer.state.log_history, ("train", "eval"), strict=False):
        assert set(TABLE["metrics"][f"{method}Trainer"][kind]) <= line.keys(), kind
    train, evaluation = trainer.state.log_history[:2]
    assert evaluation["eval_num_tokens"] == train["num_tokens"] > 0
    if method in ("GRPO", "RLOO"):
        assert 0 < train["step_time"] < 60
        assert (Path(trainer.args.output_dir) / "completions" / "completions_00000.parquet").exists()


def test_no_difference_is_listed_in_vain():
    for trainer, names in TABLE["attributes"].items():
        for name in names:
            assert not (name in ATTRIBUTES and hasattr(getattr(trl, trainer), name)), name
    assert ATTRIBUTES.keys() <= {name for names in TABLE["attributes"].values() for name in names}


def test_attributes_are_the_fields_of_the_config(run):
    method, trainer = run
    if method == "DPO":
        assert trainer.loss_types == ["sigmoid"] and trainer.loss_weights == [1.0] and trainer.beta == 0.1
        assert trainer.ref_model is trainer.reference.model is not None
        trainer.beta = 0.5
        assert trainer.args.beta == 0.5
        batch = next(iter(trainer.get_eval_dataloader()))
        chosen, rejected = trainer.compute_ref_log_probs(batch)
        assert chosen.shape == rejected.shape == (2,) and bool((chosen < 0).all())
    if method == "KTO":
        assert trainer.calculate_KL and trainer.loss_type == "kto" and trainer.desirable_weight == 1.0
    if method in ("GRPO", "RLOO"):
        assert trainer.reward_funcs == [length] and trainer.reward_func_names == ["length"]
        assert (trainer.epsilon_low, trainer.epsilon_high, trainer.num_generations) == (0.2, 0.2, 4)
        asked = trainer.generation_config
        assert (asked.max_new_tokens, asked.do_sample, asked.eos_token_id) == (6, True, [tiny.EOS])
        with pytest.raises(AttributeError, match="num_generations is fixed when the trainer is made"):
            trainer.num_generations = 2


def test_what_stands_in_a_signature_for_its_place_alone_is_refused():
    with pytest.raises(ArgumentError, match="`model_init` is gone: pass the model itself"):
        trl.ORPOTrainer(tiny.policy(), None, None, None, None, None, tiny.policy)
    with pytest.raises(ArgumentError, match="`tools` is gone"):
        trl.GRPOTrainer(tiny.policy(), length, tools=[length])


def test_collators_pad_as_upstreams_do():
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
    from trl.trainer.reward_trainer import DataCollatorForPreference as OfPairs
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    found = DataCollatorForLanguageModeling(0, pad_to_multiple_of=4)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    assert found["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    assert found["labels"].tolist() == [[1, 2, 3, -100], [4, 5, -100, -100]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    pairs = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
    ]
    found = DataCollatorForPreference(pad_token_id=0)(pairs)
    assert found["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert found["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    cut = DataCollatorForPreference(pad_token_id=0, max_length=2, truncation_mode="keep_end")(pairs)
    assert cut["input_ids"].tolist() == [[4, 5], [8, 9], [3, 6], [10, 11]]
    whole = OfPairs(pad_token_id=0)([{"chosen_ids": [1, 4, 5], "rejected_ids": [1, 6], "margin": 0.5}])
    assert whole["input_ids"].tolist() == [[1, 4, 5], [1, 6, 0]] and whole["margin"].tolist() == [0.5]
    row = {"prompt_ids": [1, 2], "completion_ids": [4], "KL_completion_ids": [6, 7], "label": True, "ref_logps": -1.0}
    found = DataCollatorForUnpairedPreference(pad_token_id=0)([row])
    assert found["input_ids"].tolist() == [[1, 2, 4]] and found["KL_input_ids"].tolist() == [[1, 2, 6, 7]]
    assert found["label"].tolist() == [True] and found["ref_logps"].tolist() == [-1.0]


def test_the_parser_of_scripts(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\ndatasets:\n  - path: rows.jsonl\n")
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    argv = ["--config", str(file), "--output_dir", "out", "--unheard_of", "3", "--use_peft", "--b=2"]
    script, config, model, mixture, rest = parser.parse_args_and_config(argv, return_remaining_strings=True)
    assert isinstance(script, trl.ScriptArguments) and config.learning_rate == 1e-4 and model.use_peft
    assert mixture.datasets[0].path == "rows.jsonl" and rest == ["--unheard_of", "3", "--b=2"]
    with pytest.raises(SystemExit):
        parser.parse_args_and_config(argv)
    assert "there is no option --unheard_of" in capsys.readouterr().err


def test_get_dataset_opens_a_mix(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = trl.get_dataset(trl.DatasetMixtureConfig([{"path": str(tmp_path / "rows.jsonl")}]))
    assert list(found) == ["train"] and len(found["train"]) == 2
