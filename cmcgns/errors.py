"""Errors caused by the user's input rather than by our code, and the text of errors."""


class UserError(ValueError):
    """A setting, path or file that cannot work: names the thing, the value given and the fix.

    A job prints the message without a traceback and exits with status 2.
    """


class BadRow(ValueError):
    """A study that cannot be used, with the reason; the run records it and continues."""


class TrainingStoppedError(RuntimeError):
    """Training cannot continue, and a restart from the last checkpoint would not help."""


MAX_CAUSES = 8
"""Most levels of nested errors to search for the cause."""


def with_prefix(value: str, message: str) -> str:
    """``message`` with ``value`` in front, unless it already starts with it."""
    return message if message.startswith(value) else f"{value}: {message}"


def first_line(error: BaseException) -> str:
    """First line of the error's message; its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """Last line of the error's message, where Ray puts the cause; its repr if the message is empty."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def cause(error: BaseException) -> str:
    """Message of an error that Ray may have wrapped: that of the ``UserError`` inside, else its last line."""
    inner: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if isinstance(inner, UserError) and not hasattr(
            inner, "cause"
        ):  # Ray's wrapper is a UserError too, with a cause
            return first_line(inner)  # Ray Data appends hints
        if inner is None:
            break
        inner = getattr(inner, "cause", None) or inner.__cause__
    return last_line(error)
