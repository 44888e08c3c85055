"""What is counted: the bytes of tensors, and the work of operations."""

import pytest
import torch

from launch.fake_memory import Machine, Tracker


def test_a_tracker_counts_each_storage_once_and_until_it_is_freed():
    tracker = Tracker(vocab_size=7)
    with tracker, tracker.phase("all"):
        a = torch.zeros(10, 10)
        b = a.t()[1:].add_(1)  # a view
        c = (a @ a).relu()  # 400 bytes for the product, 400 for what is made of it
        logits = torch.zeros(2, 7)
        tracker.label([a], "weights")
        assert tracker.live == {"weights": 400, "activations": 400, "logits": 56}
        del a
        assert tracker.live["weights"] == 400  # the view still holds it
        del b, c, logits
    assert not any(tracker.live.values())
    assert sum(tracker.phases["all"].values()) == 1200


def test_an_operation_takes_as_long_as_its_arithmetic_or_its_bytes():
    tracker = Tracker(Machine("", {torch.float32: 10.0}, 1e9, 0.0, 0.5, True))
    with tracker:
        a = torch.ones(4, 4)
        before = tracker.work
        a @ a
        a.view(16)
        product = tracker.work - before
        a += 1
        addition = tracker.work - before - product
    assert (product.flops, product.operations) == (128, 1)
    assert product.seconds == pytest.approx(12.8)
    assert (addition.flops, addition.operations) == (0, 1)
    assert addition.seconds == pytest.approx(128e-9)
    assert product.predicted_seconds(tracker.machine) == pytest.approx(12.8)
    assert addition.predicted_seconds(tracker.machine) == 0.5  # the host is slower


def test_an_operation_takes_the_least_time_that_the_device_needs_for_any():
    tracker = Tracker(Machine("", {torch.float32: 10.0}, 1e9, 2.0, 0.0, True))
    with tracker:
        torch.ones(3) + 1
    assert tracker.work.seconds == 4.0


def test_what_a_graph_does_the_host_starts_at_once():
    tracker = Tracker(Machine("", {torch.float32: 1.0}, 1e9, 1.0, 0.0, True))
    with tracker:
        a = torch.ones(3) + 1
        with tracker.graph():
            for _ in range(5):
                a += 1
    assert (tracker.work.operations, tracker.work.seconds) == (3, 7)


def test_writing_into_a_cache_costs_what_is_written_and_not_the_cache():
    tracker = Tracker(Machine("", {}, 1.0, 0.0, 0.0, True))
    cache, new, now = torch.zeros(4, 100), torch.ones(4, 1), torch.zeros(1, dtype=torch.long)
    with tracker:
        cache.index_copy_(1, now, new)
    assert tracker.work.seconds == 2 * new.nbytes
