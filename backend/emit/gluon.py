"""The text of a kernel whose warps have roles: a function a role, and the kernel that starts them."""

from __future__ import annotations

from dataclasses import replace

from tilelink.backend.emit.kernel import Kernel, heading, leave, parameters_of
from tilelink.backend.emit.roles import GROUP_WARPS, REGISTERS, Roles, names_in
from tilelink.backend.emit.scope import Program
from tilelink.backend.emit.text import WIDTH, Writer
from tilelink.ir import Op


def emit_roles(program: Program, launch: Op, name: str, system: frozenset[str]) -> Kernel:
    """The kernel of ``launch``, which has roles; ``system`` names the counters that streams wait for.

    Two groups of four warps run the same function with ``role`` 0 and 1, one warp loads, and one may fetch parts.
    """
    roles = Roles(program, launch, name)
    bodies = roles.functions()
    scope = replace(roles.multiply, writer=Writer(), over={}, grid=("", ""))
    scope.writer.depth = 1
    leave(scope, program, launch, system)
    parameters = parameters_of(scope)
    shared = roles.shared()
    names = ["ctx", *(p.name for p in parameters), *sorted(scope.buffers.values())]
    names += [line.split(" = ")[0] for line in shared]
    text = Writer()
    calls: dict[str, list[str]] = {}
    for function, lines in bodies:
        used = names_in(lines)
        calls[function] = given = [n for n in dict.fromkeys(names) if n in used]
        role = ["role: tl.constexpr"] if function.endswith("_multiply") else []
        text.line("@gluon.jit")
        text.call(f"def {function}(", [*role, *given], "):")
        text.lines += lines
        text.line()
        text.line()
    load, multiply, *fetch = (function for function, _ in bodies)
    head = heading(scope, launch, "gluon.jit", name, parameters)
    head.lines += [f"    {line}" for line in shared]
    head.line("gl.warp_specialize(")
    with head.indent():
        head.line("[")
        with head.indent():
            for function, args in (
                (multiply, ["0", *calls[multiply]]),
                (multiply, ["1", *calls[multiply]]),
                (load, calls[load]),
                *((function, calls[function]) for function in fetch),
            ):
                _started(head, function, args)
        head.line("],")
        # The first group's warps are the kernel's own.
        head.line(f"[{GROUP_WARPS}, 1{', 1' * len(fetch)}],")
        registers = (*REGISTERS, *REGISTERS[1:] * len(fetch))
        head.line(f"[{', '.join(map(str, registers))}],")
    head.line(")")
    head.lines += scope.writer.lines
    return Kernel(
        name,
        text.text().rstrip("\n") + "\n\n\n" + head.text(),
        parameters,
        int(launch["workers"]),
        GROUP_WARPS,
        int(launch["stages"]),
        "gluon",
    )


def _started(head: Writer, function: str, args: list[str]) -> None:
    """One role of `warp_specialize`: the function and its arguments."""
    flat = f"({function}, ({', '.join(args)})),"
    room = WIDTH - 4 * head.depth
    if len(flat) <= room:
        head.line(flat)
        return
    head.line("(")
    with head.indent():
        head.line(f"{function},")
        inner = f"({', '.join(args)}),"
        if len(inner) <= room - 4:
            head.line(inner)
        else:
            head.line("(")
            with head.indent():
                for arg in args:
                    head.line(f"{arg},")
            head.line("),")
    head.line("),")
