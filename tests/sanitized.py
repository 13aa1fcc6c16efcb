"""A pytest plugin for .ci/sanitize: puts the sanitized build of `_native` in place of the installed one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "safecrit.ops._native"

(found,) = (Path(__file__).parents[1] / "build" / "sanitize" / "safecrit" / "ops").glob("_native*.so")
spec = importlib.util.spec_from_file_location(NAME, found)
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules[NAME] = module
