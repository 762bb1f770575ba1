"""The base of the errors that this package raises on purpose; their messages are written for users."""


class ModelError(ValueError):
    """Input that the model, its prompt or its visual pipeline can't use. `exit_code`: of a command that ends with it."""

    exit_code = 1
