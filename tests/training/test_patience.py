"""Processes wait for one another for minutes in the loop, for hours around files."""

import time
from datetime import timedelta

import pytest
from several import launch

from training import processes
from training.processes import everyones, lost_contact, make_accelerator, patient


def test_in_the_loop_one_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(processes, "IN_THE_LOOP", timedelta(seconds=1))

    def step():
        accelerator = make_accelerator()
        everyones(0, accelerator)
        if accelerator.process_index == 1:
            time.sleep(4)
            return None
        started = time.monotonic()
        try:
            everyones(0, accelerator)
        except RuntimeError as error:
            return lost_contact(error), time.monotonic() - started
        return "waited", time.monotonic() - started

    (word, seconds), _ = launch(2, step)
    assert word == "does not answer"
    assert 0.5 < seconds < 3.5


def test_around_files_it_is(monkeypatch):
    monkeypatch.setattr(processes, "IN_THE_LOOP", timedelta(seconds=1))

    def save():
        accelerator = make_accelerator()
        with patient(accelerator):
            if accelerator.process_index == 1:
                time.sleep(2.5)
            return everyones(accelerator.process_index, accelerator)

    assert launch(2, save) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Connection closed by peer [127.0.0.1]:1234", "has ended"),
        ("Read error: Connection reset by peer", "has ended"),
        ("NCCL error: remote process exited or there was a network error", "has ended"),
        ("Timed out waiting 600000ms for recv operation to complete", "does not answer"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
        ("CUDA out of memory", None),
    ],
)
def test_errors_of_others_are_told_from_our_own(text, meaning):
    assert lost_contact(RuntimeError(text)) == meaning
