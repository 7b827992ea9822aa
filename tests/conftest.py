"""What all tests share: where the real data are, and a place to run in."""
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    "The folder of real data: $RECGEN_DATA, or shared/data beside the checkout. Its absence fails in CI and skips elsewhere."
    folder = Path(os.environ.get("RECGEN_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        message = "the real data are not here: set RECGEN_DATA to the folder that holds beauty/, ml100k/ …"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    "A fresh, empty RECGEN_RUNS, and a working folder beside it."
    folder, here = tmp_path / "runs", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.setenv("RECGEN_RUNS", str(folder))
    monkeypatch.chdir(here)
    return folder
