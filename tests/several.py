"""Several processes that see each other, as torchrun would start them."""

import multiprocessing
import os
import socket
import time

import torch
from accelerate.state import AcceleratorState


def launch(count, function):
    """What function() returns in each of `count` processes, in which torchrun's variables are set.

    They are copies of this one, which has everything imported.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child(rank):
        torch.set_num_threads(1)  # what the parent's threads did is not known to a copy
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # what the parent has of it
        answers.put((rank, function()))

    children = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(count)]
    for process in children:
        process.start()
    found, deadline = {}, time.monotonic() + 100
    while len(found) < count:
        while answers.empty():
            if time.monotonic() > deadline or any(p.exitcode for p in children):
                for process in children:
                    process.kill()
                raise AssertionError("a process died, or waits for good")
            children[0].join(0.02)
        rank, answer = answers.get()
        found[rank] = answer
    for process in children:
        process.join()
    return [found[rank] for rank in range(count)]
