"""The one exception for mistakes that a user can mend."""


class InputError(ValueError):
    """A user's mistake: a file, row, field or option that cannot be used.

    The message is one line that names the file, the row or field, what was found and what was expected.
    The command line prints it without a traceback and exits with status 2.
    """
