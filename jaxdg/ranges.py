"""Ranges of settings, written at the fields: `flip: Share = 0.5`.

`jaxdg.config` checks a whole run by them with pydantic. Here they are annotations that cost
nothing, so that every room can describe its own settings.
"""

from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Interval

Count: TypeAlias = Annotated[int, Ge(1)]
CountOrZero: TypeAlias = Annotated[int, Ge(0)]
Positive: TypeAlias = Annotated[float, Gt(0)]
PositiveOrZero: TypeAlias = Annotated[float, Ge(0)]
Share: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
ShareBelowOne: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
Size: TypeAlias = tuple[Count, Count]  # height and width in pixels
