"""The two kinds of error that are about the user's input and not about our code."""


class UserError(ValueError):
    """A setting, path or file that cannot work: names the thing, what was given and the way out.

    A job that meets one prints the message without a traceback and ends with status 2.
    """


class BadRow(ValueError):
    """One study that cannot be used, with the reason; the run records it and goes on."""


MAX_CAUSES = 8
"""Layers of errors that are looked through for their cause."""


def with_prefix(value: str, message: str) -> str:
    """``message``, with ``value`` before it where it does not begin with it by itself."""
    return message if message.startswith(value) else f"{value}: {message}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where Ray puts the cause; the error's own form where it has none."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def cause(error: BaseException) -> str:
    """What to tell of an error that Ray may have wrapped: the message of the ``UserError`` in it, else its last line."""
    inner: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if isinstance(inner, UserError) and not hasattr(inner, "cause"):  # Ray's wrapping is of the same class
            return first_line(inner)  # Ray Data adds hints of its own to it
        if inner is None:
            break
        inner = getattr(inner, "cause", None) or inner.__cause__
    return last_line(error)
