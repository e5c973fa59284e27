"""What the guide takes from the Hub, as folders of the same names, and ways to run what it says."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.helpers import chat_rows, pair_rows

from .document import DOCUMENT, Piece, blocks, pieces, settings
from .table import changed, row_of

LLAMA = "meta-llama/Llama-3.2-8B-Instruct"
CLASSIFIER = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"


class Guide:
    """The document, in pieces; `text` and `settings` give them with the table's changes."""

    def __init__(self, path: Path) -> None:
        self.blocks = blocks(path.read_text(encoding="utf-8"))
        self.pieces = [piece for block in self.blocks for piece in pieces(block)]

    def piece(self, begins: str) -> Piece:
        """The one piece that begins so. ValueError if there is none, or another."""
        (found,) = (piece for piece in self.pieces if piece.text.startswith(begins))
        return found

    def text(self, begins: str) -> str:
        return changed(self.piece(begins).text)

    def advice(self, begins: str) -> dict[str, str]:
        """The settings of the block that has a piece which begins so."""
        line = self.piece(begins).line
        block = max((block for block in self.blocks if block.line < line), key=lambda block: block.line)
        return settings(pieces(block))

    def of(self, test: str) -> list[str]:
        """The pieces that the table gives to a test, in the document's order."""
        rows = ((piece, row_of(piece)) for piece in self.pieces)
        return [changed(piece.text) for piece, row in rows if row is not None and row.test == test]


@pytest.fixture(scope="session")
def guide() -> Guide:
    if not DOCUMENT.exists():
        pytest.skip(f"the guide is not there: {DOCUMENT} (TRL_GUIDE names another folder)")
    return Guide(DOCUMENT)


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models and data sets in the shape of those that the guide names, under their names."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_path, folder / LLAMA)
    counts_to_four(tiny_path, folder / "Qwen" / "Qwen2.5-7B-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=1, n_heads=2, id2label=labels,
        label2id={name: number for number, name in labels.items()}, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DistilBertForSequenceClassification(config).save_pretrained(folder / CLASSIFIER)
    tokenizer.save_pretrained(folder / CLASSIFIER)

    def publish(name: str, **splits: list[dict[str, Any]]) -> None:
        (folder / name / "data").mkdir(parents=True)
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(folder / name / "data" / f"{split}-00000-of-00001.parquet")

    def ultrachat(count: int, seed: int) -> list[dict[str, Any]]:
        """The `prompt` beside the conversation is its first message once more."""
        rows = chat_rows(count, seed)
        return [
            {"prompt": row["messages"][0]["content"], "prompt_id": str(number), **row}
            for number, row in enumerate(rows)
        ]

    def ultrafeedback(count: int) -> list[dict[str, Any]]:
        """Whole conversations with scores; no prompt column."""
        return [
            {
                "chosen": row["prompt"] + row["chosen"],
                "rejected": row["prompt"] + row["rejected"],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
            for row in pair_rows(count)
        ]

    publish("trl-lib/ultrachat_200k", train_sft=ultrachat(48, 0), test_sft=ultrachat(4, 1))
    publish("trl-lib/ultrafeedback_binarized", train=ultrafeedback(64), test=ultrafeedback(4))
    reviews = [{"text": f"film {number} was a long story about an old house. " * 60, "label": 1} for number in range(9)]
    for name in ("imdb", "stanfordnlp/imdb"):
        publish(name, train=reviews)
    return folder


def counts_to_four(source: str, target: Path) -> None:
    """The random model, writing "4" as every third token and ending at every eighth: some of its sums are right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():  # one dimension that is the same for all tokens
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("4"), 0] = 0.9
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 8))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def lay_out(hub: Path, folder: Path) -> Path:
    """A working folder in which the Hub's names lead to the stand-ins."""
    folder.mkdir(exist_ok=True)
    for entry in hub.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


# --- running ----------------------------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """The guide's own: its Python, `WANDB_DISABLED`; and caches in the working folder."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_DISABLED": "true",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
    }


def shell(folder: Path, line: str) -> str:
    """Runs a line as it is typed into a shell in `folder`. Its output; what it complained about, if it fails."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
    return done.stdout


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of training that a checkpoint keeps, each with a finite loss."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert lines and all(math.isfinite(line["loss"]) for line in lines)
    return lines


def newest_step(output: Path) -> int:
    return max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def changes(before: Path, after: Path, file: str = "adapter_model.safetensors") -> int:
    """How many tensors differ between two saved models, which have the same ones, in the second one's precision."""
    from safetensors.torch import load_file

    old, new = load_file(before / file), load_file(after / file)
    assert old.keys() == new.keys()
    assert all(tensor.isfinite().all() for tensor in new.values())
    return sum(not old[name].to(new[name].dtype).equal(new[name]) for name in old)


@pytest.fixture
def here(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder which this process is in, for scripts that need none of their own."""
    folder = lay_out(hub, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    return folder


def with_settings(script: str, settings: dict[str, str]) -> str:
    """The script with the advised settings: in the place of those that it has, or as further ones of its config."""
    for name, value in settings.items():
        script, count = re.subn(rf"\b{name}=[^,\n]+,", f"{name}={value},", script)
        if not count:
            script = re.sub(r"(output_dir=[^\n]+\n)", rf"\1    {name}={value},\n", script, count=1)
        assert f"{name}={value}," in script
    return script
