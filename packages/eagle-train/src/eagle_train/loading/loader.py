"""Packs read ahead of the step by worker processes, in order, within a bound of bytes; a file that blocks costs only its sample.

Each worker is a process with a pipe. It receives the tasks of some packs, publishes which sample it reads, and sends back finished batches.
The parent (one thread) assigns tasks while the bytes of batches that are requested and not yet used stay below the bound, returns batches
in the order of the tasks, and measures time: a worker that reads one sample for longer than `stuck_after` is killed, a new one reads the
pack again without that sample, and the sample goes to the ledger. So does a sample at which two processes died, one after the other.
Order and content never depend on timing (except for what a time limit cut).
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from eagle_model.prompt import CachedEncoder
from eagle_model.visual import VisualSpec
from eagle_sampling import Limits, MediaUnavailable
from eagle_train.config import RemoteConfig
from eagle_train.data.ledger import Entry
from eagle_train.data.remote import enable
from eagle_train.data.sample import Address
from eagle_train.errors import TrainError
from eagle_train.planning.stages import Planned, pack_tiles, pack_tokens

from .pack import WHOLE, LoadedPack, Share, Weighting, load_pack

logger = logging.getLogger(__name__)

STUCK_AFTER = 600.0
"""Seconds that one sample may take. The media readers have shorter limits of their own; this one is for a process that doesn't return."""
SLOW_SAMPLE = 30.0
"""Seconds after which a sample's source is named in the log."""


class Reading(NamedTuple):
    """What a worker needs besides its tasks. tokenizer: its folder. remote: which addresses it reads."""

    tokenizer: str
    spec: VisualSpec
    limits: Limits
    share: Share = WHOLE
    remote: RemoteConfig = RemoteConfig()


