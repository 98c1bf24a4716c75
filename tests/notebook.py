"""Runs docs/tour.ipynb in this process, without Jupyter. `python tests/notebook.py` stores the outputs in the notebook."""

import ast
import contextlib
import io
import json
import tempfile
from pathlib import Path

import environment  # noqa: F401  (the tests' own, so that the outputs are those of the test)

from dail_jax import metrics

TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"


def read() -> dict:
    return json.loads(TOUR.read_text("utf-8"))


def run(notebook: dict) -> dict:
    """Executes the code cells in one namespace, which it returns, and replaces their outputs."""
    space: dict = {}
    metrics.Progress.every = float("inf")  # its lines depend on how fast the machine is
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop().value if isinstance(tree.body[-1], ast.Expr) else ast.Constant(None)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, TOUR.name, "exec"), space)
            value = eval(compile(ast.Expression(last), TOUR.name, "eval"), space)
        cell["execution_count"], cell["outputs"] = number, []
        if printed.getvalue():
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
        if value is not None:
            data = {kind: lines(text) for kind, text in shown(value).items()}
            cell["outputs"].append(
                {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
            )
    return space


def shown(value) -> dict[str, str]:
    """What Jupyter shows of a value, by MIME type."""
    if hasattr(value, "_repr_mimebundle_"):
        return value._repr_mimebundle_([], [])
    page = {"text/html": value._repr_html_()} if hasattr(value, "_repr_html_") else {}
    return {"text/plain": repr(value), **page}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    notebook = read()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run(notebook)
    TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    import tiny

    with tiny.alone():
        main()
