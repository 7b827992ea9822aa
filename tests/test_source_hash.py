"""What makes finished runs other ones: the code that results depend on, and no more."""
import json

from recgen.core.hashing import hash_source

def test_results_code_counts_and_the_command_line_does_not(tmp_path):
    package = tmp_path / "recgen"
    for name in ("core/a.py", "cli.py", "commands/b.py", "_modidx.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x = 1\n")
    (tmp_path / "nbs").mkdir()
    stage = tmp_path / "nbs" / "00_data.ipynb"
    stage.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["x"], "outputs": [1]}]}))
    before = hash_source(package)
    for name in ("cli.py", "commands/b.py", "_modidx.py"):
        (package / name).write_text("x = 2\n")
    stage.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["x"], "outputs": []}, {"cell_type": "markdown", "source": ["y"]}]}))
    assert hash_source(package) == before
    (package / "core" / "a.py").write_text("x = 2\n")
    other = hash_source(package)
    stage.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["z"]}]}))
    assert len({before, other, hash_source(package)}) == 3
