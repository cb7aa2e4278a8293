"""Names of deciders as they are typed on the command line."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pointsman_core.resources import Algorithm


def parse_deciders(text: str, *, none_allowed: bool = False) -> "tuple[Algorithm, ...]":
    """Algorithms by name, case ignored, in the order given and without repeats.

    ``all`` stands for all of them and, where that is allowed, ``none`` for nothing. Raises
    typer.BadParameter for anything else.
    """
    from pointsman_core.resources import Algorithm

    known = {algorithm.lower(): algorithm for algorithm in Algorithm}
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names == ["none"] and none_allowed:
        return ()
    if names == ["all"]:
        return tuple(known.values())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = ", ".join(unknown) or "nothing"
        choices = ", ".join([*Algorithm, "or all"] + ["or none"] * none_allowed)
        raise typer.BadParameter(f"{wrong}: choose from {choices}", param_hint="--deciders")
    return tuple(dict.fromkeys(known[name] for name in names))
