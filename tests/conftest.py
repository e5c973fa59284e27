"""What every test may ask for: real and tiny models on disk, made once, and a quiet, offline environment."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

# Before transformers or datasets are imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take every core slow one another down tenfold.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402

from trl.demo.model import demo_model
from trl.models.gguf import cache_dir, write_folder


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def whole_reports() -> None:
    """Each test is a process of its own to the report, which leaves out what its process has printed before."""
    if report := sys.modules.get("trl.trainer.report"):
        report._printed.clear()


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """What has been imported is no garbage: the collection that each run of training asks for passes it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smol_path() -> str:
    """SmolLM2-135M-Instruct, the demo's model: real weights, real tokenizer, chat template, float32."""
    try:
        return str(demo_model())
    except ImportError as error:
        # Not a skip: without the real model most of what the suite promises would go unchecked.
        pytest.fail(f"{error}\nThe tests need it; `make test` installs it.", pytrace=False)


@pytest.fixture(scope="session")
def smol2_path(smol_path: str) -> str:
    """The first two layers of the demo's model: real embeddings and tokenizer, a tenth of the time."""
    folder = cache_dir() / f"{Path(smol_path).name}-2layers"
    if not folder.is_dir():
        write_folder(folder, lambda target: _cut(smol_path, target, layers=2))
    return str(folder)


@pytest.fixture(scope="session")
def small_path(smol_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real tokenizer with its first 2,048 tokens alone: models of its size spend little on their heads."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "small-tokenizer"
    AutoTokenizer.from_pretrained(smol_path).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    pairs = content["model"]
    pairs["vocab"] = {token: number for token, number in pairs["vocab"].items() if number < 2048}
    pairs["merges"] = [pair for pair in pairs["merges"] if "".join(pair) in pairs["vocab"]]
    file.write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_path(small_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama (hidden 64, two layers, four heads over two) with the small tokenizer and untied embeddings."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _cut(source: str, target: Path, *, layers: int) -> None:
    """Save the model in `source` with its first `layers` layers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(source)
    config = type(whole.config).from_dict(whole.config.to_dict() | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config)
    weights = whole.state_dict()
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    model.generation_config = whole.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
