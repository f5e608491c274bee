"""The one exception that means "the input is wrong, not the program"."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the file, key or flag and what was expected.

    Commands print it as one line and exit with status 2, without a traceback.
    """
