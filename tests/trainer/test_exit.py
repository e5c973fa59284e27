"""How a process of a distributed run ends."""

import subprocess
import sys

CODE = """
import threading, time
from trl.trainer.construct import wait_at_exit

def put_down():
    threading.main_thread().join()
    time.sleep(0.05)
    print("put down", flush=True)

threading.Thread(target=put_down, daemon=True).start()
if {waits}:
    wait_at_exit()
    wait_at_exit()
"""


def test_python_waits_for_threads_at_its_end():
    """As those of gloo, which put down the last collective's tensors a moment after it."""
    ended = [
        subprocess.run([sys.executable, "-c", CODE.format(waits=waits)], capture_output=True, text=True)
        for waits in (True, False)
    ]
    assert [each.stdout.strip() for each in ended] == ["put down", ""]
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr
