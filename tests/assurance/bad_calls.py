"""Bad calls: what is handed to a kernel, on every backend."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.assurance.bad_case import ROOT, Call, Case
from tilelink.kernel import Kernel, load_kernels

WORLD = 2
M, N, K = 32, 16, 16
CPU = ("reference", "simulate", "interpret")


def examples(name: str) -> Kernel:
    """The kernel ``name`` of examples/."""
    return load_kernels(ROOT / "examples" / f"{name}.py")[name]


def shards() -> tuple[Kernel, Any, Any]:
    """The all-gather GEMM with good arguments for two ranks: shards of A, weights B."""
    import torch

    a = [torch.ones(M // WORLD, K, dtype=torch.bfloat16) for _ in range(WORLD)]
    b = [torch.ones(K, N, dtype=torch.bfloat16) for _ in range(WORLD)]
    return examples("ag_gemm"), a, b


def changed(name: str, words: tuple[str, ...], change: Any, backends: Any = CPU) -> list[Case]:
    """A call on each of ``backends`` with ``change(torch, a, b)`` as its arguments."""

    def call(backend: str) -> Any:
        import torch

        kernel, a, b = shards()
        given = change(torch, a, b)
        args, kwargs = given if given and isinstance(given[-1], dict) else (given, {})
        world = kwargs.pop("world", WORLD)
        return kernel.on(backend, world=world)(*args, **kwargs)

    return [
        Call(f"call: {name} [{backend}]", partial(call, backend), words) for backend in backends
    ]


def on(name: str, words: tuple[str, ...], **how: Any) -> Call:
    """``Kernel.on`` with bad options, then a good call."""

    def call() -> Any:
        kernel, a, b = shards()
        return kernel.on(**how)(a, b)

    return Call(f"on: {name}", call, words)


def strict(name: str, words: tuple[str, ...], change: Any) -> Call:
    """``Kernel.bind`` as a GPU call makes it, on one rank's arguments."""

    def call() -> Any:
        import torch

        kernel, a, b = shards()
        return kernel.bind(change(torch, a[0], b[0]), WORLD)

    return Call(f"bind: {name}", call, words)


def built(name: str, words: tuple[str, ...], extents: Any = None, **how: Any) -> Call:
    """``Kernel.build`` with bad values."""
    sizes = {"M": M, "N": N, "K": K} if extents is None else extents
    return Call(f"build: {name}", lambda: examples("ag_gemm").build(sizes, **how), words)


def one(items: Any, item: Any) -> Any:
    """The list with its last entry replaced."""
    return [*items[:-1], item]


