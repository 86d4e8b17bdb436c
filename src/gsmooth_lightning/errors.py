"""What a user can put right."""


class RequestError(ValueError):
    """A request that cannot be met. The message is one sentence that says what to change."""


class UncertifiableError(RequestError):
    """A theorem's hypothesis does not hold for this smoothed classifier and threat."""
