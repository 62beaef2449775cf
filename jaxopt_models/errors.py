"""The one exception that means: the input is wrong, and here is what to do about it."""


class UserError(ValueError):
    """A mistake in what the user handed over.

    The message is one sentence that names the file, key or tensor and the remedy. The command line
    prints it
    without a traceback and exits with code 2; everything else that is raised is a defect of this
    library.
    """
