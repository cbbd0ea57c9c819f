"""Look LLVM intrinsics up by name; LLVM itself would crash on an unknown one."""

from collections.abc import Sequence
from typing import Any

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


def add_products(
    buffer: Any, vector: str, places: Sequence[Sequence[int]], products: Sequence[Any]
) -> None:
    """Emit ``buffer[place] += product`` of each vector, multiplied before the first is added.

    In turns, additions would take the ports that multiplications and shuffles need: a tenth of
    the speed on Zen. LLVM's scheduler knows nothing of it, so that an empty piece of assembly
    (``products_first``) makes the first of two sums wait for both products.
    """
    made = list(products)
    if len(made) == 2:
        made[0] = T.call_pure_extern(vector, _name(vector), *made)
    for place, product in zip(places, made, strict=True):
        store(buffer, place, buffer.vload(list(place), vector) + product)


def store(buffer: Any, place: Sequence[int], value: Any) -> None:
    """Emit a vector store from a helper of a TVMScript function."""
    statement = buffer.vstore(list(place), value)
    T.buffer_store(statement.buffer, statement.value, statement.indices)


def prefetch(buffer: Any, place: Sequence[int], ahead: int) -> None:
    """Emit a prefetch of the line so many bytes behind a place; none for 0.

    Past the end of the memory it does nothing.
    """
    if ahead:
        line = T.handle_add_byte_offset(T.address_of(buffer[tuple(place)]), ahead)
        number = llvm_intrinsic("llvm.prefetch")
        zero, near, data = (T.int32(value) for value in (0, 3, 1))
        T.evaluate(T.call_llvm_intrin("void", number, line, zero, near, data))


def products_first(sch: Any, loop: Any, vector: str) -> None:
    """Give the kernel the function that ``add_products`` calls; it leaves no instruction."""
    element, lanes = vector.split("x")
    kind = f"<{lanes} x i{element.lstrip('uint')}>"
    sch.annotate(
        loop,
        "pragma_import_llvm",
        f"define linkonce_odr {kind} @{_name(vector)}({kind} %a, {kind} %b) "
        "alwaysinline nounwind willreturn memory(none) {\n"
        f'  %r = call {kind} asm "", "=x,0,x"({kind} %a, {kind} %b) '
        f"nounwind willreturn memory(none)\n  ret {kind} %r\n}}\n",
    )


def _name(vector: str) -> str:
    return f"mpqc_after_{vector}"
