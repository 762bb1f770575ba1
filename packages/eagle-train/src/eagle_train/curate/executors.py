"""Map a function over items: in this process, in local processes, or on a Ray cluster.

The function writes its result to a part on disk, so that finished items survive whatever ends the rest.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from eagle_train.data.cluster import map_on_ray

from .folder import CurateError

Item = TypeVar("Item")


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_items(function: Callable[[Item], None], items: Sequence[Item], *, workers: int, executor: str = "local") -> Iterator[Item]:
    """Call `function` for every item; yields an item once it is done, in any order.

    function: importable by name, for other processes. An exception that it raises ends the map.
    Raises CurateError when a process dies, naming the items that were running; what is done is kept.
    """
    if executor == "ray":
        for index, _ in map_on_ray(function, items):
            yield items[index]
    elif workers == 1 or len(items) <= 1:
        for item in items:
            function(item)
            yield item
    else:
        yield from _in_processes(function, items, min(workers, len(items)))


def _in_processes(function: Callable[[Item], None], items: Sequence[Item], workers: int) -> Iterator[Item]:
    # Spawned: nothing of this process (threads, CUDA, open files) is inherited half alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(os.getpid(),))
    queue = iter(items)
    running: dict[Any, Item] = {}
    try:
        while True:
            while len(running) < 2 * workers and (item := next(queue, None)) is not None:
                running[pool.submit(function, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    future.result()
                except BrokenProcessPool as error:
                    names = ", ".join(str(getattr(item, "name", item)) for item in running.values())
                    raise CurateError(
                        f"a worker process died (out of memory, or a crash in a decoder) while it read one of: {names}. What is done is "
                        "kept; run again with --set workers=1 to see which one it is"
                    ) from error
                yield running.pop(future)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to workers too; the parent decides

    def watch() -> None:  # a killed parent can't end its workers
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
