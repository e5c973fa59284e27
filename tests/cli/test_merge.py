"""`trl merge`: an adapter's folder to a model's folder, or to a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from trl.models.load import load_causal_lm

from .conftest import Command

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapter(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), config).save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(32)[None]).logits.float()


def test_merged(trl_here: Command, adapter: str, tiny_path: str, tmp_path: Path) -> None:
    answer = trl_here("merge", "--model_name_or_path", adapter, "--output-dir", "merged", "--json")
    facts = json.loads(answer.stdout)
    assert (answer.returncode, facts["base"], facts["dtype"]) == (0, tiny_path, "float32")
    assert facts["gap"] < 1e-5 < 1e-2 < facts["effect"] and facts["written"] < 1e-6
    wanted = logits(load_causal_lm(adapter))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 2048
    words = ["merge", "--model_name_or_path", tiny_path, "--adapter_name_or_path", adapter, "--dtype", "bfloat16"]
    answer = trl_here(*words, "--output_dir", "half")
    assert answer.returncode == 0 and "The merged model is in half" in answer.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    again = trl_here(*words, "--output_dir", "half")
    assert again.returncode == 2 and "half exists already: name another folder" in again.stderr


def test_what_is_not_right_does_not_appear(
    trl_here: Command, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LlamaForCausalLM.save_pretrained

    def damaged(model: Any, target: Path, **options: Any) -> None:
        save(model, target, **options)
        path = Path(target) / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2000:] = bytes(2000)  # the disk lost the end
        path.write_bytes(data)

    words = ["merge", "--model_name_or_path", adapter, "--output_dir", "merged"]
    with monkeypatch.context() as context:
        context.setattr(LlamaForCausalLM, "save_pretrained", damaged)
        answer = trl_here(*words)
    assert answer.returncode == 1 and "nothing was written" in answer.stderr

    def interrupted(model: Any, target: Path, **options: Any) -> None:
        save(model, target, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        assert trl_here(*words).returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_push(trl_here: Command, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    pushed: list[Any] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> str:
            pushed.append((name, options["private"]))
            return f"https://hub.example/{name}"

        def upload_folder(self, folder_path: str, repo_id: str) -> None:
            pushed.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    words = ["merge", "--model_name_or_path", adapter]
    with monkeypatch.context() as context:
        context.setattr(huggingface_hub, "HfApi", Api)
        answer = trl_here(*words, "--output_dir", "one", "--push", "me/model", "--private", "--json")
    assert json.loads(answer.stdout)["pushed"] == "https://hub.example/me/model"
    assert pushed[0] == ("me/model", True) and {"config.json", "model.safetensors"} <= set(pushed[1][1])
    # Without a network the folder stays, and the sentence says how to go on.
    answer = trl_here(*words, "--output_dir", "two", "--push", "me/model")
    assert answer.returncode == 1 and "hf upload me/model two" in answer.stderr
    assert (tmp_path / "two" / "config.json").exists()


def test_mistakes(trl_here: Command, tiny_path: str) -> None:
    assert trl_here("merge", "--output_dir", "x").returncode == 2
    assert "--output_dir is missing" in trl_here("merge", "--model_name_or_path", "x").stderr
    answer = trl_here("merge", "--model_name_or_path", tiny_path, "--output_dir", "x")
    assert answer.returncode == 1 and "is a whole model" in answer.stderr
    with pytest.raises(SystemExit) as end:
        trl_here("merge", "--help")
    assert end.value.code == 0
