"""Calls of this package's own functions: arguments that do not fit are named, with what was meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tilelink.errors import did_you_mean

P = ParamSpec("P")
T = TypeVar("T")


def checked(name: str, example: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """BadCall, not Python's TypeError, where arguments of a call do not fit the function's parameters.

    ``name`` is what users call it, ``example`` a call that fits.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        taken = [parameter for parameter in signature.parameters if parameter != "self"]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                wrong = str(error)
            else:
                return function(*args, **kwargs)
            from tilelink.frontend.errors import BadCall

            meant = ""
            unknown = [given for given in kwargs if given not in taken]
            if unknown:
                wrong = f"there is no argument `{unknown[0]}`"
                meant = did_you_mean(unknown[0], taken)
            it_takes = f"it takes {', '.join(f'`{parameter}`' for parameter in taken)}"
            advice = " ".join(filter(None, (meant, f"{it_takes}: {example}")))
            raise BadCall(what=f"`{name}`: {wrong}", advice=advice)

        return call

    return decorate
