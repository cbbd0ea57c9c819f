"""Look LLVM intrinsics up by name; LLVM itself would crash on an unknown one."""

from tvm.script import tirx as T


def llvm_intrinsic(name: str) -> int:
    """Number of the intrinsic in the LLVM that TVM carries.

    Raises:
        ValueError: this LLVM has no intrinsic of that name.
    """
    number = int(T.llvm_lookup_intrinsic_id(name))
    if not number:
        raise ValueError(f"this LLVM has no intrinsic {name}")
    return number
