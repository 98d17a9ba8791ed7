"""Compile every kernel for a GPU that need not be there: `python compile_kernels.py 90`.

With more arguments only those that have none of them in their names.

Prints a line a kernel: its name, the bytes of registers that spill, and the bytes of shared memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton import kernels, trellis_kernels

POINTERS = {
    "words": "*i32", "order": "*i64", "marked": "*i8", "table": "*fp32", "scales": "*fp16", "offsets": "*i8",
    "means": "*fp16", "four": "*fp16", "partial": "*fp32", "entries": "*i16", "pointers": "*i32",
    "sparse_table": "*fp32", "sparse_scales": "*fp16", "sparse_zeros": "*u8", "sparse_base": "*fp32",
    "zeros": "*u8", "places": "*i32", "bias": "*fp16",
}  # fmt: skip
FLOATS = ("step", "base")


def warps(kernel, constants):
    """Of a program, as launch.py and trellis.py ask for them."""
    two = kernel is kernels.reduce_kernel or (kernel is kernels.dot_kernel and constants["KIND"] == kernels.FOUR.value)
    return 2 if two else 1


def compile_kernel(kernel, target, constants, types):
    """Compile `kernel` for compute capability `target`. types: of arguments that are not in POINTERS."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name) or POINTERS.get(name) or ("fp32" if name in FLOATS else "i32")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps(kernel, constants), "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def variants():
    """(name, kernel, constants, types): what a LLaMA model needs."""
    sparse = {"HAS_SPARSE": True, "SLAB": 4096, "COLUMN_BITS": 12}
    for width in (4, 5):
        for name in ("fp16", "bf16"):
            constants = {"WIDTH": width, "BN": 64, **sparse}
            yield f"table-{width}-{name}", kernels.table_kernel, constants, {"x": f"*{name}", "out": "*fp32"}
    dot = {
        "GROUP_TILES": 1, "SALIENT_FIELDS": 0, "HAS_OFFSETS": False, "HAS_MEANS": False, "HAS_SPARSE": False,
        "HAS_BASE": False, "SLAB": 1, "COLUMN_BITS": 8, "BASE_GROUP": 1, "BN": 64, "BM": 8, "UP": False,
    }  # fmt: skip
    for name, dtype in (("fp16", tl.float16), ("bf16", tl.bfloat16)):
        types = {"x": f"*{name}", "x_salient": f"*{name}", "plain": f"*{name}", "out": "*fp32"}
        for width in (1, 2, 3, 4, 7):
            constants = {**dot, "KIND": 0, "WIDTH": width, "GROUP_FIELDS": 8, "HAS_OFFSETS": True, "DTYPE": dtype}
            yield f"uniform-{width}-{name}", kernels.dot_kernel, constants, types
        constants = {
            **dot, "KIND": 0, "WIDTH": 1, "GROUP_FIELDS": 8, "HAS_MEANS": True, "DTYPE": dtype, "HAS_SPARSE": True,
            "HAS_BASE": True, "SLAB": 128, "BASE_GROUP": 128,
        }  # fmt: skip
        yield f"partial-{name}", kernels.dot_kernel, constants, types
        constants = {**dot, "KIND": 2, "WIDTH": 2, "GROUP_FIELDS": 8, "SALIENT_FIELDS": 2, "DTYPE": dtype}
        yield f"residual-{name}", kernels.dot_kernel, constants, types
        constants = {**dot, **sparse, "KIND": 1, "WIDTH": 5, "GROUP_FIELDS": 16, "BM": 16, "DTYPE": dtype}
        yield f"codebook-dot-{name}", kernels.dot_kernel, constants, types
    decode = {"GROUP_TILES": 1, "HAS_MEANS": False, "BN": 64}
    for name, kind, width, fields in (("table", 1, 5, 16), ("uniform", 0, 4, 8), ("residual", 2, 2, 8)):
        constants = {**decode, "KIND": kind, "WIDTH": width, "GROUP_FIELDS": fields, "HAS_OFFSETS": kind == 0}
        yield f"decode-{name}", kernels.decode_kernel, constants, {"out": "*fp16"}
    scatter = {"SLAB": 4096, "COLUMN_BITS": 12, "HAS_ZEROS": False, "HAS_PLACES": False, "BN": 32, "CHUNK": 8}
    yield "scatter", kernels.scatter_kernel, scatter, {"out": "*fp16"}
    trellis = {
        "words": "*i16", "x": "*fp32", "tables": "*fp32", "factors": "*fp32", "bounds": "*i32", "begins": "*i32",
        "windows": "*i32", "segment_words": "*i32", "starts": "*i32", "out": "*fp32",
    }  # fmt: skip
    for name, columns, vectors in (("one", 8, 1), ("some", 4, 8)):
        constants = {"BN": 64, "BC": columns, "BM": vectors}
        yield f"trellis-{name}", trellis_kernels.product_kernel, constants, trellis
    yield "trellis-values", trellis_kernels.values_kernel, {"BN": 64, "BC": 8, "SLAB": 16}, trellis
    yield "reduce", kernels.reduce_kernel, {"HAS_BIAS": True, "SIZE": 256}, {"out": "*fp16"}


def spilled_bytes(compiled):
    """Stack bytes of the machine code, as the tool of the wheel reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", said.stdout).group(1))


if __name__ == "__main__":
    target, *without = sys.argv[1:]
    for name, kernel, constants, types in variants():
        if not any(part in name for part in without):
            compiled = compile_kernel(kernel, int(target), constants, types)
            print(name, spilled_bytes(compiled), compiled.metadata.shared, flush=True)
