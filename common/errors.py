"""What went wrong after the run began; what is wrong before that is a ValueError or an OSError."""


class RunFault(Exception):
    """A fault in mid-run (disk full, a lost device): one line for the user, exit status 1."""

    status = 1


class Requeue(RunFault):
    """Stopped before its end, saved, and to be started again: exit status 75 (EX_TEMPFAIL of sysexits.h)."""

    status = 75


class Ended(KeyboardInterrupt):
    """A notice to leave where there was no step to finish; like Ctrl-C, nothing on the way may catch it."""

    status = Requeue.status
