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
Run = Callable[[list[Job]], list[Any]]
"""Runs jobs; returns their results in order."""


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
def workers(device: torch.device) -> Iterator[Run]:
    """What runs jobs on all cores, or one after the other on the device; half as many at once from the moment that they
    do not fit into memory.

    Raises:
        RequestError: one job alone does not fit.
    """
    on_cpu = device.type == "cpu"
    at_once = torch.get_num_threads() if on_cpu else 1
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) if on_cpu else None

    def work(todo: deque[tuple[int, Job]], results: list[Any]) -> tuple[int, Job] | None:
        """Runs jobs until none is left, or returns the one that did not fit into memory."""
        while todo:  # a future for each job would cost as much as a transform
            try:
                place, job = todo.popleft()
            except IndexError:  # another worker took the last one
                break
            try:
                results[place] = job()
            except (RuntimeError, MemoryError) as failure:
                if not out_of_memory(failure):
                    raise
                return place, job
        return None

    def run(jobs: list[Job]) -> list[Any]:
        nonlocal at_once
        alone = False
        todo, results = deque(enumerate(jobs)), [None] * len(jobs)
        threads = torch.get_num_threads()
        if on_cpu:
            torch.set_num_threads(1)  # numbers must not depend on how many cores there are
        try:
            while todo:
                if pool is not None:
                    ended = list(pool.map(lambda _: work(todo, results), range(at_once)))
                else:
                    ended = [work(todo, results)]
                failed = [unfit for unfit in ended if unfit is not None]
                if failed and alone:
                    raise RequestError("a block of draws does not fit into memory; lower block, or free memory")
                if failed:
                    at_once, alone = max(1, at_once // 2), at_once == 1
                    todo.extend(failed)
                    if not on_cpu:
                        torch.cuda.empty_cache()
            if not on_cpu:
                torch.cuda.synchronize(device)  # the one of a round: its seconds are those of the device
            return results
        finally:
            if on_cpu:
                torch.set_num_threads(threads)

    try:
        yield run
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def out_of_memory(failure: BaseException) -> bool:
    """Whether a job failed for want of memory; on the CPU torch says so in words."""
    return isinstance(failure, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(failure)


Workers = Callable[[torch.device], contextlib.AbstractContextManager[Run]]
"""Such as `workers`."""


def run_rounds(
    procedures: Iterable[tuple[int, Procedure[Result]]],
    device: torch.device,
    in_flight: int = 8,
    workers: Workers = workers,
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
