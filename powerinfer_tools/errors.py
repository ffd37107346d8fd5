"""The one error that users see."""


class PowerinferError(Exception):
    """What was expected and what was found, in one line; `kind` is a stable word for programs.

    Kinds: usage, input, io, truncated, malformed, mismatch, unsupported, infeasible, exists, internal.
    Only the command line prints it; `kind == "usage"` and bad input exit with 2, the rest with 1.
    """

    def __init__(self, message: str, kind: str = "input") -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def exit_code(self) -> int:
        return 2 if self.kind in ("usage", "exists") else 1


class Infeasible(PowerinferError):
    """A budget of memory that cannot do; least: bytes that would."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message, "infeasible")
        self.least = least
