"""Writes examples/quickstart.ipynb from examples/quickstart.py, with the output of its cells.

python tests/make_notebook.py
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Jupyter starts in the folder of the notebook, from which the modules of a clone are not found.
SETUP = 'import sys\n\nsys.path.insert(0, "..")  # the clone, seen from examples/'


def cells(script: str) -> list[dict[str, Any]]:
    """Cells without outputs: the first paragraph of the docstring, the setup, and the parts between
    the lines `# %%`."""
    docstring, *parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)
    texts = [(" [markdown]", docstring.strip('" \n').split("\n\n")[0]), ("", SETUP)]
    texts += zip(parts[::2], parts[1::2], strict=True)
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(texts):
        cell = {"id": f"cell-{number}", "metadata": {}}
        if kind == " [markdown]":
            text = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
            cell |= {"cell_type": "markdown"}
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        made.append(cell | {"source": text.strip().splitlines(keepends=True)})
    return made


def main() -> None:
    sys.path.insert(0, str(EXAMPLES.parent))
    made, names = cells((EXAMPLES / "quickstart.py").read_text("utf-8")), {}
    for cell in made:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec("".join(cell["source"]), names)
            if text := printed.getvalue().splitlines(keepends=True):
                cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4}
    text = json.dumps(notebook | {"nbformat_minor": 5}, indent=1, ensure_ascii=False)
    (EXAMPLES / "quickstart.ipynb").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
