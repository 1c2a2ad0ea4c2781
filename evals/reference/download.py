"""Fetch the training texts that can be had by name from the Hugging Face hub into a folder of texts, the head of each. Needs `datasets`.

python -m evals.reference.download TEXTS
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One dataset's training split. Test and validation splits are never fetched."""

    name: str
    config: str | None
    licence: str
    file: str
    num_rows: int


SOURCES = (
    Source("roneneldan/TinyStories", None, "CDLA-Sharing-1.0", "tinystories.txt", 20_000),
    Source("Salesforce/wikitext", "wikitext-2-raw-v1", "CC BY-SA 4.0", "wikitext2.txt", 40_000),
)


def download(source: Source, folder: Path) -> Path:
    from datasets import load_dataset

    rows = load_dataset(source.name, source.config, split="train", streaming=True)
    path = folder / source.file
    path.write_text("\n\n".join(row["text"].strip() for row in itertools.islice(rows, source.num_rows)), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        path = download(source, folder)
        print(f"{source.name} ({source.licence}): {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
