"""Sources of packages that are not installed: fetched by pip's own machinery, never built or run.

``pip download`` would run the setup.py of a source archive to learn its dependencies. This asks
the same index, with the same settings, for the file alone. As a script: NAME VERSION FOLDER.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

UNREACHABLE = 3


def fetch(package: str, version: str, sha256: str, folder: Path) -> Path | str:
    """The package's archive in a cache folder; where it cannot be had, a str that says why.

    Raises:
        RuntimeError: the archive is not the one with this sha256, or pip's insides have changed.
    """
    path = folder / f"{package}-{version}-{sha256[:12]}"
    if not path.exists():
        # Not find_spec, which makes setuptools give distutils back to whoever asks next.
        if not any(importlib.metadata.distributions(name="pip")):
            return "pip is not installed"
        command = [sys.executable, __file__, package, version, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return f"the package index gave no {package} {version} in two minutes"
        if done.returncode == UNREACHABLE:
            return f"the package index gave no {package} {version}: {done.stdout.strip()}"
        if done.returncode:
            raise RuntimeError(done.stderr)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        path.unlink()
        raise RuntimeError(f"{package} {version} must have sha256 {sha256}, got {found}")
    return path


def read(archive: Path, file: str) -> str:
    """A text file of a wheel or a source archive; ``file`` is its path inside the package."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(file).decode()
    with tarfile.open(archive) as sdist:
        member = next(m for m in sdist.getmembers() if m.name.partition("/")[2] == file)
        stream = sdist.extractfile(member)
        assert stream is not None
        return stream.read().decode()


def signature(source: str, function: str) -> str:
    """A function's parameters with their defaults, without annotations, read and not run."""
    (node,) = (
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function
    )
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return f"({ast.unparse(arguments)})"


def _download(package: str, version: str, path: str) -> int:
    from pip._internal.commands import create_command

    command = create_command("download")
    with command.main_context():
        options, _ = command.parse_args(["--retries", "1", "--timeout", "20", package])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        links = [
            candidate.link
            for candidate in finder.find_all_candidates(package)
            if str(candidate.version) == version
        ]
        if not links:
            print("it is unreachable, or has no such file")
            return UNREACHABLE
        try:
            # As pip does: an archive that the server compresses once more would not match its hash.
            headers = {"Accept-Encoding": "identity"}
            answer = session.get(links[0].url_without_fragment, headers=headers)
            answer.raise_for_status()
        except OSError as error:  # the base of every error of requests
            print(error)
            return UNREACHABLE
    partial = f"{path}.{os.getpid()}"
    Path(partial).write_bytes(answer.content)
    os.replace(partial, path)  # whole or not at all, whoever else runs tests here
    return 0


if __name__ == "__main__":
    sys.exit(_download(*sys.argv[1:]))
