"""A configuration from YAML with ``--key value`` over it: every key known, every value checked.

jsonargparse checks the values, and makes the dataclasses.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from varlen_sft.errors import InputError
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_keys import (
    GROUPS,
    KINDS,
    STAGE_KEYS,
    as_list,
    convert,
    is_list,
    resolve,
    unknown,
)

__all__ = ["parse_config", "read_config"]


def read_config(file: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A YAML file, and ``--key value`` or ``--key=value`` over it.

    Args:
        file: None: the command line says all.
        overrides: keys by path, by their last part, or by an alias; - and _ are one.

    Raises:
        InputError: the file cannot be read, an unknown key (with the nearest), a key that is given
            twice, a value of another type or out of its range.
    """
    text = ""
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", file=file) from None
    return parse_config(text, overrides, file)


def parse_config(text: str, overrides: Sequence[str] = (), file: Path | None = None) -> TrainConfig:
    """As ``read_config``, of YAML that was read already; ``file`` is what errors name."""
    try:
        values = _collected(_in_document(_yaml(text)))
    except InputError as error:
        raise InputError(error.reason, file=file) from None
    over = _collected(_in_arguments(list(overrides)))
    try:
        return _build({**values, **over})
    except InputError as error:
        named = error.reason.split(" ")[0].rstrip(":")
        at_fault = None if named in over else file
        raise InputError(error.reason, file=at_fault) from None


def _yaml(text: str) -> Mapping[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for at, key in enumerate(keys) if key in keys[:at]]
            if twice:
                line = node.start_mark.line + 1
                raise InputError(f"the mapping in line {line} has {twice[0]} twice")
            return super().construct_mapping(node, deep)

    try:
        document = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"is no YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"must be a mapping of keys to values, is a {type(document).__name__}")
    return document


def _in_document(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key as written, path, value) of everything in a document."""
    for key, value in document.items():
        if key not in GROUPS:
            yield str(key), resolve(str(key)), value
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                yield f"{key}.{name}", resolve(str(name), key), inner
        elif value is not None:
            raise InputError(f"{key} must be a mapping of keys to values, is {value!r}")


def _in_arguments(arguments: list[str]) -> Iterator[tuple[str, str, Any]]:
    while arguments:
        flag = arguments.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise InputError(f"expected --key value after the configuration file, got {flag!r}")
        key, equals, value = flag[2:].partition("=")
        key = key.replace("-", "_")
        path = resolve(key)
        if not equals:
            switch = KINDS[path] is bool and (not arguments or arguments[0].startswith("--"))
            if not switch and not arguments:
                raise InputError(f"--{key} needs a value")
            value = "true" if switch else arguments.pop(0)
        yield key, path, _of_text(path, value)


def _of_text(path: str, text: str) -> Any:
    """What a value on the command line says: text where text is wanted, else YAML."""
    kinds = (KINDS[path], *get_args(KINDS[path]))
    a_list = is_list(KINDS[path]) and text.startswith("[")
    if not a_list and any(kind in (str, Path) or kind == tuple[str, ...] for kind in kinds):
        return None if text == "null" and type(None) in kinds else text
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{path}: is no YAML: {text!r}") from None


def _collected(found: Iterator[tuple[str, str, Any]]) -> dict[str, Any]:
    """Values by path, each given once; ``hf_dataset_split`` is put behind its data set."""
    values: dict[str, Any] = {}
    splits: list[Any] = []
    for key, path, value in found:
        if key.rpartition(".")[2] == "hf_dataset_split":
            splits = as_list(value)
        elif path in values:
            raise InputError(f"{path} is given twice, the second time as {key}")
        elif path == "stages":
            values[path] = [_stage(stage) for stage in as_list(value)]
        else:
            values[path] = convert(key, path, value)
    if splits:
        values["data.train"] = _with_splits(values.get("data.train", []), splits)
    return values


def _with_splits(sources: list[str], splits: list[Any]) -> list[str]:
    if not sources or any(not name.startswith("hub:") for name in sources):
        raise InputError("hf_dataset_split needs hf_dataset; other sources say @SPLIT themselves")
    if len(splits) not in (1, len(sources)):
        raise InputError(f"hf_dataset_split must have 1 or {len(sources)} entries, has {splits}")
    splits = splits * (len(sources) // len(splits))
    return [f"{name}@{split}" for name, split in zip(sources, splits, strict=True)]


def _stage(stage: Any) -> dict[str, Any]:
    """One of ``stages``, whose keys are its own and the names of others for its data."""
    if not isinstance(stage, Mapping):
        raise InputError(f"stages must be a list of mappings, one is {stage!r}")
    if odd := [k for k in stage if k not in (*STAGE_KEYS, "hf_dataset", "hf_dataset_split")]:
        raise unknown(f"stages.{odd[0]}", [f"stages.{key}" for key in STAGE_KEYS])
    own = {key: value for key, value in stage.items() if not key.startswith("hf_")}
    theirs = [(k, "data.train", v) for k, v in stage.items() if k == "train" or k not in own]
    return own | {"train": _collected(iter(theirs)).get("data.train", [])}


def _build(values: Mapping[str, Any]) -> TrainConfig:
    from jsonargparse import ArgumentParser

    nested: dict[str, Any] = {}
    for path, value in values.items():
        group, _, name = path.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        return TrainConfig(**vars(parser.instantiate(parser.parse_object(nested))))
    except argparse.ArgumentError as error:
        raise InputError(_told(str(error), values)) from None


def _told(message: str, values: Mapping[str, Any]) -> str:
    """What the library says of a value, as: the key, what was expected, what came."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    if key and key[1] in values and key[1] != "stages":
        return f"{key[1]} must be {_kind(KINDS[key[1]])}, is {values[key[1]]!r}"
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"{missing[1]} must be given"
    return " ".join(message.replace("Parser key", "").split())


def _kind(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
             Path: "a path", type(None): "null"}  # fmt: skip
    parts = get_args(kind)
    if kind in names:
        return names[kind]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, parts))
    if get_origin(kind) is tuple:
        many = parts[-1] is Ellipsis
        return f"a list, each {_kind(parts[0])}" if many else f"a list of {len(parts)} numbers"
    return " or ".join(map(_kind, parts))
