"""scripts/tutorial.ipynb: it runs from top to bottom, and what it shows is small and free of this machine."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "scripts" / "tutorial.ipynb"
CELLS = nbformat.read(NOTEBOOK, as_version=4).cells
OUTPUTS = [output for cell in CELLS for output in cell.get("outputs", [])]


def test_outputs_are_there_and_small():
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) >= 5
    assert NOTEBOOK.stat().st_size < 600_000
    run = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert run == list(range(1, len(run) + 1))  # all in one go


def test_outputs_hold_no_path_warning_or_time_stamp():
    for output in OUTPUTS:
        assert output["output_type"] in ("stream", "display_data", "execute_result")
        assert output.get("name") != "stderr", output
        shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"(?<![\w<>])/\w+/\w+|\w:\\|[Ww]arning|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d", shown), shown
    assert not any("execution" in cell["metadata"] for cell in CELLS)  # when each cell ran


def test_every_section_asks_and_answers_a_question():
    text = [cell["source"] for cell in CELLS if cell["cell_type"] == "markdown"]
    sections = [title for part in text for title in re.findall(r"^## (\d)\. ", part, flags=re.MULTILINE)]
    assert sections == list("1234567")
    assert sum(part.count("**Question.**") for part in text) == len(sections)
    assert sum(part.count("<details><summary>Answer</summary>") for part in text) == len(sections)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises if a cell does
    assert all(cell.outputs for cell in notebook.cells if "plt.show()" in cell.source)
