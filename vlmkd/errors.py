"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """A mistake in the user's input, told in one line that names the thing and the mend.

    Entry points (`vlmkd.run.main`, every script) print the message alone and exit with code 2; any other
    exception is a defect of ours and keeps its traceback.
    """
