"""One thread, in order; a cancelled job ends before its next event."""

import queue
import threading

import pytest

from xlvlm_jax.playground.worker import Worker


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.close()


def collect(events: "queue.Queue[dict | None]") -> list[dict]:
    return list(iter(lambda: events.get(timeout=10), None))


def test_jobs_run_in_order_on_one_thread(worker):
    seen, first, second = [], queue.Queue(), queue.Queue()
    begun, go_on = threading.Event(), threading.Event()

    def work(name):
        seen.append((name, threading.get_ident()))
        begun.set()
        go_on.wait(10)
        yield {"name": name}

    one = worker.submit(lambda: work("one"), first.put)
    begun.wait(10)
    two = worker.submit(lambda: work("two"), second.put)
    assert (one.ahead, two.ahead) == (0, 1)
    go_on.set()
    assert collect(first) == [{"name": "one"}] and collect(second) == [{"name": "two"}]
    assert [name for name, _ in seen] == ["one", "two"]
    assert len({thread for _, thread in seen} - {threading.get_ident()}) == 1


def test_a_cancelled_job_ends_before_its_next_event_and_is_closed(worker):
    events, closed, steps = queue.Queue(), [], []
    seen = threading.Event()

    def work():
        try:
            for step in range(1000):
                steps.append(step)
                yield {"step": step}
                seen.wait(10)
        finally:
            closed.append(True)

    job = worker.submit(work, events.put)
    assert events.get(timeout=10) == {"step": 0}
    job.cancel()
    seen.set()
    after = queue.Queue()
    worker.submit(lambda: iter([{"next": 1}]), after.put)
    assert collect(after) == [{"next": 1}]
    assert closed == [True] and len(steps) <= 2 and events.empty()


def test_a_job_cancelled_in_the_queue_never_begins(worker):
    begun, go_on, ran, after = threading.Event(), threading.Event(), [], queue.Queue()

    def wait():
        begun.set()
        go_on.wait(10)
        yield {}

    worker.submit(wait, lambda _: None)
    begun.wait(10)
    worker.submit(lambda: iter([ran.append(1) or {}]), after.put).cancel()
    go_on.set()
    worker.submit(lambda: iter(()), after.put)
    assert collect(after) == [] and not ran


def test_spare_work_goes_on_while_no_job_waits():
    steps, begun, go_on, done = [], threading.Event(), threading.Event(), queue.Queue()

    def spare():
        for step in range(3):
            steps.append(step)
            begun.set()
            go_on.wait(10)
            yield {}
        done.put(None)

    worker = Worker(spare)
    begun.wait(10)
    events = queue.Queue()
    job = worker.submit(lambda: iter([{"steps": len(steps)}]), events.put)
    assert worker.has_spare_work and job.ahead == 0
    go_on.set()
    # The job came between the first step and the second.
    assert collect(events) == [{"steps": 1}]
    done.get(timeout=10)
    worker.close()
    assert steps == [0, 1, 2] and not worker.has_spare_work


def test_ending_waits_for_what_is_done_now_and_for_nothing_else():
    begun, go_on, ran = threading.Event(), threading.Event(), []

    def spare():
        begun.set()
        go_on.wait(10)
        yield {}
        ran.append("spare")
        yield {}

    worker = Worker(spare)
    begun.wait(10)
    worker.submit(lambda: iter([ran.append("job") or {}]), lambda _: None)
    assert not worker.end(0.05)
    go_on.set()
    assert worker.end(10) and not ran


def test_spare_work_that_fails_ends_alone():
    def fail():
        yield {}
        raise ValueError("too much")

    worker, events = Worker(fail), queue.Queue()
    worker.submit(lambda: iter([{"a": 1}]), events.put)
    assert collect(events) == [{"a": 1}]
    while worker.has_spare_work:
        threading.Event().wait(0.01)
    worker.submit(lambda: iter([{"b": 2}]), events.put)
    assert collect(events) == [{"b": 2}]
    worker.close()


def test_an_error_is_one_line_and_the_next_job_runs(worker):
    events = queue.Queue()

    def fail():
        yield {"a": 1}
        raise ValueError("first line\nsecond line")

    worker.submit(fail, events.put)
    assert collect(events) == [{"a": 1}, {"error": "first line second line"}]
    worker.submit(lambda: iter([{"b": 2}]), events.put)
    assert collect(events) == [{"b": 2}]
