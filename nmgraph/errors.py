"""Say what went wrong, with which layer or file, and what to do about it.

```text
NMGraphError                 everything this package raises on purpose
├── PatternError             a pattern that cannot exist, or that fits nothing
├── MethodError              an unknown method or option, a value or pattern it does not support
├── ConversionError          the model cannot be converted as asked
├── TrainingError            a model and an optimizer that do not belong together
├── UnfinishedError          masks that are not N:M yet
├── FileError                a file that cannot be read or written
│   └── UntrustedError       a file that names code outside the trusted packages
├── ExportError              a model that cannot be exported as asked
└── MissingPackageError      a package that could not be imported
```
"""


class NMGraphError(Exception):
    """Base of all errors raised on purpose; its message names the culprit and the remedy."""


class PatternError(NMGraphError, ValueError):
    """A pattern that cannot exist, or that fits no layer of the model."""


class MethodError(NMGraphError, ValueError):
    """An unknown method or option, or a value or pattern that the method does not support."""


class ConversionError(NMGraphError):
    """The model cannot be converted as asked; it has been left as it was."""


class TrainingError(NMGraphError):
    """A model and an optimizer that do not belong together."""


class UnfinishedError(NMGraphError):
    """Some masks are not N:M yet: the method has not come to its end."""


class FileError(NMGraphError):
    """A file that cannot be read or written; nothing that existed before has been changed."""


class UntrustedError(FileError):
    """A file names code outside the trusted packages; none of it was imported or run."""


class ExportError(NMGraphError):
    """The model cannot be exported as asked."""


class MissingPackageError(NMGraphError, ImportError):
    """A package that is needed could not be imported."""


def first_line(error: BaseException) -> str:
    """Give the first line of what a foreign error says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
