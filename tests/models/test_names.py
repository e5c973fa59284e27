"""Whether a model or a data set is there: folders, the cache, and one question to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.hub import check_hub
from trl.models.load import ModelError, load_causal_lm, load_tokenizer
from trl.models.names import check_model

Hub = Callable[[Any], list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """`hub(answer)` makes the Hub raise or return `answer`, and returns the list of what it is asked from then on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    check_hub.cache_clear()

    def answers(answer: Any) -> list[str]:
        asked: list[str] = []

        def metadata(url: str, **options: Any) -> Any:
            asked.append(url)
            if answer is not None:
                raise answer

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        return asked

    return answers


def error(kind: type[Exception]) -> Exception:
    """An error of the Hub, without the response that it is made of."""
    made = kind.__new__(kind)
    Exception.__init__(made, "no")
    return made


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (ConnectionError("no route"), "there is no folder owner/typo here, and the Hub cannot be reached"),
        (error(errors.RepositoryNotFoundError), "owner/typo here, and the Hub has no model of this name: check it"),
        (error(errors.GatedRepoError), "the model owner/typo asks for an agreement"),
        (error(errors.RevisionNotFoundError), "the model owner/typo on the Hub has no revision v2"),
    ],
)
def test_the_hub_is_asked_once(hub: Hub, answer: Exception, sentence: str) -> None:
    asked = hub(answer)
    with pytest.raises(ModelError) as told:
        check_model("owner/typo", "v2")
    assert sentence in str(told.value) and len(asked) == 1 and "owner/typo/resolve/v2/" in asked[0]
    for opened in (load_causal_lm, load_tokenizer):
        with pytest.raises(ModelError):
            opened("owner/typo", revision="v2")
    assert len(asked) == 3


def test_a_model_that_is_there_is_asked_for_once_in_all(hub: Hub) -> None:
    for answer in (None, error(errors.EntryNotFoundError)):  # the latter has no such file
        check_hub.cache_clear()
        asked = hub(answer)
        check_model("owner/model")
        check_model("owner/model")
        assert len(asked) == 1


def test_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(ConnectionError("no route"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, **options: f"cache/{file}")
    check_model("owner/model")
    assert asked == []


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(ConnectionError("no route"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "tuned").mkdir()
    for name, sentence in (
        ("tunde", r"no folder tunde here \(did you mean tuned\?\), nor a copy in the cache, and the Hub is not asked"),
        ("no such/model", "and it cannot be a name on the Hub"),
        ("./tunde", r"no model folder at ./tunde \(did you mean tuned\?\)"),
        ("tuned", "tuned is a folder without config.json or adapter_config.json: not a saved model"),
    ):
        with pytest.raises(ModelError, match=sentence):
            check_model(name)
    assert asked == []


def test_a_data_set(hub: Hub, tmp_path: Path) -> None:
    asked = hub(ConnectionError("no route"))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    for streaming in (False, True):
        with pytest.raises(DataError, match="folder rowz here .did you mean rows.jsonl.., and the Hub cannot"):
            load("rowz", streaming=streaming)
    assert len(asked) == 2 and "/datasets/rowz/" in asked[0]
    with pytest.raises(DataError, match=r"no file or folder .rowz.jsonl. .*: check it \(did you mean rows.jsonl\?\)"):
        load("rowz.jsonl")
