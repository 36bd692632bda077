"""Ctrl-C that ends a library in the midst of a file: the file is not what is blamed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from sparsering import signals
from sparsering.traces.errors import InputError


@pytest.mark.parametrize("kind", [InputError, OSError, ImportError])
def test_an_error_after_an_interrupt_is_the_interrupt(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_raised", [])
    with pytest.raises(kind), signals.never_misread(InputError, OSError, ImportError):
        raise kind("timeline.json.gz")
    with pytest.raises(KeyboardInterrupt):
        signals._interrupted(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt), signals.never_misread(InputError, OSError, ImportError):
        raise kind("timeline.json.gz")
    with pytest.raises(RuntimeError), signals.never_misread(InputError, OSError, ImportError):
        raise RuntimeError("another")


def test_the_command_line_says_so() -> None:
    """A verb that is interrupted while it reads, and whose library then says that the file is bad."""
    script = (
        "import os, signal, sys\n"
        "from sparsering.traces import files\n"
        "from sparsering.traces.errors import InputError\n"
        "def read(*arguments, **named):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        raise InputError('cannot be read: Bad file descriptor', source='plan.json') from None\n"
        "files.read_bytes = read\n"
        "sys.argv = ['sparsering', 'check', 'plan.json']\n"
        "from sparsering.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.splitlines()[-1:] == ["sparsering: interrupted"], done.stderr
    assert done.returncode == 130
