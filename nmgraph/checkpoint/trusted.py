"""Load pickled modules without running what they name.

A pickle is code. Loading goes through ``torch.load(weights_only=True)``, which builds only what it is allowed to:
here ``nn.Module`` and ``Enum`` classes of trusted packages, ``functools.partial``, and torch's activation
functions. Names outside the trusted packages are never imported, as importing is running.
"""

from __future__ import annotations

import enum
import importlib
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from nmgraph.checkpoint.exported_program import TRUST, is_exported
from nmgraph.checkpoint.foreign_files import foreign_file, foreign_zip
from nmgraph.checkpoint.pickle_calls import find_calls
from nmgraph.errors import FileError, MissingPackageError, NMGraphError, UntrustedError, first_line

PACKAGES = ("torch.nn", "torchvision.models", "torchvision.ops", "timm", "transformers")
"""Packages whose module classes are trusted, when they are installed."""

_FUNCTIONS = frozenset(
    f"{place}.{name}"
    for place in ("torch.nn.functional", "torch._C._nn", "torch")
    for name in ("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "mish", "tanh", "sigmoid",
                 "softmax", "log_softmax", "softplus", "hardtanh", "hardswish", "hardsigmoid")
) | {"functools.partial"}  # fmt: skip
"""What a module may hold besides modules: calling these does nothing but compute."""

_CONFIGS = frozenset(
    f"transformers.{name}"
    for name in ("configuration_utils.PretrainedConfig", "configuration_utils.PreTrainedConfig",
                 "generation.configuration_utils.GenerationConfig")
)  # fmt: skip
"""Base classes of the configurations that Hugging Face models hold."""

# What reading a damaged archive raises; RuntimeError is that a member is encrypted.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, NotImplementedError, RuntimeError,
)  # fmt: skip
_IS_DIRECTORY = 0x10  # of MS-DOS, in the attributes of a zip archive's member
_SMALL = 1 << 20  # bytes that a tensor may have in a file of any size


def load_trusted(file: str | Path | IO[bytes], name: str, trust: Sequence[str] = ()) -> Any:
    """Load a ``torch.save`` file, building only trusted classes.

    Args:
        file: path or open binary file.
        name: what to call it in messages.
        trust: packages to trust besides :data:`PACKAGES`; they are imported.

    Returns:
        What was saved, on the CPU.

    Raises:
        UntrustedError: listing what the file names outside the trusted packages.
        MissingPackageError: if a trusted package cannot be imported.
        FileError: if the file is missing, truncated or no such file.
    """
    if isinstance(file, (str, Path)):
        require_model_file(Path(file))
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        allowed = _resolve(names, name, trust)
        _require_plain_calls(file, name, trust)
        if not isinstance(file, (str, Path)):
            file.seek(0)
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True)
        _require_whole_modules(content)
        if isinstance(file, (str, Path)):
            _require_held(content, Path(file).stat().st_size)
        return content
    except NMGraphError:
        raise
    except Exception as error:
        # A damaged pickle can make the unpickler, and torch's rebuilding of tensors, raise anything.
        raise FileError(
            f"{name} can't be read: {first_line(error)}. It may be truncated, or no file of torch.save."
        ) from error


