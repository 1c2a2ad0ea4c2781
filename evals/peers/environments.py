"""Make one Python environment for each peer, with the versions of environments.toml, and write down what was installed.

    python environments.py make [PEER...] [--folder ENVS]
    python environments.py list [--folder ENVS]

Peers need different versions of transformers, so they never share an environment, and none shares quantkit's. Torch is installed first and
held by a constraint: no peer may bring a build for other hardware. Each folder gets an `installed.txt`, pip's own list of exact versions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "peers" / "environments"


def read_table() -> tuple[str, dict[str, list[str]]]:
    """The version of torch, and what each peer's environment needs besides."""
    table = tomllib.loads((HERE / "environments.toml").read_text())
    return table["torch"], table["peers"]


def find_python(folder: Path, peer: str) -> Path | None:
    """The peer's Python, where its environment was made completely."""
    return folder / peer / "bin/python" if (folder / peer / "installed.txt").exists() else None


def make(folder: Path, peer: str, torch: str, packages: list[str]) -> None:
    """Make the environment `folder/peer`; one that is there already is brought to the table's versions.

    Raises:
        subprocess.CalledProcessError: pip found no such version, or none that agrees with this torch.
    """
    place = folder / peer
    (place / "installed.txt").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    constraint = place / "constraints.txt"
    constraint.write_text(f"torch=={torch}\n")
    install = [place / "bin/python", "-m", "pip", "install", "-qq"]
    subprocess.run([*install, f"torch=={torch}"], check=True)
    subprocess.run([*install, "--constraint", constraint, *packages], check=True)
    frozen = subprocess.run([place / "bin/python", "-m", "pip", "list", "--format", "freeze"], check=True, capture_output=True, text=True)
    (place / "installed.txt").write_text(frozen.stdout)


def main() -> None:
    torch, table = read_table()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "list"])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(table)}; all of them if none is named")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    args = parser.parse_args()
    if unknown := set(args.peers) - table.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(table)}")
    failed = []
    for peer in args.peers or table:
        if args.action == "make":
            try:
                make(args.folder.resolve(), peer, torch, table[peer])
            except subprocess.CalledProcessError as error:
                failed.append(peer)
                print(f"{peer}: not made: {error}", file=sys.stderr)
        print(f"{peer}: {find_python(args.folder, peer) or 'not there'}", flush=True)
    if failed:
        raise SystemExit(f"not made: {', '.join(failed)}")


if __name__ == "__main__":
    main()
