"""Hugging Face model directories: ``config.json`` and ``*.safetensors``.

The configuration names a class, and only classes of the transformers package itself are built: code that lies in the
directory, or that ``auto_map`` names, is never run. What else of a configuration leads out of the directory, or to
code - adapters, quantizers, kernels from the hub, other file names - is refused before transformers sees it. Nothing
is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from nmgraph.checkpoint.foreign_files import foreign_directory, is_distributed
from nmgraph.checkpoint.named_models import never_online
from nmgraph.checkpoint.tensors import read_manifest
from nmgraph.errors import FileError, MissingPackageError, UntrustedError, first_line
from nmgraph.layers.masked import PREFIX
from nmgraph.passes.manifest import Manifest

MANIFEST_FILE = "nmgraph.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LISTED = 8
_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # of a backbone that timm makes


def open_hugging_face(directory: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Read a model that ``save_pretrained`` wrote, in the dtype it says, in evaluation mode as transformers gives it.

    Returns:
        The model, and what a person should know: tensors of the files that the model does not have.

    Raises:
        FileError: if the directory is no such model, is damaged, or its files do not fit the model.
        UntrustedError: if its class is not one of transformers.
        MissingPackageError: if transformers is not installed.
    """
    config = _config(directory)
    cls = _model_class(directory, config)
    _require_plain_weights(directory)
    try:
        with never_online(), quiet():
            model, found = cls.from_pretrained(
                directory, config=cls.config_class.from_pretrained(directory, local_files_only=True),
                local_files_only=True, use_safetensors=True, trust_remote_code=False, weights_only=True, dtype="auto",
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:
        # A configuration is values for foreign code, which may raise anything on them.
        raise FileError(
            f"{directory} can't be read as {cls.__name__}: {type(error).__name__}: {first_line(error)}. "
            f"It has to open with transformers.{cls.__name__}.from_pretrained({str(directory)!r}) first."
        ) from error
    return model, _require_fitting(directory, cls, found)


def find_hugging_face_manifest(directory: Path) -> Manifest | None:
    """Read what an export wrote about the conversion beside the model, if it did.

    Raises:
        FileError: if it is damaged.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        return read_manifest(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is damaged: {first_line(error)}. Export the model again.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own reports and progress bars away: what matters of them is said by us."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(directory: Path) -> dict[str, Any]:
    if (directory / "adapter_config.json").exists():
        raise FileError(
            f"{directory} holds an adapter (PEFT). Merge it into its model, and save that: "
            "model.merge_and_unload().save_pretrained(...)."
        )
    path = directory / "config.json"
    if not path.is_file():
        raise FileError(f"{directory} {foreign_directory(directory)}")
    return _json_object(path)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} can't be read as JSON: {first_line(error)}. Copy it again.") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}, not an object. Copy it again.")
    return content


def _model_class(directory: Path, config: dict[str, Any]) -> Any:
    """Find the class in transformers; a name is looked up there, and nothing else is imported."""
    _require_nothing_outside(directory, config)
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FileError(
            f"{directory / 'config.json'} does not name one model class (architectures: {names!r:.80}). Load the model in "
            "Python and write it with save_pretrained."
        )
    name = names[0]
    try:
        transformers: Any = importlib.import_module("transformers")
    except Exception as error:
        raise MissingPackageError(
            f"{directory} needs the package transformers, which could not be imported: {first_line(error)}. "
            "Install it: pip install transformers."
        ) from error
    with never_online(), quiet():
        try:
            found = getattr(transformers, name, None)
        except Exception as error:
            raise MissingPackageError(f"{directory}: transformers can't import {name}: {first_line(error)}.") from error
    base: Any = transformers.PreTrainedModel
    if not (
        isinstance(found, type) and issubclass(found, base) and found.__module__.startswith("transformers.models.")
    ):
        remote = (
            f" ({', '.join(map(str, config['auto_map'].values()))})" if isinstance(config.get("auto_map"), dict) else ""
        )
        raise UntrustedError(
            f"{directory} needs the class {name}{remote}, which transformers {transformers.__version__} does not have. Code "
            "that comes with a model is never run. If you know it, load the model in Python, and nmgraph.convert it there."
        )
    if found.from_pretrained.__func__ is not base.from_pretrained.__func__:  # type: ignore[attr-defined]
        raise FileError(
            f"{directory}: {name} fetches its weights itself. Load it in Python, and nmgraph.convert it there."
        )
    return found


def _require_nothing_outside(directory: Path, config: dict[str, Any]) -> None:
    """Refuse what would lead transformers to other files, to a quantizer, or to code from the hub."""
    said = {
        "quantization_config": "its weights are quantized. Convert the original, in float32, float16 or bfloat16",
        "transformers_weights": "it names other files for its weights. Write it again with save_pretrained",
        "checkpoint_path": "it names other files for its weights. Write it again with save_pretrained",
        "fusion_config": "it asks for fused layers. Write it again without",
    }
    for key, value in _entries(config):
        if key in said and value is not None:
            raise FileError(f"{directory / 'config.json'}: {key}: {said[key]}.")
        if str(value).startswith(_ELSEWHERE):
            raise FileError(f"{directory / 'config.json'}: {key}: {value!s:.60} would be fetched from elsewhere.")
        if key.strip("_").endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise UntrustedError(
                f"{directory / 'config.json'}: {key} names code on the hub ({value!s:.60}), which is never run. Take it out."
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _require_plain_weights(directory: Path) -> None:
    """Hold the files to what is read: whole safetensors, in the directory, and nothing that counts more.

    Raises:
        FileError: naming the file.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    if is_distributed(names):
        raise FileError(f"{directory} {foreign_directory(directory)}")
    shards = [_WEIGHTS] if _WEIGHTS in names else _shards(directory) if _INDEX in names else []
    if not shards:
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise FileError(
                f"{directory} holds its weights as a pickle only ({pickles[0]}), which can hold code. If you trust it, load "
                "it with transformers, and write it again with save_pretrained, as safetensors."
            )
        raise FileError(f"{directory} has a config.json, but no {_WEIGHTS}. Write it again with save_pretrained.")
    stored: set[str] = set()
    for shard in shards:
        try:
            with safe_open(directory / shard, framework="pt") as opened:
                stored.update(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise FileError(
                f"{directory / shard} can't be read as safetensors: {first_line(error)}. Copy it again."
            ) from error
    if any(name.rpartition(".")[2].startswith(PREFIX) for name in stored):
        raise FileError(
            f"{directory} holds a converted model in training. Finalize it first: "
            "nmgraph.finalize(model).save_pretrained(...); to train on, load these weights into the converted model."
        )


def _shards(directory: Path) -> list[str]:
    """Give the files that the index names, which lie in the directory."""
    index = _json_object(directory / _INDEX)
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise FileError(f"{directory / _INDEX} has no weight_map, which says where the weights are. Copy it again.")
    shards = sorted(set(weights.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise FileError(f"{directory / _INDEX} names {shard!r}, which is no safetensors file in the directory.")
        if not (directory / shard).is_file():
            raise FileError(f"{directory / shard} does not exist, which {_INDEX} names. Copy the directory again.")
    return shards


def _require_fitting(directory: Path, cls: type, found: dict[str, Any]) -> tuple[str, ...]:
    """Refuse a model of which a part would be random, and say what of the files it leaves out."""
    wrong = [f"{key} is missing in the files" for key in sorted(found["missing_keys"])]
    for key, *shapes in sorted(found["mismatched_keys"]):
        stored, own = ("x".join(map(str, shape)) for shape in shapes)
        wrong.append(f"{key} is {stored} in the files, {own} in the model")
    wrong += [first_line(ValueError(text)) for text in found["error_msgs"]]
    if wrong:
        raise FileError(
            f"{directory} does not hold all of {cls.__name__}, which its config.json names; the rest would be random:\n  "
            + _listed(wrong, "\n  ")
            + "\nTrain or load that part in Python, and write the model with save_pretrained."
        )
    left = sorted(found["unexpected_keys"])
    if not left:
        return ()
    return (
        f"{cls.__name__} has no place for {len(left)} tensors of the files, which are left out: {_listed(left, ', ')}.",
    )


def _listed(items: Sequence[str], between: str) -> str:
    more = f"{between}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return between.join(items[:_LISTED]) + more
