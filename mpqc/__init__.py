"""mpqc: the mixed-precision quantization compiler.

The names below load at first use, so that ``import mpqc`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpqc.graph import Graph, Precision
    from mpqc.pipeline import compile_model, import_model
    from mpqc.plan import Plan
    from mpqc.runtime import load

    __version__: str

__all__ = [
    "Graph",
    "Plan",
    "Precision",
    "__version__",
    "compile_model",
    "import_model",
    "load",
]

_HOMES = {
    "Graph": "mpqc.graph",
    "Plan": "mpqc.plan",
    "Precision": "mpqc.graph",
    "compile_model": "mpqc.pipeline",
    "import_model": "mpqc.pipeline",
    "load": "mpqc.runtime",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'mpqc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("mpqc")
    except metadata.PackageNotFoundError:
        return "source tree"