class Task(NamedTuple):
    """One pack to read; `key` identifies it for the caller (stage, step, place), `weighting` is the stage's."""

    key: Any
    pack: tuple[Planned, ...]
    weighting: Weighting

    def nbytes(self, spec: VisualSpec, share: Share = WHOLE) -> int:
        """Bytes of the batch for a process that reads `share` of its tiles, from the plan alone."""
        tokens, tiles = pack_tokens(self.pack), pack_tiles(self.pack, spec)
        return tokens * 36 + -(-tiles // share.ranks) * 3 * spec.tile_size**2


class LoaderError(TrainError, RuntimeError):
    """The loader can't continue; the message has the worker's own traceback."""


def make_encoder(tokenizer: str) -> CachedEncoder:
    """The tokenizer of a folder, as the batches need it. Loads transformers, but not torch."""
    from eagle_model.tokenizer import load_tokenizer

    return CachedEncoder(load_tokenizer(tokenizer))


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    place: Any  # shared int: the sample (place in the pack) that is being read, -1 for none
    number: int | None = None  # the task it has
    last_place: int = -1
    since: float = 0.0
    named: bool = False


@dataclass
class _Slot:
    task: Task
    nbytes: int
    skip: dict[int, Entry] = field(default_factory=dict)
    #: Samples that were being read when a process died.
    died: set[int] = field(default_factory=set)
    batch: LoadedPack | None = None


class Loader:
    """Iterate over `(key, LoadedPack)` in the order of `tasks`; use as a context manager, or call `close`.

    workers: processes; 0 reads in the calling thread when a batch is requested. prefetch: bytes of batches that may be in progress or
    waiting (one batch is always allowed). `waited` is the time that the consumer waited; `seconds_by_source` is reading time by source.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        reading: Reading,
        *,
        workers: int = 2,
        prefetch: int = 1 << 30,
        stuck_after: float = STUCK_AFTER,
        encoder: CachedEncoder | None = None,
    ) -> None:
        self._tasks = iter(tasks)
        self._reading = reading
        self._prefetch = prefetch
        self._stuck_after = stuck_after
        self._encoder = encoder
        self._count = workers
        self.waited = 0.0
        self.seconds_by_source: Counter[str] = Counter()
        self._slots: dict[int, _Slot] = {}
        self._next_task = 0
        self._next_out = 0
        self._exhausted = False
        self._bytes = 0
        self._failures = 0
        self._error: BaseException | None = None
        self._closed = False
        self._condition = threading.Condition()
        self._workers: list[_Worker] = []
        self._thread: threading.Thread | None = None
        if workers:
            self._context = multiprocessing.get_context("spawn")
            self._workers = [self._start() for _ in range(workers)]
            self._wake_read, self._wake_write = self._context.Pipe(duplex=False)
            self._thread = threading.Thread(target=self._serve, name="eagle-loader", daemon=True)
            self._thread.start()

    # The consumer's side

    @property
    def bytes_ahead(self) -> int:
        """Bytes of the batches that are in progress (as their plans estimate them) or waiting; at most `prefetch` and one batch more."""
        return self._bytes

    def __iter__(self) -> Iterator[tuple[Any, LoadedPack]]:
        while (item := self.get()) is not None:
            yield item

    def get(self) -> tuple[Any, LoadedPack] | None:
        """The next batch, or None at the end. Raises LoaderError (or what `tasks` raised)."""
        begin = time.monotonic()
        try:
            return self._get_here() if not self._count else self._get_from_workers()
        finally:
            self.waited += time.monotonic() - begin

    def _get_here(self) -> tuple[Any, LoadedPack] | None:
        task = next(self._tasks, None)
        if task is None:
            return None
        if self._encoder is None:
            self._encoder = make_encoder(self._reading.tokenizer)
        batch = read(task, self._encoder, self._reading)
        self.seconds_by_source.update(batch.seconds_by_source)
        return task.key, batch

    def _get_from_workers(self) -> tuple[Any, LoadedPack] | None:
        with self._condition:
            while True:
                slot = self._slots.get(self._next_out)
                if slot is not None and slot.batch is not None:
                    del self._slots[self._next_out]
                    self._next_out += 1
                    self._bytes -= slot.nbytes
                    self._wake()
                    return slot.task.key, slot.batch
                if self._error is not None:
                    raise self._error
                if self._exhausted and not self._slots:
                    return None
                if self._closed:
                    raise LoaderError("the loader is closed")
                self._condition.wait()

    def close(self) -> None:
        """Stop the workers; what they were reading is lost."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            self._wake()
        if self._thread is not None:
            self._thread.join()
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The serving thread

    def _wake(self) -> None:
        if (self._thread is not None and not self._closed) or (self._thread is not None and self._thread.is_alive()):
            try:
                self._wake_write.send_bytes(b"1")
            except OSError:  # the thread has ended and needs no wake-up
                return

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        place = self._context.RawValue("q", -1)
        process = self._context.Process(target=work, args=(there, place, self._reading), name="eagle-reader", daemon=True)
        with _without_signals():
            process.start()
        there.close()
        return _Worker(process, here, place)

    def _serve(self) -> None:
        try:
            while not self._closed:
                self._hand_out()
                pipes: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers}
                for pipe in wait([*pipes, self._wake_read], timeout=min(1.0, self._stuck_after / 4)):
                    if pipe is self._wake_read:
                        self._wake_read.recv_bytes()
                    else:
                        self._receive(pipes[pipe])
                self._watch()
        except BaseException as error:  # any error: the consumer would wait for ever without it
            with self._condition:
                self._error = error
                self._condition.notify_all()

    def _hand_out(self) -> None:
        # One task a process: a process that has one may be writing its batch, and would not read.
        for worker in self._workers:
            if worker.number is not None or self._exhausted or (self._slots and self._bytes >= self._prefetch):
                continue
            task = next(self._tasks, None)
            with self._condition:
                if task is None:
                    self._exhausted = True
                    self._condition.notify_all()
                    return
                slot = _Slot(task, task.nbytes(self._reading.spec, self._reading.share))
                worker.number = self._next_task
                self._slots[self._next_task] = slot
                self._next_task += 1
                self._bytes += slot.nbytes
            self._send(worker)

    def _send(self, worker: _Worker) -> None:
        assert worker.number is not None
        slot = self._slots[worker.number]
        worker.last_place, worker.since = -1, time.monotonic()
        try:
            worker.pipe.send((slot.task, slot.skip))
        except OSError:  # the process died; _receive finds the closed pipe and starts another
            return

    def _receive(self, worker: _Worker) -> None:
        try:
            batch = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._restart(worker, "died", f"the reading process ended with exit code {worker.process.exitcode}")
            return
        if isinstance(batch, MediaUnavailable):
            raise batch
        if not isinstance(batch, LoadedPack):
            raise LoaderError(f"a reading process failed:\n{batch}")
        assert worker.number is not None
        with self._condition:
            slot = self._slots[worker.number]
            self._bytes += batch.batch.nbytes - slot.nbytes
            slot.nbytes, slot.batch = batch.batch.nbytes, batch
            self.seconds_by_source.update(batch.seconds_by_source)
            self._condition.notify_all()
        worker.number = None

    def _watch(self) -> None:
        """Log slow samples, and stop reading ones that block."""
        now = time.monotonic()
        for worker in list(self._workers):
            place = worker.place.value
            if worker.number is None or place < 0 or place != worker.last_place:
                worker.last_place, worker.since, worker.named = place, now, False
                continue
            elapsed = now - worker.since
            if elapsed > SLOW_SAMPLE and not worker.named:
                worker.named = True
                address = self._slots[worker.number].task.pack[place].address
                logger.warning("%s:%d (of %s) is slow: %.0f s so far", address.source, address.line, address.annotation, elapsed)
            if elapsed > self._stuck_after:
                worker.process.kill()
                worker.process.join()
                self._restart(worker, "stuck", f"reading took longer than {self._stuck_after:.0f} s")

    def _restart(self, worker: _Worker, reason: str, detail: str) -> None:
        """A new process for one that is gone, which reads its pack again, without the sample that it was at.

        A sample whose process died is tried a second time: a process may be killed whatever it reads (by the system when memory is short),
        and a run in which that happened has the numbers of one in which it did not.
        """
        worker.pipe.close()
        place = worker.place.value
        if worker.number is None or place < 0:
            self._failures += 1
            if self._failures > 2 * self._count:
                raise LoaderError(
                    f"reading processes can't start: {detail}. They import the program: one that calls eagle_train needs "
                    'if __name__ == "__main__": around the calls. With loader.workers=0 other reasons are shown directly'
                )
        fresh = self._start()
        fresh.number = worker.number
        self._workers[self._workers.index(worker)] = fresh
        if worker.number is None:
            return
        if place >= 0:
            slot = self._slots[worker.number]
            address = slot.task.pack[place].address
            again = reason == "died" and place not in slot.died
            slot.died.add(place)
            what = "is read again" if again else "is not used"
            logger.warning("%s:%d (of %s) %s: %s", address.source, address.line, address.annotation, what, detail)
            if not again:
                slot.skip[place] = Entry(address.source, address.line, reason, detail, "train")
        self._send(fresh)


