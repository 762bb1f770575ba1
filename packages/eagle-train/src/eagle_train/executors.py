"""Map a function over items: in threads, in this process, in local processes, or on a Ray cluster. Call one in a process of its own."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, Literal, TypeVar

from eagle_train.config import ConfigError
from eagle_train.errors import TrainError, describe

Item = TypeVar("Item")
Result = TypeVar("Result")
Executor = Literal["local", "ray"]

_RETRIES = 5
"""How often Ray runs an item again whose process or node died."""


class WorkerError(TrainError):
    """A process died while it worked on an item."""


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results for all items, in their order, by one thread for each CPU: for functions that spend their time in numpy or on a disk."""
    items = list(items)
    threads = min(cpus(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def map_items(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    executor: str = "local",
    name: Callable[[Item], str] = str,
    advice: str = "run again with one worker to see which one it is",
) -> Iterator[tuple[Item, Result]]:
    """Call `function` for every item; yields each with its result once it is done, in any order.

    function: picklable; sent once to each process, which keeps it. An exception that it raises ends the map. What it writes to a disk
    survives whatever ends the rest.
    workers: processes; None: one for each CPU, of this machine or of the cluster. One worker of `local` is this process.
    executor: "ray": tasks of one CPU each on the cluster that RAY_ADDRESS names, or on a new local one. All nodes must see the same
    files. Ray runs an item again when its process or its node dies.
    Raises WorkerError when a process dies, with the names of the items that were running; ConfigError without Ray.
    """
    if executor == "ray":
        yield from _on_ray(function, items, workers, name, advice)
        return
    workers = workers or cpus()
    if workers == 1 or len(items) <= 1:
        for item in items:
            yield item, function(item)
    else:
        yield from _in_processes(function, items, min(workers, len(items)), name, advice)


def _died(names: Iterable[str], advice: str) -> WorkerError:
    return WorkerError(
        f"a worker process died (out of memory, or a crash in a decoder) while it read one of: {', '.join(names)}. What is done is kept; "
        f"{advice}"
    )


def _in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, name: Callable[[Item], str], advice: str
) -> Iterator[tuple[Item, Result]]:
    # Spawned: nothing of this process (threads, CUDA, open files) is inherited half alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(os.getpid(), pickle.dumps(function)))
    queue = iter(items)
    running: dict[Any, Item] = {}
    try:
        while True:
            while len(running) < 2 * workers and (item := next(queue, None)) is not None:
                running[pool.submit(_call, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise _died(map(name, running.values()), advice) from error
                yield running.pop(future), result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[[Any], Any] | None = None


def _start(parent: int, function: bytes) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of their own would only take turns with the other workers
    _end_with(parent)
    _function = pickle.loads(function)


def _end_with(parent: int) -> None:
    """In a process that `parent` started: it ends when its parent does, and only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to workers too; the parent decides

    def watch() -> None:  # a killed parent can't end its workers
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)


class BackgroundCall(Generic[Result]):
    """A call of `function` in a process of its own while this one goes on; it ends with this one, and with this object."""

    def __init__(self, function: Callable[..., Result], *arguments: Any) -> None:
        """function, arguments: picklable."""
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        given = pickle.dumps((function, arguments))
        self._process = context.Process(target=_call_in_background, args=(sender, os.getpid(), given), daemon=True, name="eagle-background")
        self._process.start()
        sender.close()  # so that the end of the process is the end of the pipe

    def result(self) -> Result:
        """What the function returned, once. Raises WorkerError when it raised, or when its process died."""
        try:
            value, failure = self._receiver.recv()
        except (EOFError, OSError) as end:
            raise WorkerError("a worker process died, or its result has been taken") from end
        finally:
            self.close()
        if failure is not None:
            raise WorkerError(f"in a worker process: {failure}")
        return value

    def close(self) -> None:
        """End the process, also in the middle of the call."""
        self._receiver.close()
        self._process.kill()
        self._process.join()

    def __del__(self) -> None:
        if hasattr(self, "_process") and self._process.pid is not None:
            self.close()


def _call_in_background(sender: Any, parent: int, given: bytes) -> None:
    _end_with(parent)
    try:
        function, arguments = pickle.loads(given)
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, describe(error)))


def call_on_ray(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` as one that runs on some node of the cluster and waits for its value; many threads may call it.

    Raises what the function raises, WorkerError when it can't be run, and ConfigError without Ray.
    """
    ray = _ray()
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(function)

    def call(*arguments: Any) -> Result:
        try:
            return ray.get(task.remote(*arguments))
        except ray.exceptions.RayTaskError as error:  # what the function raised
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise _died([str(arguments)], f"Ray ran it {_RETRIES + 1} times") from error

    return call


def _ray() -> Any:
    """The library, connected to the cluster. Raises ConfigError."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("executor is ray, which is not installed: pip install 'eagle-train[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    if ray.cluster_resources().get("CPU", 0) < 1:
        raise ConfigError("executor is ray, and no node of the cluster has a CPU to give; start nodes with ray start --num-cpus")
    return ray


def _on_ray(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None, name: Callable[[Item], str], advice: str
) -> Iterator[tuple[Item, Result]]:
    ray = _ray()
    content = pickle.dumps(function)
    shared, digest = ray.put(content), hashlib.blake2b(content, digest_size=16).hexdigest()
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_call_on_ray)
    queue = iter(items)
    running: dict[Any, Item] = {}
    try:
        while True:
            slots = workers or 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)  # nodes come and go
            while len(running) < slots and (item := next(queue, None)) is not None:
                running[task.remote(digest, shared, item)] = item
            if not running:
                return
            for reference in ray.wait(list(running), num_returns=1)[0]:
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:  # what the function raised
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise _died([name(running[reference])], f"Ray ran it {_RETRIES + 1} times; {advice}") from error
                yield running.pop(reference), result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


_kept: dict[str, Callable[[Any], Any]] = {}


def _call_on_ray(digest: str, function: bytes, item: Any) -> Any:
    if digest not in _kept:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _kept.clear()
        _kept[digest] = pickle.loads(function)
    return _kept[digest](item)