CASES: tuple[Case, ...] = (
    *changed("no arguments", ("`A`",), lambda t, a, b: ()),
    *changed("one argument missing", ("`B`",), lambda t, a, b: (a,)),
    *changed("one argument too many", ("3", "5"), lambda t, a, b: (a, b, None, None, None)),
    *changed("an unknown keyword", ("`colour`",), lambda t, a, b: ((a, b), {"colour": 3})),
    *changed("an argument twice", ("`A`", "twice"), lambda t, a, b: ((a, b), {"A": a})),
    *changed("None for an input", ("`B`",), lambda t, a, b: (a, None)),
    *changed("None for one rank's input", ("`B`", "rank 1"), lambda t, a, b: (a, one(b, None))),
    *changed("a number for a tensor", ("`B`", "int"), lambda t, a, b: (a, 3)),
    *changed("text for a tensor", ("`B`", "str"), lambda t, a, b: (a, "B")),
    *changed("an object for a tensor", ("`B`", "object"), lambda t, a, b: (a, object())),
    *changed("a tensor class", ("`B`", "type"), lambda t, a, b: (a, t.Tensor)),
    *changed("numpy arrays", ("`A`", "numpy"), lambda t, a, b: ([x.float().numpy() for x in a], b)),
    *changed("an empty list", ("`A`", "0"), lambda t, a, b: ([], b)),
    *changed("lists of different lengths", ("`B`", "3"), lambda t, a, b: (a, [*b, b[0]])),
    *changed("a list that is too short", ("`A`", "1"), lambda t, a, b: (a[:1], b)),
    *changed("a nested list", ("`A`", "list"), lambda t, a, b: ([a, a], b)),
    *changed("a dict for a list", ("`A`", "dict"), lambda t, a, b: ({0: a[0], 1: a[1]}, b)),
    *changed("a generator for a list", ("`A`",), lambda t, a, b: ((x for x in a), b)),
    *changed("ranks of different shapes", ("rank 1", "`A`"), lambda t, a, b: (one(a, a[1][:8]), b)),
    *changed(
        "ranks of different types", ("rank 1", "`A`"), lambda t, a, b: (one(a, a[1].half()), b)
    ),
    *changed("extents that differ", ("`K`",), lambda t, a, b: (a, [x[:8] for x in b])),
    on("one capacity that is a text", ("`M`", "64"), dynamic={"M": "64"}),
    on("one capacity that is a float", ("`M`", "64.0"), dynamic={"M": 64.0}),
    on("capacities that fall", ("`M`", "[64, 32]"), dynamic={"M": (64, 32)}),
    *changed("too few axes", ("`A`",), lambda t, a, b: ([x[0] for x in a], b)),
    *changed("too many axes", ("`A`",), lambda t, a, b: ([x[None] for x in a], b)),
    *changed("a scalar tensor", ("`A`",), lambda t, a, b: (t.tensor(1.0), b)),
    *changed("no axis of B", ("`B.shape`",), lambda t, a, b: (a, t.tensor(1.0))),
    *changed("zero rows", ("`axis 0 of A`", "0"), lambda t, a, b: ([x[:0] for x in a], b)),
    *changed("zero columns", ("`axis 1 of B`", "0"), lambda t, a, b: (a, [x[:, :0] for x in b])),
    *changed("fp64", ("`A`", "float64"), lambda t, a, b: ([x.double() for x in a], b)),
    *changed("complex", ("`A`", "complex"), lambda t, a, b: ([x.to(t.complex64) for x in a], b)),
    *changed("int8", ("`A`", "int8"), lambda t, a, b: ([x.to(t.int8) for x in a], b)),
    *changed(
        "types that do not mix", ("int32", "B[k, n]"), lambda t, a, b: (a, [x.int() for x in b])
    ),
    *changed("sparse", ("`B`", "sparse"), lambda t, a, b: (a, [x.to_sparse() for x in b])),
    *changed("on the meta device", ("`B`", "meta"), lambda t, a, b: (a, [x.to("meta") for x in b])),
    *changed(
        "gradients", ("`B`", "grad"), lambda t, a, b: (a, [x.clone().requires_grad_() for x in b])
    ),
    *changed(
        "an output of the wrong shape",
        ("`C`",),
        lambda t, a, b: (a, b, [t.zeros(M, N + 8, dtype=t.bfloat16) for _ in a]),
    ),
    *changed(
        "an output of the wrong rank",
        ("`C`",),
        lambda t, a, b: (a, b, [t.zeros(M, dtype=t.bfloat16) for _ in a]),
    ),
    *changed(
        "an output that is expanded",
        ("`C`", "memory"),
        lambda t, a, b: (a, b, [t.zeros(1, N, dtype=t.bfloat16).expand(M, N) for _ in a]),
    ),
    *changed(
        "an output that is an input",
        ("`C`", "`B`"),
        lambda t, a, b: (
            [x.repeat(1, 1) for x in a],
            (same := [t.ones(M, M, dtype=t.bfloat16)[:K, :N] for _ in a]),
            [x.as_strided((M, N), (N, 1)) for x in same],
        ),
    ),
    *changed(
        "one output for all ranks",
        ("`C`", "rank"),
        lambda t, a, b: (a, b, t.zeros(M, N, dtype=t.bfloat16)),
    ),
    *changed(
        "an output for one rank only",
        ("`C`", "rank 1"),
        lambda t, a, b: (a, b, [t.zeros(M, N, dtype=t.bfloat16), None]),
    ),
    *changed("world 0", ("world", "0"), lambda t, a, b: ((a[0], b[0]), {"world": 0})),
    *changed("world negative", ("world", "-2"), lambda t, a, b: ((a[0], b[0]), {"world": -2})),
    *changed("world a float", ("world", "2.0"), lambda t, a, b: ((a, b), {"world": 2.0})),
    *changed("world text", ("world", "'2'"), lambda t, a, b: ((a, b), {"world": "2"})),
    *changed(
        "world too large", ("world", "100000"), lambda t, a, b: ((a[0], b[0]), {"world": 100000})
    ),
    on("no such backend", ("`tpu`", "simulate"), backend="tpu"),
    on("an option that is misspelt", ("`wrld`", "did you mean `world`?"), wrld=2),
    on("a backend that is a number", ("3", "backend"), backend=3),
    on("a seed that is text", ("seed", "'x'"), backend="simulate", seed="x"),
    on("a group on a CPU backend", ("group", "simulate"), backend="simulate", group="tp"),
    strict("not contiguous", ("`A`", "contiguous"), lambda t, a, b: (t.ones(16, 32)[:, ::2], b)),
    strict(
        "rows that are not aligned", ("`A`", "16 bytes"), lambda t, a, b: (a[:, :15].clone(), b)
    ),
    strict(
        "start that is not aligned",
        ("`B`", "16"),
        lambda t, a, b: (a, t.ones(K * N + 1, dtype=t.bfloat16)[1:].view(K, N)),
    ),
    strict("an axis too many", ("`A`",), lambda t, a, b: (a[None], b)),
    built("no extents", ("M",), {}),
    built("an extent missing", ("N",), {"M": M, "K": K}),
    built("an extent of 0", ("`M`", "0"), {"M": 0, "N": N, "K": K}),
    built("an extent negative", ("`N`", "-16"), {"M": M, "N": -16, "K": K}),
    built("an extent that is text", ("`N`", "'16'"), {"M": M, "N": "16", "K": K}),
    built("an extent that is a float", ("`N`", "16.0"), {"M": M, "N": 16.0, "K": K}),
    built("extents that are a list", ("extents", "list"), [M, N, K]),
    built("not divisible by the world", ("`M`", "3"), world=3),
    built("world 0", ("world", "0"), world=0),
    built("world text", ("world", "'2'"), world="2"),
    built("an unknown dtype", ("float8",), dtype="float8"),
    built("a dtype of a stranger", ("`Q`",), dtypes={"Q": "fp32"}),
    built("a tensor of an unknown dtype", ("`A`", "fp8"), dtypes={"A": "fp8"}),
    built("a scalar of a stranger", ("`eps`",), scalars={"eps": 1.0}),
    built("present of a stranger", ("`Q`",), present=["Q"]),
    Call(
        "gpu: no GPU on this machine", lambda: shards()[0](*(x[0] for x in shards()[1:])), ("cuda",)
    ),
    Call(
        "file: a kernel file that is missing", lambda: load_kernels("nowhere.py"), ("nowhere.py",)
    ),
    Call("file: a folder", lambda: load_kernels("."), ("directory",)),
)
