"""What stops a demo with one line for people instead of a traceback."""


class DemoError(RuntimeError):
    """The demo cannot start or go on; the message says why and what to do."""
