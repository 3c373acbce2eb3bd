"""What went wrong after the run began; what is wrong before that is a ValueError or an OSError."""


class RunFault(Exception):
    """A fault in mid-run (disk full, a lost device): one line for the user, exit status 1."""
