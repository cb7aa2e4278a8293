"""Records of the request path: dataclasses that only the type checker keeps from changing."""

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[_T]) -> type[_T]:
    """``@dataclass(frozen=True, slots=True)`` for mypy; not frozen at run time.

    Making a frozen one takes several times as long (each field goes through
    ``object.__setattr__``), and a decision makes about ten with eighty fields in all.
    """
    return dataclass(slots=True)(cls)
