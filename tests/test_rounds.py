"""Rounds: many procedures in flight change nothing but time."""

import pytest
import torch

from gsmooth_lightning.rounds import run_rounds, workers

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
