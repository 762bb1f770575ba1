"""Map a function over items: in this process, in local processes, or on a Ray cluster.

The function writes its result to a part on disk, so that finished items survive whatever ends the rest.
"""

import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from eagle_train.config import ConfigError

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
        yield from _on_ray(function, items)
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


def _on_ray(function: Callable[[Item], None], items: Sequence[Item]) -> Iterator[Item]:
    """Tasks of one CPU each on the cluster that RAY_ADDRESS names, or a new local one. All nodes must see the same files.

    Ray runs a task again when its node dies.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("executor is ray, which is not installed: pip install 'eagle-train[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    task = ray.remote(num_cpus=1, max_retries=5)(function)
    queue = iter(items)
    running: dict[Any, Item] = {}
    try:
        while True:
            slots = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
            while len(running) < slots and (item := next(queue, None)) is not None:
                running[task.remote(item)] = item
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                ray.get(reference)
                yield running.pop(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