@contextmanager
def _without_signals() -> Iterator[None]:
    """Processes that start here ignore SIGINT and SIGTERM: a terminal sends Ctrl-C to them too, and the running step depends on them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # The first process that is spawned starts multiprocessing's resource tracker, which unblocks both signals before Python 3.13.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read(task: Task, encoder: CachedEncoder, reading: Reading, skip: dict[int, Entry] | None = None, on_sample: Any = None) -> LoadedPack:
    """One pack, in this process."""
    return load_pack(
        task.pack,
        encoder,
        reading.spec,
        weighting=task.weighting,
        limits=reading.limits,
        share=reading.share,
        skip=skip,
        on_sample=on_sample,
        clock=time.monotonic,
    )


def work(pipe: Connection, place: Any, reading: Reading) -> None:
    """The body of a worker process: tasks in, batches out, until the pipe closes. `place` is the sample that is being read."""

    def begins(number: int, _: Address) -> None:
        place.value = number

    try:
        enable(reading.remote)
        encoder = make_encoder(reading.tokenizer)
        while True:
            try:
                task, skip = pipe.recv()
            except (EOFError, OSError):  # the rank has ended, or was killed
                return
            batch = read(task, encoder, reading, skip, begins)
            place.value = -1
            pipe.send(batch)
    except (BrokenPipeError, KeyboardInterrupt):
        return
    except MediaUnavailable as error:
        pipe.send(error)
    except BaseException:
        pipe.send(traceback.format_exc())