def require_model_file(path: Path) -> None:
    """Refuse what cannot be a model file, with the reason a person would look for.

    Raises:
        FileError: if it is missing, a directory, empty, a TorchScript archive or not one of torch's files.
    """
    if not path.exists():
        raise FileError(f"{path} does not exist.")
    if not path.is_file():
        raise FileError(f"{path} is not a file.")
    try:
        with path.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise FileError(f"{path} can't be read: {error.strerror}.") from error
    if not start:
        raise FileError(f"{path} is empty.")
    foreign = foreign_file(path, start)
    if foreign:
        raise FileError(f"{path} {foreign}")
    if start[:4] == b"PK\x03\x04":
        _require_whole_zip(path)
    elif start[0] == 0x80 and start[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        raise FileError(
            f"{path} is a plain pickle, or in an older format of torch.save. If you trust it, load it in Python and save "
            "it again with torch.save(model, ...)."
        )
    else:
        raise FileError(
            f"{path} is not a model file: save one with torch.save(model, ...) or nmgraph.save(model, ...)."
        )


def _require_whole_modules(content: Any) -> None:
    """Look at all that a module is made of: a pickle can build one that lacks its parts, to fail anywhere later."""
    if isinstance(content, nn.Module):
        content.state_dict()
        for module in content.modules():
            if not isinstance(module.training, bool):
                raise ValueError(f"a {type(module).__name__} is neither in training nor in evaluation")


def _require_held(content: Any, size: int) -> None:
    """Refuse a tensor larger than its file: repeated along an axis, one number can have any shape.

    Raises:
        ValueError: saying which shape.
    """
    for tensor in _tensors_of(content):
        if tensor.numel() * tensor.element_size() > max(size, _SMALL):
            raise ValueError(f"a tensor of the shape {list(tensor.shape)} is more than the whole file holds")


def _tensors_of(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, nn.Module):
        yield from content.parameters()
        yield from content.buffers()
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors_of(value)


def members_of(path: Path) -> list[str]:
    """Name the members of a zip archive as torch writes it, without their first folder; none of what is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [_member(name) for name in archive.namelist()]
    except _ZIP_ERRORS:
        return []


def _member(name: str) -> str:
    return name.partition("/")[2] or name


def _require_whole_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            _require_torch_save(path, [_member(name) for name in archive.namelist()])
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > path.stat().st_size:
                raise ValueError("its members claim to be larger than the file")  # torch.save compresses none
            directory = next((info.filename for info in infos if info.external_attr & _IS_DIRECTORY), None)
            if directory is not None:  # torch.load would read nothing, and give memory as it finds it
                raise ValueError(f"{directory} claims to be a directory")
            damaged = archive.testzip()
    except _ZIP_ERRORS as error:
        raise FileError(f"{path} is truncated or damaged: {first_line(error)}. Save or copy it again.") from error
    if damaged is not None:
        raise FileError(f"{path} is damaged: the checksum of {damaged} does not hold. Save or copy it again.")


def _require_torch_save(path: Path, members: Sequence[str]) -> None:
    if "constants.pkl" in members:
        raise FileError(
            f"{path} is TorchScript, whose layers can't be trained sparse. Save the Python model with torch.save(model, ...)."
        )
    if is_exported(members):
        raise FileError(
            f"{path} is an exported program (torch.export.save), which holds no module as it was trained. Where a dense "
            f"model is asked for, it is read with --trust {TRUST}."
        )
    if "data.pkl" not in members:
        foreign = foreign_zip(members)
        if foreign:
            raise FileError(f"{path} {foreign}")
        raise FileError(f"{path} is a zip archive, but not one of torch.save.")


def _resolve(names: Sequence[str], file: str, trust: Sequence[str]) -> list[Any]:
    """Import the named classes of trusted packages; anything else is refused before a single import."""
    packages = (*PACKAGES, *trust)
    foreign = [name for name in names if name not in _FUNCTIONS and not _inside(name, packages)]
    if foreign:
        raise UntrustedError(
            f"{file} names code outside the trusted packages, so nothing was loaded or run:\n  "
            + "\n  ".join(sorted(foreign))
            + f"\n{_remedy({name.partition('.')[0] for name in foreign})}"
        )
    return [(_import(name, file, trust), name) for name in names]


def _require_plain_calls(file: str | Path | IO[bytes], name: str, trust: Sequence[str]) -> None:
    """Refuse calls of classes: modules are built without, and enumerations only look a value up."""
    pickled = _pickle_in(file)
    calls = [call for call in find_calls(pickled) if call not in _FUNCTIONS and not _inside(call, trust)]
    calls = [call for call in calls if not _is_enum(call, name, trust)]
    if calls:
        raise UntrustedError(
            f"{name} calls {', '.join(sorted(calls)[:4])} as no saved model does, so nothing was loaded or run. Don't load it "
            "unless you made it; save the model's state_dict() instead."
        )


def _pickle_in(file: str | Path | IO[bytes]) -> bytes:
    if isinstance(file, (str, Path)):
        with Path(file).open("rb") as opened:
            return _pickle_in(opened)
    file.seek(0)
    found: bytes = torch._C.PyTorchFileReader(file).get_record("data.pkl")  # as torch.load finds it
    return found


def _is_enum(name: str, file: str, trust: Sequence[str]) -> bool:
    value = _import(name, file, trust) if _inside(name, PACKAGES) else None
    return isinstance(value, type) and issubclass(value, enum.Enum)


def _remedy(roots: set[str]) -> str:
    if "nmgraph" in roots:
        return "It seems to be a converted model, pickled whole: write it with nmgraph.save(model, path) instead."
    if "__main__" in roots:
        return (
            "Classes of __main__ belong to the script that saved them, and can't be found again. Move them to a module, "
            "or save model.state_dict() and say what makes the model: --model package.module:function."
        )
    if roots & (sys.stdlib_module_names | {"torch"}):
        return "That can run any code. Don't load it unless you made it; save the model's state_dict() instead."
    flags = " ".join(f"--trust {root}" for root in sorted(roots))
    return f"If you know where it comes from, import and run that code with {flags} (in Python: trust={sorted(roots)})."


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name.startswith(f"{package}.") for package in packages)


def _import(name: str, file: str, trust: Sequence[str]) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        value = getattr(_import_module(module, trust), attribute)
    except AttributeError as error:
        raise FileError(
            f"{file} needs {name}, which the installed {name.partition('.')[0]} does not have. Install the version it was saved with."
        ) from error
    if name in _FUNCTIONS or _inside(name, trust) or (isinstance(value, type) and _only_holds_values(value)):
        return value
    raise UntrustedError(
        f"{file} names {name}, which is no layer class, so nothing was loaded or run. If you know where the file comes "
        f"from, allow it with --trust {name.partition('.')[0]}."
    )


def _only_holds_values(cls: type) -> bool:
    bases = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
    return issubclass(cls, (nn.Module, enum.Enum)) or not bases.isdisjoint(_CONFIGS)


def _import_module(module: str, trust: Sequence[str]) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        # Whatever an import raises (torchvision beside another torch: RuntimeError), the file is not to blame.
        remedy = "Install it, in a version that fits your torch."
        if _inside(f"{module}.", trust):
            remedy = "Run from the folder that holds it, set PYTHONPATH, or install it."
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"the model needs the package {package}, which could not be imported: {first_line(error)}. {remedy}"
        ) from error
