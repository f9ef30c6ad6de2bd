"""What a Triton kernel needs of a GPU, from its machine code: compiled for Hopper (sm_90), which needs no GPU."""

import re
import subprocess
import tempfile
from pathlib import Path


def compiled(kernel, types: dict[str, str], constants: dict, **options: int):
    """Triton's result: `asm` holds every stage of the code, `metadata` what it needs.

    types: of all run-time arguments, as `*bf16` or `i32`; pointers count as aligned to 16 bytes. constants: values of
    the compile-time arguments. options: `num_warps`, `num_stages`, `maxnreg`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(kernel, types: dict[str, str], constants: dict, **options: int) -> dict[str, int]:
    """Registers of a thread, bytes of stack (spilled registers) of a thread and of shared memory of a program.

    Arguments are those of `compiled`.
    """
    import triton

    result = compiled(kernel, types, constants, **options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", used)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": result.metadata.shared}


def offset_types(result, shape: str, number: str) -> list[str]:
    """Types of the offsets that a compiled kernel adds to pointers to numbers (`bf16`) in tiles of a shape (`16x1`)."""
    return re.findall(rf"tensor<{shape}x!tt.ptr<{number}>>, tensor<{shape}x(i\d+)>", result.asm["ttir"])
