"""What can go wrong, as the one line that a user reads."""


class Failure(Exception):
    """Something could not be done: the text names what failed, where, and what to do. Exit code 1."""

    exit_code = 1


class Misuse(Failure):
    """Wrong usage or configuration: the text names the remedy. Exit code 2."""

    exit_code = 2
