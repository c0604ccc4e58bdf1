"""The one exception that a person is meant to read."""


class AntherError(Exception):
    """Bad input: one line that names what is wrong and how to mend it.

    Every room raises it for what a user can mend (configuration, data, a checkpoint, a message from a
    device); applications print it without a traceback and exit with a code other than 0.
    """
