"""Models that timm and torchvision make by name: ``timm:resnet50``, ``torchvision:resnet18,num_classes=10``.

A name stands in files, so it can only choose a model and its sizes: words that would fetch or read other files
(``hf-hub:``, ``pretrained=true``, ``weights=...``) are refused, and nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from nmgraph.errors import FileError, MissingPackageError, first_line

LIBRARIES = ("timm", "torchvision")
_FETCHING = re.compile(r"pretrained|weights|checkpoint|cache|cfg")
_TRIES = 4


@dataclass(frozen=True)
class NamedModel:
    """A model that a library makes by its name.

    Attributes:
        library: ``timm`` or ``torchvision``.
        name: as the library lists it.
        options: keyword arguments: numbers, words, true or false.
    """

    library: str
    name: str
    options: dict[str, bool | int | float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = (f",{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.options.items())
        return f"{self.library}:{self.name}{''.join(options)}"

    @staticmethod
    def names(text: str) -> bool:
        """Tell whether a text has this form, if only at its start."""
        return text.partition(":")[0] in LIBRARIES and ":" in text

    @classmethod
    def parse(cls, text: str) -> NamedModel:
        """Read ``timm:NAME`` or ``torchvision:NAME``, with ``,key=value`` for options.

        Raises:
            FileError: if the name would be fetched from elsewhere, or an option has another form.
        """
        library, _, rest = text.partition(":")
        name, *options = rest.split(",")
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise FileError(
                f"{text!r} is no name of {library}'s own list, and nothing is downloaded here. Write {library}:NAME, such "
                f"as {library}:resnet50; load other models in Python, and save them with torch.save(model, ...)."
            )
        return cls(library, name, dict(_option(text, option) for option in options))

    def make(self) -> nn.Module:
        """Make the model, with weights at random.

        Raises:
            MissingPackageError: if the library is not installed.
            FileError: if it has no such model, or the model does not take the options.
        """
        library = _library(self)
        known = _known(library, self.library)
        # timm lists resnet50, and takes resnet50.a1_in1k for what it was trained on.
        if self.name not in known and (self.library != "timm" or self.name.partition(".")[0] not in known):
            near = difflib.get_close_matches(self.name, known, n=4)
            said = f"Did you mean {', '.join(near)}?" if near else f"{self.library}.list_models() has the names."
            raise FileError(f"{self.library} {library.__version__} has no model {self.name}. {said}")
        try:
            with never_online(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries, about their own defaults
                if self.library == "timm":
                    model = library.create_model(self.name, pretrained=False, **self.options)
                else:
                    model = _torchvision(library, self.name, self.options)
        except Exception as error:
            # A model's own code checks its options, and may raise anything.
            raise FileError(f"{self} could not be made: {type(error).__name__}: {first_line(error)}.") from error
        if not isinstance(model, nn.Module):
            raise FileError(f"{self} gave a {type(model).__name__}; it must give a torch.nn.Module.")
        return model

    def make_for(self, state: Mapping[str, Any], usual: nn.Module) -> tuple[NamedModel, nn.Module]:
        """Make the model that a state_dict fits, with another number of classes if that is all that differs.

        Args:
            state: the weights, by the model's own keys.
            usual: what :meth:`make` gave.

        Returns:
            The name with its number of classes, and the model; those as named if no number of classes helps.
        """
        if "num_classes" in self.options or _fits(usual, state):
            return self, usual
        for count in _class_counts(usual, state):
            other = replace(self, options={**self.options, "num_classes": count})
            with contextlib.suppress(FileError):
                model = other.make()
                if _fits(model, state):
                    return other, model
        return self, usual


def _option(text: str, option: str) -> tuple[str, bool | int | float | str]:
    key, _, value = option.partition("=")
    if not re.fullmatch(r"[a-z]\w*", key, re.ASCII) or not re.fullmatch(r"-?[\w.]+", value, re.ASCII):
        raise FileError(
            f"{text!r}: {option!r} is no option. Write KEY=VALUE with a number, a word, true or false: num_classes=10."
        )
    if _FETCHING.search(key):
        raise FileError(
            f"{text!r}: {key} would fetch or read other files. Give the weights as a file: --model {text.partition(',')[0]}."
        )
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return key, kind(value)
    return key, value


def _library(named: NamedModel) -> Any:
    try:
        return importlib.import_module(named.library)
    except Exception as error:
        # torchvision beside another torch raises RuntimeError; timm imports it.
        package = "torchvision" if "torchvision" in str(error) else named.library
        from_there = ", from where your torch came (a CPU build is not PyPI's)" if package == "torchvision" else ""
        raise MissingPackageError(
            f"{named} needs the package {named.library}, which could not be imported: {first_line(error)}. "
            f"Install {package} in a version that fits your torch{from_there}: pip install {package}."
        ) from error


def _known(library: Any, name: str) -> list[str]:
    return list(library.list_models() if name == "timm" else library.models.list_models())


def _torchvision(library: Any, name: str, options: dict[str, Any]) -> Any:
    # Detection and segmentation models would fetch weights for their backbones by default.
    parameters = inspect.signature(library.models.get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    return library.models.get_model(name, weights=None, **backbone, **options)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in state.items() if isinstance(t, Tensor)}


def _fits(model: nn.Module, state: Mapping[str, Any]) -> bool:
    return _shapes(model.state_dict()) == _shapes(state)


def _class_counts(model: nn.Module, state: Mapping[str, Any]) -> list[int]:
    """Give the numbers of classes that a state_dict may be for: the outputs it has where the model has others."""
    own, found = _shapes(model.state_dict()), _shapes(state)
    other = (found[k][0] for k in own if k in found and found[k] != own[k] and found[k] and found[k][1:] == own[k][1:])
    return list(dict.fromkeys(other))[:_TRIES]


@contextlib.contextmanager
def never_online() -> Iterator[None]:
    """Let nothing be fetched from the Hugging Face hub while a model is made, whatever its configuration names."""
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
