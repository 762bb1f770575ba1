"""Errors of data: a row that can't be used, and a preparation that stopped."""

from eagle_train.errors import BAD_DATA, TrainError


class RowError(TrainError, ValueError):
    """A row that can't be used. reason: a short fixed name to count by. detail: what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return RowError, (self.reason, self.detail)


class PrepareError(TrainError, ValueError):
    """Preparation stopped: too many bad rows, sources that can't be read, or facts that don't exist yet."""

    exit_code = BAD_DATA
