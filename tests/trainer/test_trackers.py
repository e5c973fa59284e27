"""The trackers of `report_to`, offline: what each has kept is what was logged. One that is not installed is skipped;
`tests/test_options.py` has the sentence on it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.trainer.helpers import chat_rows, sft, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trackers' own dependencies


@pytest.fixture(scope="module")
def tokenizer(small_path: str) -> Any:
    return AutoTokenizer.from_pretrained(small_path)


def losses(tmp_path: Path, tokenizer: Any, tracker: str) -> list[float]:
    """The losses of a run of two steps that is reported to the tracker."""
    trainer = sft(tmp_path / "out", tiny(tokenizer), tokenizer, chat_rows(8), max_steps=2, report_to=tracker,
                  per_device_train_batch_size=2, gradient_checkpointing=False, run_name="the run")  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_tensorboard(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = losses(tmp_path, tokenizer, "tensorboard")
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    kept = events.Scalars("train/loss")
    assert [each.step for each in kept] == [1, 2] and [each.value for each in kept] == pytest.approx(expected)


def test_wandb_offline(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    expected = losses(tmp_path, tokenizer, "wandb")
    assert wandb.run.summary["train/loss"] == pytest.approx(expected[-1])
    assert wandb.run.name == "the run"
    wandb.finish()
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow_in_a_file(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    expected = losses(tmp_path, tokenizer, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    [found] = client.search_runs(["0"])
    kept = client.get_metric_history(found.info.run_id, "loss")
    assert [each.value for each in sorted(kept, key=lambda each: each.step)] == pytest.approx(expected)


def test_trackio_offline(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert len(losses(tmp_path, tokenizer, "trackio")) == 2
    assert any(path.suffix == ".db" or path.suffix == ".parquet" for path in (tmp_path / "trackio").rglob("*"))
