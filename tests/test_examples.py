"""The example runs as a newcomer runs it, only for seconds."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_mamba_lm.py"
SMALL = ["--minutes", "0.05", "--dim", "32", "--layers", "2", "--batch", "4", "--seqlen", "64"]


def test_language_model_learns_and_decodes_as_it_reads():
    command = [sys.executable, EXAMPLE, *SMALL, "--bytes", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    loss = float(re.search(r"([\d.]+)  this model, on text it has not seen", done.stdout)[1])
    assert loss < 8.0  # bits per byte before anything is learned
    difference = float(re.search(r"all at once: (\S+) of", done.stdout)[1])
    assert difference < 1e-4
    assert "\r" not in done.stdout  # no bar where there is no terminal
