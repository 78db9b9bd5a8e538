"""Errors that more than one part raises."""


class Diverged(RuntimeError):
    """A loss, a gradient or a weight is not finite. What was saved before is good, and is not replaced."""
