import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from ddim_fast.io.processes import Processes
from ddim_fast.io.stopping import signals


def torchrun(script, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)


@pytest.fixture
def script(tmp_path):
    """A file whose second half is run by two processes."""

    def write(code: str):
        path = tmp_path / "script.py"
        path.write_text("import sys, torch\nfrom ddim_fast.io.processes import Processes\n" + textwrap.dedent(code))
        return path

    return write


def test_one_process_does_all_itself(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Processes() as processes:
        assert (processes.count, processes.rank, processes.is_first) == (1, 0, True)
        assert processes.share([3, 4, 5]) == [3, 4, 5]
        assert processes.device_name("auto") == "auto" and processes.device_name("cuda") == "cuda"
        assert processes.from_first(lambda: 7) == 7
        assert [processes.add_done(2), processes.add_done(3)] == [2, 5]
        threads = torch.get_num_threads()
        processes.share_cores()
        processes.wait()
        assert torch.get_num_threads() == threads


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    processes = Processes()
    assert not processes.is_first and processes.share(range(10)) == range(3, 10, 4)
    assert processes.device_name("cuda") == "cuda:1"
    assert processes.device_name("cuda:0") == "cuda:0" and processes.device_name("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert processes.device_name("auto") == "auto"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert processes.device_name("auto") == "cuda:1"


def test_two_processes_share_and_agree(script):
    run = torchrun(
        script("""
            with Processes() as processes:
                said = processes.from_first(lambda: ["from", processes.rank])
                total = processes.add_done(10 + processes.rank)
                processes.wait()
                assert processes.add_done(0) == 21 and total in (10, 11, 21)
                sys.stdout.write(f"{said} {processes.share(range(5))}\\n")
        """)
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["['from', 0] range(0, 5, 2)", "['from', 0] range(1, 5, 2)"]


@pytest.mark.parametrize(
    "failing", ["processes.rank == 1", pytest.param("processes.from_first(lambda: 1 / 0)", marks=pytest.mark.slow)]
)
def test_a_process_that_fails_ends_the_run(script, failing):
    run = torchrun(
        script(f"""
            with Processes() as processes:
                if {failing}:
                    sys.exit(3)
                processes.wait()
                print("done")
        """)
    )
    assert run.returncode != 0 and "done" not in run.stdout
    assert run.stderr.count("ZeroDivisionError: division by zero") == ("from_first" in failing)


@pytest.mark.slow
def test_the_others_follow_the_first_and_say_nothing(script):
    run = torchrun(
        script("""
            def make():
                sys.stderr.write(f"said by {processes.rank}\\n")
                return processes.rank

            with Processes() as processes:
                assert processes.after_first(make) == processes.rank
                assert processes.largest([processes.rank, -processes.rank]) == [1, 0]
                assert processes.total([0.5, processes.rank]) == [1.0, 1.0]
        """)
    )
    assert run.returncode == 0 and run.stderr.count("said by 0") == 1 and "said by 1" not in run.stderr, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["True", "processes.rank == 1"])
def test_of_several_that_fail_one_says_why(script, failing):
    run = torchrun(
        script(f"""
            with Processes() as processes:
                processes.wait()
                if {failing}:
                    raise ValueError("the cause")
                processes.wait()
        """)
    )
    assert run.returncode != 0
    assert run.stderr.count("ValueError: the cause") == 1 and "has ended" not in run.stderr


def test_a_lost_process_is_said_though_torchrun_ends_those_that_are_left():
    class Ending:
        def destroy_process_group(self):
            signal.raise_signal(signal.SIGTERM)

    processes = Processes(alone=True)
    processes.count, processes._dist, processes._is_first_to_fail = 2, Ending(), lambda: True
    with signals, pytest.raises(RuntimeError, match="another process of this run has ended"):
        processes.__exit__(RuntimeError, RuntimeError("[gloo/transport] connection closed by peer"), None)
