"""What is raised where a model of the matrix has no weights here; a user's own checkpoint raises `described.Mistaken`."""


class Unavailable(Exception):
    """The weights cannot be had here. The message says what is needed, what is here, and the command that brings it.

    It names no temporary path and no time, so that equal causes give equal messages in a report.
    """
