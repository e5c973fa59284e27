"""Every trainer and the sampler on CUDA tensors without values: no exception, no wait of the host, no large tensor."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_dry.cases import every_case

PROJECT = Path(__file__).parents[2]
TOOL = Path(os.environ.get("DRYGPU") or PROJECT.parent / "shared" / "tools" / "drygpu")
HOME = Path(os.environ.get("DRYGPU_HOME") or Path.home() / ".cache" / "drygpu")


def runs(folder: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What `run.py` found, by trainer and option."""
    if not (TOOL / "run").is_file():
        pytest.skip("the tool drygpu is not there: DRYGPU names its folder")
    if not (HOME / "venv").is_dir():
        pytest.skip("torch's CUDA build is not installed: `make test-dry` does it once (5 GB)")
    file = folder / "found.json"
    command = [str(TOOL / "run"), "tests/cuda_dry/run.py", *arguments, "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{TOOL}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert file.is_file(), done.stdout + done.stderr
    return {(each["case"], each["option"]): each for each in json.loads(file.read_text())}


def check(found: dict[str, Any]) -> None:
    assert found["error"] is None, found["error"]
    assert found["waits"] == [] and found["too_large"] == []


def test_a_step_of_sft(tmp_path: Path) -> None:
    check(runs(tmp_path, "SFT", "--option", "bf16")["SFT", "bf16"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    return runs(tmp_path_factory.mktemp("dry"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), every_case())
def test_every_case(whole: dict[tuple[str, str], dict[str, Any]], name: str, option: str) -> None:
    check(whole[name, option])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_the_kernel_is_called_again_only_where_its_output_is_not_kept(
    whole: dict[tuple[str, str], dict[str, Any]], name: str
) -> None:
    calls = {option: each["kernels"] for (case, option), each in whole.items() if case == name}
    assert calls["bf16"] == calls["autocast"] == calls["checkpointing, selective"] > 0
    assert calls["checkpointing"] > calls["bf16"] and calls["softcap"] == 0
    assert calls["window"] > 0 and calls["sinks"] > 0
