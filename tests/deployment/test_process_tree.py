"""A process is ended together with what it started in sessions of its own."""

import subprocess
import sys

import psutil

from fedllm.deployment.process_tree import end_tree

PARENT = """
import subprocess, sys, time
words = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(words, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_a_child_in_another_session_is_ended_too():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        end_tree(parent.pid)
        parent.wait(timeout=10)

    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_has_ended_already_is_left_alone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)

    end_tree(process.pid)
