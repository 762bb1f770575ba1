"""Shell completion: installed by the command that the documentation names, in a shell as a user has it."""

import os
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def shell(tmp_path):
    """bash with a home of its own, and `eagle` of this environment on its path."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    command = tmp_path / "bin" / "eagle"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m eagle_train.cli "$@"\n')
    command.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "SHELL": "/bin/bash", "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(script):
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=120)

    return run


def completed(*words):
    """What bash runs at a press of the tab key after `words`, the last of which is being typed."""
    quoted = " ".join(f"'{word}'" for word in words)
    return f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _eagle_completion eagle; echo ${{COMPREPLY[@]}}\n"


def test_bash_completes_verbs_options_and_values(shell):
    done = shell("eagle --install-completion bash")
    assert done.returncode == 0, done.stderr
    done = shell(
        "shopt -s expand_aliases; source ~/.bashrc; complete -p eagle\n"
        + completed("eagle", "pl")
        + completed("eagle", "plan", "--sh")
        + completed("eagle", "eval", "--metric", "tea")
        + completed("eagle", "chat", "--device", "")
        + completed("eagle", "curate", "spl")
    )
    assert done.stderr == ""
    defined, *found = done.stdout.splitlines()
    assert "_eagle_completion" in defined
    assert found == ["plan", "--show-defaults", "teacher_forced", "cpu cuda", "split"]


def test_the_command_for_a_script(shell):
    done = shell("eagle --show-completion bash")
    assert "complete -o default -F _eagle_completion eagle" in done.stdout
