"""What a user can put right."""

import math


class RequestError(ValueError):
    """A request that cannot be met. The message is one sentence that says what to change."""


class UncertifiableError(RequestError):
    """A theorem's hypothesis does not hold for this smoothed classifier and threat."""


def check_whole(group: str, **numbers: tuple[object, int]) -> None:
    """Raises RequestError unless each number of a group of options ("" for none), given as name=(number, least), is a
    whole number of at least that, and below 2^32."""
    for name, (number, least) in numbers.items():
        option = f"{group}.{name}" if group else name
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise RequestError(f"{option} must be a whole number, at least {least}, got {number!r}")
        if number >= 2**32:
            raise RequestError(f"{option} must be below 2^32, got {number}")


def finite(name: str, value: float) -> float:
    """The value as a float.

    Raises:
        RequestError: it is not one finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise RequestError(f"{name} must be one number, got {value!r}") from failure
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise RequestError(f"{name} must be a finite number, got {value!r}")
    return number


def at_least(name: str, value: float, least: float) -> float:
    """The value as a float.

    Raises:
        RequestError: it is not one finite number from `least` on.
    """
    number = finite(name, value)
    if number < least:
        raise RequestError(f"{name} must be at least {least:g}, got {value!r}")
    return number


def positive(name: str, value: float) -> float:
    """The value as a float.

    Raises:
        RequestError: it is not one positive and finite number.
    """
    number = finite(name, value)
    if not number > 0:
        raise RequestError(f"{name} must be positive and finite, got {value!r}")
    return number
