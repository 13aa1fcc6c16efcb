"""Output folders: what may be written where, what resumes, and the resolved configuration each one keeps.

A folder that exists is never overwritten by surprise. With the same
configuration and unfinished it is taken up again; finished or different, the
command stops and names the keys that differ.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from safecrit.errors import NothingToDo, SafecritError
from safecrit.files import PART, write_text

PACKAGES = ("safecrit", "torch", "transformers", "safetensors", "numpy")


@dataclass(kw_only=True)
class OutputFolder:
    """An output folder in use. `resumed`: it holds unfinished work of the same configuration."""

    path: Path
    config_file: Path
    command: str
    config: dict[str, Any]
    resumed: bool

    def finish(self) -> None:
        """Mark the work done; a later run of the same configuration does not take it up."""
        _write(self.config_file, self.command, self.config, finished=True, resumed=self.resumed)


def default_output(command: str, name: str) -> Path:
    """`./safecrit-out/COMMAND-MODEL-TIME`, where no -o was given."""
    return Path("safecrit-out") / f"{command}-{Path(name).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def open_output(
    path: Path,
    command: str,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    inside: str = "",
    reuse_finished: bool = False,
) -> OutputFolder:
    """Take `path` into use for `command` with its resolved `config` (plain values only).

    `inside` names the sub-folder for our own files (`safecrit` in model folders).
    Raises SafecritError where the folder holds something else, naming the keys
    that differ and the ways on, and NothingToDo where an interrupted run of the same settings was resumed and
    finished: whoever starts it once more need not know. `overwrite` empties it if it is an earlier output of ours,
    `reuse_finished` takes a finished run of the same settings up again.
    """
    path = path.expanduser()
    config_file = path / inside / "config.yaml" if inside else path / "config.yaml"
    if path.exists() and not path.is_dir():
        raise SafecritError(f"{path}: is a file, the output is a folder. Choose another -o.")
    resumed = False
    if path.is_dir() and any(not _is_leftover(entry, config_file) for entry in path.iterdir()):
        earlier = _read(config_file) if config_file.is_file() else {}
        if not {"command", "config", "finished"} <= set(earlier):
            raise SafecritError(f"{path}: exists and is no output of `safecrit {command}`. Choose another -o.")
        if earlier["command"] != command:
            raise SafecritError(f"{path}: holds the output of `safecrit {earlier['command']}`. Choose another -o.")
        differing = _differences(earlier["config"], config)
        if overwrite:
            _check_inputs_outside(path, config)
            shutil.rmtree(path)
        elif differing:
            raise SafecritError(
                f"{path}: holds a run with other settings ({'; '.join(differing)}). Use --overwrite or another -o."
            )
        elif earlier.get("finished") and not reuse_finished:
            if earlier.get("resumed"):
                raise NothingToDo(
                    f"{path}: the run that was interrupted and resumed here is finished. --overwrite makes it again."
                )
            raise SafecritError(
                f"{path}: already holds the finished run of these settings. Use --overwrite or another -o."
            )
        else:
            resumed = True
    elif config_file.is_file():
        earlier = _read(config_file)
        resumed = earlier["command"] == command and not _differences(earlier["config"], config)
    for place in (path, config_file.parent):
        for stale in place.glob(f".*{PART}") if place.is_dir() else ():
            stale.unlink()
    _write(config_file, command, config, finished=False, resumed=resumed)
    return OutputFolder(path=path, config_file=config_file, command=command, config=config, resumed=resumed)


def _is_leftover(entry: Path, config_file: Path) -> bool:
    """What a run leaves that stopped before it did anything: half a file, or nothing but our own config.yaml."""
    if entry == config_file:
        return {"command", "config", "finished"} <= set(_read(config_file))
    if entry == config_file.parent:
        return all(_is_leftover(inner, config_file) for inner in entry.iterdir())
    return entry.is_file() and entry.name.startswith(".") and entry.name.endswith(PART)


def _check_inputs_outside(path: Path, config: dict[str, Any]) -> None:
    inside = path.resolve()
    for key, value in config.items():
        for name in value if isinstance(value, list) else [value]:
            place = Path(name).resolve() if isinstance(name, str) else inside
            if place != inside and place.exists() and inside in place.parents:
                raise SafecritError(f"{path}: --overwrite would delete the input {name} ({key}). Choose another -o.")


def check_output_file(path: Path, *, overwrite: bool = False) -> Path:
    """A file to be written: refused where it exists (unless `overwrite`) or where it is a folder."""
    path = path.expanduser()
    if path.is_dir():
        raise SafecritError(f"{path}: is a folder, the output is a file. Choose another -o.")
    if path.exists() and not overwrite:
        raise SafecritError(f"{path}: exists. Use --overwrite or another -o.")
    return path


def environment() -> dict[str, Any]:
    """Versions and machine, for provenance."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "platform": platform.platform(), "versions": versions}


def _write(file: Path, command: str, config: dict[str, Any], *, finished: bool, resumed: bool) -> None:
    content = {
        "command": command,
        "config": config,
        "finished": finished,
        "resumed": resumed,
        "command_line": " ".join(sys.argv),
        "environment": environment(),
    }
    write_text(file, yaml.safe_dump(content, sort_keys=True, allow_unicode=True))


def _read(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SafecritError(
            f"{file}: cannot be read ({type(error).__name__}). Remove the folder or choose another -o."
        ) from error
    return value if isinstance(value, dict) else {}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
