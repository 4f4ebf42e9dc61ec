import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fakes():
    spec = importlib.util.spec_from_file_location("callback_fakes", Path(__file__).with_name("fakes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PENSTOCK_CACHE", str(folder))
    return folder
