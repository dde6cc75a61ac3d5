"""The one exception that a user's mistake raises, in every package of this project."""


class JointoptError(ValueError):
    """Something the user gave cannot be used: one line that names it, what was found, and what is allowed."""
