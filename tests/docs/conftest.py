"""The module that generates the documentation's tables, loaded as mkdocs does."""

import importlib.util
import sys
from types import ModuleType

import pytest

from doc_blocks import ROOT


@pytest.fixture(scope="session")
def tables() -> ModuleType:
    """docs/hooks/tables.py."""
    spec = importlib.util.spec_from_file_location("doc_tables", ROOT / "docs" / "hooks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
