from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from varlen_sft.train import signals
from varlen_sft.train.signals import StopRequest, resume_command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as asked:
        assert not asked() and asked.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher sends on what the terminal sent to all
        time.sleep(0.01)
        assert asked() and asked.signal == number
    assert signal.getsignal(number) is before
    told = capfd.readouterr().err
    assert told.count("the step is finished and saved, then the run ends") == 1
    assert ("Ctrl-C again ends at once" in told) == (number == signal.SIGINT)


def test_ctrl_c_again_ends_at_once_and_sigterm_again_does_not(monkeypatch):
    monkeypatch.setattr(signals, "_ECHO_S", 0.0)
    with StopRequest() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_only_the_main_thread_can_ask():
    found: list[str] = []

    def enter() -> None:
        with pytest.raises(ValueError) as caught, StopRequest():
            pass
        found.append(str(caught.value))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == ["StopRequest must be entered in the main thread"]


def test_a_process_that_is_told_ends_well():
    code = """
import time
from varlen_sft.train.signals import StopRequest
with StopRequest() as asked:
    print("ready", flush=True)
    while not asked():
        time.sleep(0.01)
print("saved", asked.signal.name)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as run:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate(timeout=20)
    assert (run.returncode, out) == (0, "saved SIGTERM\n")


def test_the_command_to_go_on_with(monkeypatch):
    command = ["/opt/bin/varlen-sft", "train", "my config.yaml", "--run.steps", "9"]
    said = "varlen-sft train 'my config.yaml' --run.steps 9"
    assert resume_command(command, {}) == said
    module = ["/opt/varlen_sft/cli.py", "train", "c.yaml"]
    assert resume_command(module, {}) == "python -m varlen_sft.cli train c.yaml"
    launched = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    module_run = "torchrun --nproc-per-node=2 -m varlen_sft.cli train c.yaml"
    assert resume_command(module, launched) == module_run
    launched["GROUP_WORLD_SIZE"] = "3"
    assert resume_command(module, launched) == module_run.replace("-m", "--nnodes=3 ... -m")
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert resume_command() == said
