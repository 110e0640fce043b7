"""The compiled extension, sam_fused._C, or what to do where it could not be imported."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

_import_error: ImportError | None = None
try:
    from . import _C as _C
    from . import fakes  # noqa: F401  (what the operators are in a trace)
except ImportError as error:  # FusedSAM raises it where it is constructed
    _import_error = error
    _C = None  # type: ignore[assignment]

BUILD_COMMAND = "pip install --no-build-isolation -e ."


def extension() -> ModuleType:
    """sam_fused._C. Raises ImportError, with what to do, where it could not be imported."""
    if _import_error is None:
        return _C
    here = Path(__file__).parent
    where = "from the source tree"
    if (here.parent / "setup.py").exists() and not list(here.glob("_C.*.so")):
        where = f"in {here.parent}, the source tree, which Python takes here instead of an installed sam_fused,"
    raise ImportError(
        f"sam_fused's extension could not be imported: {_import_error}. Build it {where} with: {BUILD_COMMAND}"
    ) from _import_error
