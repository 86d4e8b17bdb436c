"""Many images in flight, one synchronisation a round.

A *procedure* is a generator that reads like its paper's algorithm: it yields lists of jobs (callables without
arguments), is sent the list of their results, and returns its conclusion. `run_rounds` advances many procedures
together: in each round the jobs of all of them are spread over the workers; a procedure that ends leaves, the next one
enters. On the CPU a worker is a thread that computes with one core, which scales better than two cores on one small
block; on a GPU there is one worker, and its jobs queue up on the device.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from gsmooth_lightning.errors import RequestError

Job = Callable[[], Any]
Result = TypeVar("Result")
Procedure = Generator[list[Job], list[Any], Result]


def together(procedures: Iterable[Procedure[Result]], at_once: int) -> Procedure[list[Result]]:
    """Advances procedures side by side, at most `at_once`, as one: a round holds the jobs of all that run.

    Returns their conclusions in order. A procedure is made only when it starts.
    """
    waiting = enumerate(procedures)
    results: dict[int, Result] = {}
    active: dict[int, tuple[Procedure[Result], list[Job]]] = {}

    def advance(place: int, procedure: Procedure[Result], answer: list[Any] | None) -> None:
        try:
            active[place] = (procedure, procedure.send(answer))  # type: ignore[arg-type]  # None starts it
        except StopIteration as ended:
            results[place] = ended.value

    def enter() -> None:
        while len(active) < at_once and (entering := next(waiting, None)) is not None:
            advance(*entering, None)

    enter()
    while active:
        round_, active = active, {}
        answers = iter((yield [job for _, jobs in round_.values() for job in jobs]))
        for place, (procedure, jobs) in round_.items():
            advance(place, procedure, [next(answers) for _ in jobs])
        enter()
    return [results[place] for place in sorted(results)]


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[Callable[[list[Job]], list[Any]]]:
    """A function that runs a list of jobs, in order of their results, on all cores or on the device."""
    if device.type != "cpu":
        yield lambda jobs: [job() for job in jobs]
        return
    size = torch.get_num_threads()
    pool = ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(1,))

    def run(jobs: list[Job]) -> list[Any]:
        todo, results = deque(enumerate(jobs)), [None] * len(jobs)

        def work(_: int) -> None:  # a future for each job would cost as much as a transform
            while todo:
                try:
                    place, job = todo.popleft()
                except IndexError:  # another worker took the last one
                    return
                results[place] = job()

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # numbers must not depend on how many cores there are
        try:
            list(pool.map(work, range(size)))
            return results
        finally:
            torch.set_num_threads(threads)

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def run_rounds(
    procedures: Iterable[tuple[int, Procedure[Result]]], device: torch.device, in_flight: int = 8
) -> Iterator[tuple[int, Result, float]]:
    """Runs procedures, at most `in_flight` at a time; yields (key, conclusion, seconds), each as soon as it is there.

    `seconds` shares the time of a round between the procedures by their number of jobs.
    """
    waiting = iter(procedures)
    active: dict[int, tuple[Procedure[Result], list[Job], float]] = {}
    exhausted = False
    with workers(device) as run:
        while True:
            while not exhausted and len(active) < in_flight:
                if (entering := next(waiting, None)) is None:
                    exhausted = True
                    break
                key, procedure = entering
                if key in active:
                    raise RequestError(f"image {key} is listed twice; name each image once")
                try:
                    active[key] = (procedure, next(procedure), 0.0)
                except StopIteration as ended:
                    yield key, ended.value, 0.0
            if not active:
                return
            start = time.perf_counter()
            owners = [(key, job) for key, (_, jobs, _) in active.items() for job in jobs]
            results = iter(run([job for _, job in owners]))
            answers = {key: [next(results) for _ in jobs] for key, (_, jobs, _) in active.items()}
            share = (time.perf_counter() - start) / max(1, len(owners))
            for key, answer in answers.items():
                procedure, _, seconds = active.pop(key)
                seconds += share * len(answer)
                try:
                    active[key] = (procedure, procedure.send(answer), seconds)
                except StopIteration as ended:
                    yield key, ended.value, seconds
