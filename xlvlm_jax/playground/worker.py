"""One thread that runs the model: jobs wait in a queue, and can be cancelled between two events.

While none waits, the thread does spare work, a step at a time.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

_logger = logging.getLogger(__name__)

Event = dict[str, Any]  # JSON values
Work = Callable[[], Iterator[Event]]


class Job:
    """Work that waits, runs or has ended.

    Attributes:
        ahead: how many jobs were waiting or running when it was submitted.
    """

    def __init__(self, work: Work, deliver: Callable[[Event | None], None], ahead: int):
        self._work, self._deliver, self.ahead = work, deliver, ahead
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the job before its next event; what it has not begun it never does."""
        self._cancelled.set()

    def run(self) -> None:
        """Delivers the job's events, then None. An error becomes the last event, one line."""
        try:
            if not self._cancelled.is_set():
                self._run()
        except Exception as error:
            text = " ".join(str(error).split())[:500] or type(error).__name__
            self._tell({"error": text})
        self._tell(None)

    def _run(self) -> None:
        events = self._work()
        try:
            for event in events:
                if self._cancelled.is_set():
                    return
                self._tell(event)
        finally:
            if (close := getattr(events, "close", None)) is not None:
                close()

    def _tell(self, event: Event | None) -> None:
        if not self._cancelled.is_set():
            self._deliver(event)


class Worker:
    """Runs jobs one after the other on a thread of its own, in the order they were submitted.

    Args:
        spare: work that is done between two of its events whenever no job waits. Its events are
            dropped, and its errors end it alone.
    """

    def __init__(self, spare: Work | None = None) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._spare = None if spare is None else spare()
        self._waiting, self._lock = 0, threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="playground", daemon=True)
        self._thread.start()

    @property
    def has_spare_work(self) -> bool:
        """Whether the spare work goes on."""
        return self._spare is not None

    def submit(self, work: Work, deliver: Callable[[Event | None], None]) -> Job:
        """Adds work to the queue.

        Args:
            work: called on the worker's thread; returns the events of the job.
            deliver: called there with each event, and with None at the end, until the job is
                cancelled.

        Returns:
            The job.
        """
        with self._lock:
            job = Job(work, deliver, self._waiting)
            self._waiting += 1
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Ends the thread after the jobs that were submitted."""
        self._jobs.put(None)
        self._thread.join()

    def end(self, patience: float) -> bool:
        """Ends the thread after what it does now; jobs that wait are never done.

        Args:
            patience: seconds to wait.

        Returns:
            Whether it has ended. Python must not end before it: a thread that compiles would take
            the process down with it.
        """
        self._ended.set()
        self._jobs.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(block=self._spare is None)
            except queue.Empty:
                self._do_spare_work()
                continue
            if job is None or self._ended.is_set():
                return
            job.run()
            with self._lock:
                self._waiting -= 1

    def _do_spare_work(self) -> None:
        assert self._spare is not None
        try:
            next(self._spare)
        except StopIteration:
            self._spare = None
        except Exception as error:
            _logger.info("spare work ended: %s", error)
            self._spare = None
