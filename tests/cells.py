"""Run the cells of stage notebooks in one process and say where each stopped: python cells.py < requests.json

A request is {"stage", "params", "stop": text of the last cell to run, "show": expression}. papermill's own function puts the parameters in.
"""
import functools
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

def answer(request: dict, notebooks: str) -> dict:
    "What the notebook's first failing cell raised, or what `show` evaluates to after the cell with `stop`."
    notebook = parameterize_notebook(load_notebook_node(f"{notebooks}/{request['stage']}.ipynb"), request["params"])
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for cell in notebook.cells:
            if cell.cell_type != "code":
                continue
            result = shell.run_cell(cell.source, store_history=True)
            if not result.success:
                error = result.error_in_exec or result.error_before_exec
                return {"error": type(error).__name__, "message": str(error)}
            if request["stop"] in cell.source:
                return {"value": repr(eval(request.get("show", "None"), shell.user_ns))}
    return {}


if __name__ == "__main__":
    import matplotlib

    from recgen.sources import world

    matplotlib.use("agg")
    world.make_world = functools.cache(world.make_world)  # the notebooks' examples plant the same world again and again
    print(json.dumps([answer(r, sys.argv[1]) for r in json.load(sys.stdin)]))
