"""Compile kernels for GPUs that are not here, and say what became of them: shared memory, registers, spills, instructions.

    python -m quantkit_kernels.gpu.ahead_of_time [--arch 80 89 90] [--only NAME] [--json FILE]

compiles every configuration that the modules of this package ship (their `shipped()`), in about a second each, and prints a line for each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 89, 90)
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""The most that a block of threads may have (CUDA C++ Programming Guide, compute capabilities)."""
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One kernel as it is launched.

    Attributes:
        name: for the table, as "low_bit_linear int4 g128 64x16".
        kernel: the function under triton.jit.
        signature: the type of every argument that is not constant: "*bf16", "*u8", "i32", ...
        constants: the constant arguments.
        options: num_warps, num_stages and the like.
        aligned: arguments, besides all pointers, that 16 divides.
        archs: the architectures it is for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ptxas made of a configuration.

    Attributes:
        stack: bytes of local memory a thread; more than 0 are spills, or arrays that registers do not hold.
        instructions: how often each opcode, with its modifiers, stands in the machine code.
    """

    name: str
    arch: int
    shared: int
    registers: int
    stack: int
    instructions: dict[str, int]

    def count(self, *beginnings: str) -> int:
        """Instructions that begin so, such as "HGMMA" or "I2F"."""
        return sum(number for opcode, number in self.instructions.items() if opcode.startswith(beginnings))


def compile_for(configuration: Configuration, arch: int) -> Compiled:
    """Compile for compute capability `arch` / 10; the kernel must not be interpreted (TRITON_INTERPRET unset where its module was imported)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = configuration.kernel.arg_names
    aligned = [i for i, name in enumerate(names) if configuration.signature.get(name, "").startswith("*") or name in configuration.aligned]
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(configuration.kernel, signature, dict(configuration.constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(configuration.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, code = _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("--dump-sass", cubin)
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        configuration.name, arch, made.metadata.shared, sizes["REG"], sizes["STACK"] + sizes.get("LOCAL", 0), dict(Counter(_OPCODE.findall(code)))
    )


def shipped() -> Iterator[Configuration]:
    """Every configuration of every module of this package."""
    package = importlib.import_module(__package__)
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if module != "ahead_of_time":
            yield from importlib.import_module(f"{__package__}.{module}").shipped()


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="configurations whose name has this in it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it")
    found = []
    for configuration in shipped():
        if args.only in configuration.name:
            for arch in (arch for arch in args.arch if arch in configuration.archs):
                made = compile_for(configuration, arch)
                found.append(made)
                matrix = made.count("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA")
                print(
                    f"{made.name:<44} sm_{arch}: {made.shared:>6} bytes shared, {made.registers:>3} registers, {made.stack} of stack, "
                    f"{matrix} matrix instructions, {made.count('I2F')} I2F", flush=True,
                )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps([asdict(made) for made in found]), encoding="utf-8")
    if not found:
        sys.exit(f"no configuration has {args.only!r} in its name")


if __name__ == "__main__":
    main()
