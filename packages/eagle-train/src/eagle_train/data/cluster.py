"""Ray, the engine for work that outgrows one machine: an optional library, imported when a configuration asks for it.

The cluster is the one that RAY_ADDRESS names, else a new local one. All of its nodes must see the same files and packages. Ray runs a task
again when its node dies.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from eagle_train.config import ConfigError

ATTEMPTS = 6
"""Of a task whose node dies."""
Item = TypeVar("Item")
Value = TypeVar("Value")


def map_on_ray(function: Callable[..., Value], items: Sequence[Item], *common: Any) -> Iterator[tuple[int, Value]]:
    """(index, function(item, *common)) of all items, in the order in which they finish; tasks take one CPU each.

    function: importable by name on every node. common: sent to every node once. An exception of the function is raised here.
    Raises ConfigError when Ray is not installed.
    """
    ray, task = _task(function)
    shared = [ray.put(value) for value in common]
    waiting = iter(range(len(items)))
    running: dict[Any, int] = {}
    try:
        while True:
            slots = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
            while len(running) < slots and (index := next(waiting, None)) is not None:
                running[task.remote(items[index], *shared)] = index
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                value = ray.get(reference)
                yield running.pop(reference), value
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def call_on_ray(function: Callable[..., Value]) -> Callable[..., Value]:
    """`function` as one that runs on some node and waits for its value; may be called from many threads."""
    ray, task = _task(function)
    return lambda *arguments: ray.get(task.remote(*arguments))


def _task(function: Callable[..., Any]) -> tuple[Any, Any]:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("executor is ray, which is not installed: pip install 'eagle-train[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray, ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(function)
