"""`sparsering VERB --help` where torch, Triton and transformers are not installed."""

from __future__ import annotations

import json
import subprocess
import sys

from sparsering import cli

CODE = """
import json, sys
for name in ("torch", "triton", "transformers", "safetensors", "liger_kernel", "accelerate"):
    sys.modules[name] = None
from typer.testing import CliRunner
from sparsering import cli
results = {verb: CliRunner().invoke(cli.app, [verb, "--help"]) for verb in cli.VERBS}
print(json.dumps({verb: [one.exit_code, one.stdout, one.stderr] for verb, one in results.items()}))
"""


def test_every_verb_has_its_help():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    for verb, (code, stdout, stderr) in json.loads(done.stdout).items():
        assert (verb, code, stderr) == (verb, 0, "")
        assert "--help" in stdout
    assert set(json.loads(done.stdout)) == set(cli.VERBS)
