"""Every error that penjing raises on purpose.

PenjingError
├── InputError          an argument that makes no sense where it stands (path, name, number)
├── CaptureError        a network that cannot be captured
├── DataError           samples that cannot be read or do not fit the network
├── RecipeError         a Step or Recipe with an unknown field or an impossible value
├── EditError           an Edit that this network cannot take
├── TargetError         an unknown runtime or an impossible option of one
├── MissingExtraError   an optional package is not installed
├── ExportError         a network that a runtime's format cannot hold
│   └── ParityError     exported, but the runtime's outputs depart from the network's own
├── PackageError        a .penjing file that is damaged, hostile or too new
│   ├── SignatureError  a signature that is malformed, by another key, of something else, or too old
│   └── SealError       a sealed package that these keys do not open, or that was changed
├── KeyFileError        a file of keys that cannot be read, or not with this passphrase
├── TransferError       a package that the servers did not give whole
├── BudgetError         constraints that cannot be read
└── OutputError         a result that could not be written whole

Every one carries a message of one sentence, and where there is a remedy a `hint`.
"""


class PenjingError(Exception):
    """Base of all errors that bad input can cause.

    `message` is one sentence; `hint`, if not None, says what to do about it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class InputError(PenjingError):
    """An argument that makes no sense where it stands."""


class CaptureError(PenjingError):
    """A network that cannot be captured."""


class DataError(PenjingError):
    """Samples that cannot be read or do not fit the network."""


class RecipeError(PenjingError):
    """A Step or Recipe with an unknown field or an impossible value."""


class EditError(PenjingError):
    """An Edit that this network cannot take."""


class TargetError(PenjingError):
    """An unknown runtime or an impossible option of one."""


class MissingExtraError(PenjingError):
    """An optional package is not installed."""


class ExportError(PenjingError):
    """A network that a runtime's format cannot hold."""


class ParityError(ExportError):
    """Exported, but the runtime's outputs depart from the network's own."""


class PackageError(PenjingError):
    """A .penjing file that is damaged, hostile or too new."""


class SignatureError(PackageError):
    """A signature that is malformed, by another key, of something else, or too old."""


class SealError(PackageError):
    """A sealed package that these keys do not open, or that was changed."""


class KeyFileError(PenjingError):
    """A file of keys that cannot be read, or not with this passphrase."""


class TransferError(PenjingError):
    """A package that the servers did not give whole."""


class BudgetError(PenjingError):
    """Constraints that cannot be read."""


class OutputError(PenjingError):
    """A result that could not be written whole."""
