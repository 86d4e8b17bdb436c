"""Rounds: many procedures in flight change nothing but time."""

import threading
import time
from functools import partial

import pytest
import torch

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.rounds import run_rounds, together, workers
from plans import finish

CPU = torch.device("cpu")


def procedure(key: int, rounds: int):
    """Sums its own answers: 'rounds' rounds of key + 1 jobs each."""
    total = 0
    for r in range(rounds):
        answers = yield [lambda r=r, j=j: key * 1000 + r * 10 + j for j in range(key + 1)]
        assert len(answers) == key + 1
        total += sum(answers)
    return total


def expected(key: int, rounds: int) -> int:
    return sum(key * 1000 + r * 10 + j for r in range(rounds) for j in range(key + 1))


@pytest.mark.parametrize("in_flight", [1, 2, 3, 100])
def test_answers_reach_their_own_procedure(in_flight):
    lengths = [3, 0, 1, 5, 2, 4]
    found = run_rounds(((k, procedure(k, n)) for k, n in enumerate(lengths)), CPU, in_flight)
    assert {key: value for key, value, _ in found} == {k: expected(k, n) for k, n in enumerate(lengths)}


def test_at_most_in_flight_procedures_are_started():
    started = []

    def watched(k):
        started.append(k)
        yield [lambda: None]
        return k

    results = run_rounds(((k, watched(k)) for k in range(10)), CPU, in_flight=2)
    next(results)
    assert len(started) <= 3


def test_a_failing_job_fails_the_run_and_restores_the_threads():
    def broken():
        yield [lambda: 1 / 0]

    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        list(run_rounds([(0, broken())], CPU))
    assert torch.get_num_threads() == 2


def test_workers_compute_with_one_thread_each():
    torch.set_num_threads(2)
    with workers(CPU) as run:
        assert run([torch.get_num_threads] * 4) == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2


def test_procedures_together_keep_their_order_and_their_number():
    """Conclusions in order, whatever the lengths; at most `at_once` run, and none is made before it starts."""
    running, most = set(), 0

    def procedure(k):
        nonlocal most
        running.add(k)
        most = max(most, len(running))
        total = 0
        for step in range(k % 4):  # some end at once
            total += sum((yield [lambda step=step: k + step] * (1 + k % 2)))
        running.remove(k)
        return k, total

    made = []
    together_ = together((made.append(k) or procedure(k) for k in range(11)), 3)
    assert made == []
    found = finish(together_)
    expected = [(k, sum((k + s) * (1 + k % 2) for s in range(k % 4))) for k in range(11)]
    assert found == expected
    assert made == list(range(11))
    assert most == 3
    assert finish(together(iter(()), 3)) == []


def counting(limit: int, sizes: list[int]):
    """A job that does not fit beside `limit` others, and says how many were at work."""
    lock, busy = threading.Lock(), [0]

    def job(value: int) -> int:
        with lock:
            busy[0] += 1
            now = busy[0]
            sizes.append(now)
        try:
            time.sleep(0.01)
            if now > limit:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
            return value
        finally:
            with lock:
                busy[0] -= 1

    return job


def test_out_of_memory_halves_what_is_in_flight_and_loses_no_result():
    """Four workers, room for one: four, two, one at once; every result is there, in order."""
    sizes: list[int] = []
    job = counting(1, sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with workers(torch.device("cpu")) as run:
            assert run([partial(job, k) for k in range(12)]) == list(range(12))
            before = len(sizes)
            assert run([partial(job, k) for k in range(6)]) == list(range(6))
    finally:
        torch.set_num_threads(threads)
    assert max(sizes[:before]) > 1
    assert set(sizes[before:]) == {1}  # it stays careful


def test_a_block_that_fits_nowhere_is_one_sentence():
    job = counting(0, [])
    with workers(torch.device("cpu")) as run, pytest.raises(RequestError, match="lower block"):
        run([partial(job, 0)])


def test_other_failures_are_not_taken_for_want_of_memory():
    def broken():
        raise RuntimeError("shapes do not match")

    with workers(torch.device("cpu")) as run, pytest.raises(RuntimeError, match="shapes"):
        run([broken])
