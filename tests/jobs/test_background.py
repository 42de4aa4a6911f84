import threading
import time

import pytest

from ddim_fast.jobs.background import Background


def test_the_caller_goes_on_and_the_next_work_waits():
    gate, done = threading.Event(), []
    with Background() as worker:
        worker.start(lambda: (gate.wait(60), done.append(1)))
        worker.check()
        assert done == []
        threading.Timer(0.05, gate.set).start()
        worker.start(lambda: done.append(2))
        assert done[0] == 1
        worker.finish()
        assert done == [1, 2]


def test_the_context_ends_when_the_work_is_done_after_an_error_too():
    done = []
    with pytest.raises(KeyError), Background() as worker:
        worker.start(lambda: (time.sleep(0.05), done.append(1)))
        raise KeyError
    assert done == [1]


@pytest.mark.parametrize("call", ["check", "finish", "start", "exit"])
def test_an_error_is_raised_once_by_the_next_call(call):
    def fail():
        raise OSError(28, "No space left on device", "there")

    with Background() as worker:
        worker.start(fail)
        while not worker._begun.done():
            time.sleep(0.001)
        with pytest.raises(OSError, match="No space left"):
            {"start": lambda: worker.start(fail), "exit": lambda: worker.__exit__()}.get(call, getattr(worker, call, None))()
        worker.check()
