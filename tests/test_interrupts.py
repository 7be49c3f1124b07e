"""Signals: raised, remembered where that is swallowed, held back, and left alone where they were ignored before."""

import signal
from contextlib import suppress

import pytest

from stn_pipeline import interrupts
from stn_pipeline.progress import JobsProgress, Progress


@pytest.fixture(autouse=True)
def listening(signals_restored, monkeypatch):
    monkeypatch.setattr(interrupts, "_told", [])
    for number in interrupts.NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    interrupts.listen()


@pytest.mark.parametrize("number", interrupts.NUMBERS)
def test_each_signal_ends_the_work(number):
    with pytest.raises(interrupts.Interrupted) as caught:
        signal.raise_signal(number)
    assert caught.value.number == number and isinstance(caught.value, KeyboardInterrupt)


class Destroyed:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallows_ends_the_training_at_its_next_step():
    thing = Destroyed()
    del thing  # Python prints what is raised there, and goes on
    with Progress(2, 40) as progress, pytest.raises(interrupts.Interrupted):
        progress.tick(1)
    with JobsProgress() as jobs, pytest.raises(interrupts.Interrupted):
        jobs.watch([])()
    interrupts.ignore_signals()  # as what ends the work does
    with Progress(2, 40) as progress:
        progress.tick(1)


def test_what_was_ignored_before_stays_ignored_as_nohup_wants_it():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.listen()
    with interrupts.uninterrupted():
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_signal_is_held_until_the_block_is_done():
    done = []
    with suppress(interrupts.Interrupted):
        with interrupts.uninterrupted():
            signal.raise_signal(signal.SIGHUP)
            done.append("block")
        done.append("not reached")
    assert done == ["block"]
