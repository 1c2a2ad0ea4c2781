"""The table of rows.toml as objects: models with their texts, families of formats, methods with the commands that run them."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DATA = Path(os.environ.get("QUANTKIT_TEST_DATA", REPOSITORY.parent / "shared")).resolve()
PEER = "{python} {here}/peer_{script}.py {model} {out} --tokens {tokens} --bits {bits} --group {group}"
QUANTKIT = "{python} -m quantkit convert {model} -o {out} --recipe %s --format %s --calib {tokens} --no-measure"


@dataclass(frozen=True)
class Target:
    """A model with the texts it is calibrated and judged on."""

    name: str
    model: Path
    groups: list[int]
    calibration: list[Path]
    heldout: list[Path]
    rows: int
    seq_len: int
    heldout_rows: int


@dataclass(frozen=True)
class Family:
    """Formats that may stand for one another: equal codes, equal groups. `groups` is None where each target has its own."""

    name: str
    title: str
    bits: list[int]
    groups: list[int] | None = None


@dataclass(frozen=True)
class Method:
    """A way to quantize: a command with {python} {here} {model} {out} {tokens} {bits} {group} {bpw} to fill in.

    `environment` is the peer whose Python runs it; None is the Python of this process. `recipe` is the quantkit recipe it needs.
    """

    name: str
    command: str
    families: list[str]
    environment: str | None = None
    recipe: str | None = None
    data_free: bool = False
    bits: list[int] | None = None


@dataclass(frozen=True)
class Case:
    """One conversion to make and judge."""

    target: Target
    family: Family
    method: Method
    bits: int
    group: int
    seed: int

    @property
    def name(self) -> str:
        group = "channel" if self.group == -1 else f"g{self.group}"
        return f"{self.method.name}-{self.family.name}-b{self.bits}-{group}" + ("" if self.method.data_free else f"-s{self.seed}")

    @property
    def row(self) -> tuple[str, int, int]:
        return self.family.name, self.bits, self.group

    @property
    def bpw(self) -> float:
        """Bits a weight of a symmetric grid with 16-bit scales, in rows of 256 columns where a channel has one scale."""
        return self.bits + 16 / (256 if self.group == -1 else self.group)


def read_table() -> dict[str, Any]:
    return tomllib.loads((HERE / "rows.toml").read_text())


def make_targets() -> list[Target]:
    def place(path: str) -> Path:
        return Path(path.format(data=DATA / "data", evals=HERE.parent))

    def make(name: str, row: dict[str, Any]) -> Target:
        texts = {key: [place(path) for path in row.pop(key)] for key in ("calibration", "heldout")}
        return Target(name=name, model=place(row.pop("model")), **texts, **row)

    return [make(name, row) for name, row in read_table()["targets"].items()]


def make_families() -> dict[str, Family]:
    return {name: Family(name, **row) for name, row in read_table()["families"].items()}


def make_methods(given: list[str]) -> list[Method]:
    """The table's peers and quantkit's recipes, and the commands `given` as [FAMILY/]NAME=COMMAND, on integers if no family is named."""
    table = read_table()
    methods = []
    for name, row in table["peers"].items():
        environment, options = row.pop("peer"), row.pop("options")
        command = PEER.replace("{script}", environment.replace("-", "")) + f" {options}".rstrip()
        methods.append(Method(name, command, environment=environment, **row))
    for name, row in table["quantkit"].items():
        command = QUANTKIT % (row["recipe"], row.pop("format", "compressed-tensors"))
        is_grouped = "integer" in row["families"]
        options = f" {row.pop('options', '')}".rstrip()
        methods.append(Method(f"quantkit-{name}", command + (" --group-size {group}" if is_grouped else "") + options, **row))
    for text in given:
        name, _, command = text.partition("=")
        family, _, name = name.rpartition("/")
        methods.append(Method(f"quantkit-{name}", command, [family or "integer"]))
    return methods


def has_recipe(method: Method, bits: int) -> bool:
    """Whether this checkout has the recipe that the method runs; methods without one always can."""
    return method.recipe is None or (REPOSITORY / "recipes" / f"{method.recipe.format(bits=bits)}.yaml").exists()


def cases_of(target: Target, families: list[Family], methods: list[Method], seeds: list[int]) -> list[Case]:
    """Every conversion for a target, seed by seed, so that a stopped run has whole seeds."""
    return [
        Case(target, family, method, bits, group, seed)
        for seed in seeds for family in families for bits in family.bits for group in family.groups or target.groups
        for method in methods
        if family.name in method.families and bits in (method.bits or [bits]) and (seed == seeds[0] or not method.data_free)
    ]
