"""The one exception type for mistakes that the user can mend."""


class UserError(ValueError):
    """A user mistake: one line that says what is wrong and how to mend it. The command prints it and exits with code 2."""
