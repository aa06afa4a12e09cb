"""Running, finished, failed or interrupted: distinguished without process ids."""

import os
import signal
import subprocess
import sys

from fedllm.runs.state import RunState, read_state

HOLDS = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from fedllm.runs.state import RunState\n"
    "state = RunState(Path(sys.argv[1]))\n"
    "print('up', flush=True)\n"
    "time.sleep(60)\n"
)


def test_a_run_is_running_while_its_process_lives_and_interrupted_when_it_is_killed(
    tmp_path,
):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        while_alive = read_state(tmp_path, finished=False)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    assert while_alive == ("running", None)
    assert read_state(tmp_path, finished=False) == ("interrupted", None)


def test_the_end_is_remembered(tmp_path):
    RunState(tmp_path).fail("too few clients")
    assert read_state(tmp_path, finished=False) == ("failed", "too few clients")
    # Going on with it is running again.
    state = RunState(tmp_path)
    assert read_state(tmp_path, finished=False) == ("running", None)
    state.finish()
    assert read_state(tmp_path, finished=False) == ("finished", None)


def test_a_folder_from_before_states_goes_by_its_result(tmp_path):
    assert read_state(tmp_path, finished=True) == ("finished", None)
    assert read_state(tmp_path, finished=False) == ("interrupted", None)
    (tmp_path / "state.json").write_text("{")
    assert read_state(tmp_path, finished=True) == ("finished", None)
