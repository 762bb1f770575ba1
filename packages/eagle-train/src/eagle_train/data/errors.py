"""The error of a row that can't be used."""

from eagle_train.errors import TrainError


class RowError(TrainError, ValueError):
    """A row that can't be used. reason: a short fixed name to count by. detail: what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return RowError, (self.reason, self.detail)
