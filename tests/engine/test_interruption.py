"""A first signal is recorded; a second one acts at once."""

import os
import signal

import pytest

from conservtl.engine.interruption import Interruption, interruptible

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_counts(shared):
    """With other processes it waits until all of them know of it."""
    one = Interruption(shared=shared)
    assert one.record(signal.SIGINT)
    assert not one.record(signal.SIGTERM)
    assert one.received == (None if shared else signal.SIGINT)


def test_a_second_one_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def press_twice():
        with interruptible(active=True) as interruption:
            signal.raise_signal(signal.SIGINT)
            reached.append(interruption.asked)
            signal.raise_signal(signal.SIGINT)
            reached.append("never")

    try:
        with pytest.raises(KeyboardInterrupt):
            press_twice()
        assert reached == [True]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
