"""The examples run as a newcomer runs them, only for seconds; so does the code of the README."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SMALL = ["--minutes", "0.05", "--dim", "32", "--layers", "2", "--batch", "4", "--seqlen", "64"]


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests are running beside this one
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\r" not in done.stdout  # no bar where there is no terminal
    return done.stdout


def test_language_model_learns_and_decodes_as_it_reads():
    out = run("train_mamba_lm.py", *SMALL, "--bytes", "40")
    loss = float(re.search(r"([\d.]+)  this model, on text it has not seen", out)[1])
    assert loss < 8.0  # bits per byte before anything is learned
    difference = float(re.search(r"all at once: (\S+) of", out)[1])
    assert difference < 1e-4


def test_digits_are_read_and_routes_drawn(tmp_path):
    picture = tmp_path / "routes.png"
    out = run(
        "classify_digits.py", "--minutes", "4", "--steps", "60", "--dim", "16", "--picture", picture
    )
    lines = re.findall(r"^ +([\d.]+)%  (.+)$", out, re.MULTILINE)
    right = {who: float(percent) for percent, who in lines}
    assert right["logistic regression"] > 90
    assert right["this model"] > 40  # after so few steps; guessing makes 10
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_transformers_train_save_load_and_generate(tmp_path):
    out = run(
        "generate.py", "--minutes", "0.02", "--hidden", "32", "--layers", "2",
        "--bytes", "20", "--directory", tmp_path,
    )  # fmt: skip
    assert float(re.search(r"loss ([\d.]+)", out)[1]) < 5.6
    assert "the same text" in out
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000


def test_code_of_the_readme():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    assert names["x"].grad.isfinite().all()
    assert names["y_t"].isfinite().all()


def test_links_of_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("third_party/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
