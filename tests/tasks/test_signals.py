"""What becomes of a signal, and when."""

from __future__ import annotations

import os
import signal

import pytest

from tasks import signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_is_noted_and_said(capfd: pytest.CaptureFixture[str]) -> None:
    """The step goes on; a third signal stops it. Kills: silence, a second Ctrl-C that drops the save."""
    with signals.noted() as stopping:
        assert not stopping
        send(signal.SIGTERM)
        assert stopping
        assert capfd.readouterr().err == "SIGTERM: stopping after this step, saving\n"
        send(signal.SIGINT)
        assert "still finishing the step" in capfd.readouterr().err
        with stopping.sheltered():
            send(signal.SIGINT)
            send(signal.SIGINT)
        assert capfd.readouterr().err == "SIGINT: still saving\n" * 2
        with pytest.raises(signals.Stopped) as stop:
            send(signal.SIGINT)
        assert stop.value.number == signal.SIGTERM, "the exit code is that of the first"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_nothing_is_lost_a_signal_stops_at_once() -> None:
    """In an evaluation. Kills: minutes of waiting, a signal of just before that is forgotten."""
    with signals.noted() as stopping, pytest.raises(signals.Stopped), stopping.at_once():
        send(signal.SIGHUP)
    with signals.noted() as stopping:
        send(signal.SIGINT)
        with pytest.raises(signals.Stopped), stopping.at_once():
            pass


def test_other_processes_are_left_alone() -> None:
    """A loader's worker, to which Ctrl-C goes too. Kills: a worker that dies before its run has saved."""
    with signals.noted() as stopping:
        if (child := os.fork()) == 0:
            send(signal.SIGINT)
            os._exit(bool(stopping))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nohup_is_respected() -> None:
    """Kills: a SIGHUP that ends a run started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted() as stopping:
            send(signal.SIGHUP)
            assert not stopping
    finally:
        signal.signal(signal.SIGHUP, before)
