"""Errors that several packages raise."""


class Diverged(RuntimeError):
    """Raised if a loss, a gradient or a weight is not finite. The last checkpoint is finite and stays."""
