"""Notices: once, by the first of several processes alone."""

from __future__ import annotations

import logging

import pytest

from trl import notices


@pytest.mark.parametrize(("rank", "shown"), [("0", 1), ("1", 0)])
def test_a_notice_is_printed_once(
    rank: str, shown: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        notices.notify_once(f"a notice of rank {rank}")
    assert capsys.readouterr().out == f"trl: a notice of rank {rank}\n" * shown


@pytest.mark.parametrize(("rank", "own", "shown"), [("0", False, True), ("1", False, False), ("0", True, False)])
def test_log_lines(
    rank: str, own: bool, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are notices too, unless the program has handlers of its own."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()] if own else [])
    logger = logging.getLogger("trl.data")
    logger.warning("%s rows", 3)
    logger.info("nothing")
    assert capsys.readouterr() == ("trl: 3 rows\n" if shown else "", "")
    with notices.log_lines_as_notices() as lines:
        logger.warning("a command says it")
        lines.held = held = []
        logger.warning("later")
    assert held == ["later"]
    assert capsys.readouterr().out == ("trl: a command says it\n" if rank == "0" else "")
