"""What a user can put right."""


class RequestError(ValueError):
    """A request that cannot be met. The message is one sentence that says what to change."""


class UncertifiableError(RequestError):
    """A theorem's hypothesis does not hold for this smoothed classifier and threat."""


def check_whole(group: str, **numbers: tuple[object, int]) -> None:
    """Raises RequestError unless each number of a group of options, given as name=(number, least), is a whole number of
    at least that."""
    for name, (number, least) in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise RequestError(f"{group}.{name} must be a whole number, at least {least}, got {number!r}")
