"""The two kinds of error that are about the user's input and not about our code."""


class UserError(ValueError):
    """A setting, path or file that cannot work: names the thing, what was given and the way out.

    A job that meets one prints the message without a traceback and ends with status 2.
    """


class BadRow(ValueError):
    """One study that cannot be used, with the reason; the run records it and goes on."""


def starting_with(value: str, message: str) -> str:
    """``message``, with ``value`` before it where it does not begin with it by itself."""
    return message if message.startswith(value) else f"{value}: {message}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where Ray puts the cause; the error's own form where it has none."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]
