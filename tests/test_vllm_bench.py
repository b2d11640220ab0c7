"""How bench/vllm_serving.py ends what it has started; what it measures needs vLLM."""

import signal
import subprocess
import sys

import psutil

from vllm_serving import end

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_server_that_does_not_end_is_ended_with_what_it_has_started():
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    child = psutil.Process(int(process.stdout.readline()))
    end(process, patience=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_one_that_does_is_left_to():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    end(process, patience=30)
    assert process.returncode == -signal.SIGTERM
