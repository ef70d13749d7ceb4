"""Errors of the mapping language: one class a mistake.

A syntax mistake is taught by malformed examples: a text that fails in the same parser state, on
the same kind of token, is the same mistake (as in lark's ``match_examples``). Tests read the same
examples.
"""

from __future__ import annotations

from typing import ClassVar

from tilelink.errors import TilelinkError


class MappingError(TilelinkError):
    """Base of the errors in a mapping text."""

    code = "mapping"


class MappingSyntaxError(MappingError):
    """A mapping text that does not parse, in a way that no example teaches."""

    code = "mapping-syntax"
    message = "this does not parse as a communication mapping: unexpected {found}"
    hint = "a statement looks like `gather A[M, K] over M`; frontend/mapping.lark is the reference"
    examples: ClassVar[tuple[str, ...]] = ()
    # The words that can stand at that place, and the hint where none of them is close.
    words: ClassVar[tuple[str, ...]] = ()
    advice: ClassVar[str] = ""


class UnknownStatement(MappingSyntaxError):
    """A statement that begins with another word."""

    code = "unknown-statement"
    message = "a statement cannot begin with {found}"
    hint = "{suggestion}"
    words = ("combine", "exchange", "gather", "local", "reduce", "ring", "scatter", "shard")
    advice = "statements begin with " + ", ".join(f"`{word}`" for word in words)
    examples = ("gathr A[M, K] over M", "A[M, K] over M", "{ tile 1 }", "owner m", "over M", "7")


class MissingTensor(MappingSyntaxError):
    """A statement word with no tensor after it."""

    code = "missing-tensor"
    message = "expected a tensor, found {found}"
    hint = "name the tensor and its extents: `gather A[M, K] over M`"
    examples = ("gather", "gather [M, K] over M", "gather 3", "local", "scatter {", "reduce ;")


class MissingShape(MappingSyntaxError):
    """A tensor without its extents."""

    code = "missing-shape"
    message = "expected the extents of the tensor in brackets, found {found}"
    hint = "write the shape behind the name: `A[M, K]`"
    examples = (
        "gather A over M",
        "gather A(M, K) over M",
        "local B",
        "reduce C sum",
        "exchange X[T, H] by dest into R[CAP, H], offs[WORLD + 1]",
        "exchange X[T, H] by dest[T, k] into R, offs[WORLD + 1]",
        "combine Z[C, H] from R into Y",
    )


class MissingExtent(MappingSyntaxError):
    """Brackets with nothing, or not an expression, in them."""

    code = "missing-extent"
    message = "expected an extent, found {found}"
    hint = "each axis has an extent, a name or an expression: `A[M, 2 * K]`"
    examples = ("gather A[] over M", "gather A[M,] over M", "gather A[:, K] over M", "local A[-1]")


class UnclosedShape(MappingSyntaxError):
    """Extents without the closing bracket, or without commas between them."""

    code = "unclosed-shape"
    message = "expected `,` or `]` after an extent, found {found}"
    hint = "extents are separated by commas and closed by `]`: `A[M, K]`"
    examples = (
        "gather A[M, K over M",
        "gather A[M K] over M",
        "gather A[M, 3 K] over M",
        "local A[M; K]",
        "local A[M",
        "local A[M: K]",
    )


class MissingOver(MappingSyntaxError):
    """No `over` where the statement divides a tensor."""

    code = "missing-over"
    message = "expected `over` and an extent, found {found}"
    hint = "say along which extent the ranks divide the tensor: `gather A[M, K] over M`"
    examples = (
        "gather A[M, K]",
        "gather A[M, K] sum",
        "scatter C[M, N] sum",
        "shard Q[S, D] {",
        "ring K[S, D]\nring V[S, D]",
        "gather A[M, K] on M",
    )


class OverWhat(MappingSyntaxError):
    """`over` with no extent's name after it."""

    code = "over-what"
    message = "`over` wants the name of an extent, found {found}"
    hint = "write the extent as it stands in the shape: `gather A[M, K] over M`"
    examples = ("gather A[M, K] over", "gather A[M, K] over 0", "shard A[M] over [M]")


class MissingSum(MappingSyntaxError):
    """A scatter or a reduce without `sum`."""

    code = "missing-sum"
    message = "expected `sum`, found {found}"
    hint = (
        "say how the contributions are combined: `scatter C[M, N] over M sum`, `reduce C[M, N] sum`"
    )
    examples = (
        "scatter C[M, N] over M",
        "scatter C[M, N] over M\nlocal B[K]",
        "scatter C[M, N] over M mean",
        "scatter C[M, N] over M { tile 1 }",
        "scatter C[M, N] over M, M dynamic",
        "reduce C[M, N]",
        "reduce C[M, N] max",
        "reduce C[M, N] { tile 1 }",
        "reduce C[M, N]\nlocal B[K]",
    )


class SumNotHere(MappingSyntaxError):
    """`sum` on a statement that adds nothing up."""

    code = "sum-not-here"
    message = "`sum` does not belong here: only `scatter` and `reduce` add contributions"
    hint = "drop it, or say `scatter C[M, N] over M sum`"
    examples = ("gather A[M, K] over M sum", "ring A[M] over M sum", "local B[K] sum")


class OverNotHere(MappingSyntaxError):
    """`over` on a statement that divides nothing."""

    code = "over-not-here"
    message = "`over` does not belong here"
    hint = (
        "a local tensor is not divided (`shard` is), every rank gets all of a `reduce` (`scatter` "
        "divides it), and an exchange goes where its table says"
    )
    examples = (
        "local B[K, N] over K",
        "reduce C[M, N] over M sum",
        "reduce C[M, N] sum over M",
        "exchange X[T, H] over T by dest[T, k] into R[C, H], o[W]",
        "exchange X[T, H] by dest[T, k] into R[C, H], o[W] over T",
    )


class IncompleteExchange(MappingSyntaxError):
    """An exchange that lacks its table or one of its results."""

    code = "incomplete-exchange"
    message = "an exchange names its table and both results; unexpected {found}"
    hint = "the whole form is `exchange X[T, H] by dest[T, k] into R[CAP, H], offs[WORLD + 1]`"
    examples = (
        "exchange X[T, H]",
        "exchange X[T, H] into R[C, H], offs[W]",
        "exchange X[T, H] by",
        "exchange X[T, H] by [T, k]",
        "exchange X[T, H] by dest[T, k]",
        "exchange X[T, H] by dest[T, k] R[C, H]",
        "exchange X[T, H] by dest[T, k] into",
        "exchange X[T, H] by dest[T, k] into R[C, H]",
        "exchange X[T, H] by dest[T, k] into R[C, H] offs[W]",
        "exchange X[T, H] by dest[T, k] into R[C, H]\nlocal B[K]",
        "exchange X[T, H] by dest[T, k] into R[C, H],",
    )


class IncompleteCombine(MappingSyntaxError):
    """A combine that lacks its source or its result."""

    code = "incomplete-combine"
    message = "a combine names the exchange's result and its own; unexpected {found}"
    hint = "the whole form is `combine Z[CAP, H] from R into Y[T, k, H]`"
    examples = (
        "combine Z[C, H]",
        "combine Z[C, H] into Y[T, k, H]",
        "combine Z[C, H] from",
        "combine Z[C, H] from R",
        "combine Z[C, H] from R[C, H] into Y[T, k, H]",
        "combine Z[C, H] from R into",
        "combine Z[C, H] from R, Y[T, k, H]",
    )


class BadMark(MappingSyntaxError):
    """A comma after a statement that is not followed by `NAME dynamic`."""

    code = "bad-mark"
    message = "expected a mark such as `M dynamic`, found {found}"
    hint = "marks follow the statement: `gather A[M, K] over M, M dynamic`; there is no other mark"
    examples = (
        "gather A[M, K] over M,",
        "gather A[M, K] over M, M",
        "gather A[M, K] over M, dynamic",
        "gather A[M, K] over M, M static",
        "gather A[M, K] over M, 3 dynamic",
        "gather A[M, K] over M, N",
        "gather A[M, K] over M, K\nlocal B[K]",
    )


class MissingSeparator(MappingSyntaxError):
    """Two statements on one line with nothing between them."""

    code = "missing-separator"
    message = "expected the end of the statement, found {found}"
    hint = "separate statements by a newline or `;`; maps such as `tile` stand in braces"
    examples = (
        "gather A[M, K] over M gather B[M, K] over M",
        "gather A[M, K] over M tile 1",
        "gather A[M, K] over M { tile 1 } gather B[M] over M",
        "reduce C[M] sum gather B[M] over M",
        "local B[K] local C[K]",
        "gather A[M, K] over M 3",
    )


class MissingComma(MappingSyntaxError):
    """A mark with no comma before it, or without its extent."""

    code = "missing-comma"
    message = "expected the end of the statement, found {found}"
    hint = "a mark stands behind a comma and names its extent: `gather A[M, K] over M, M dynamic`"
    examples = (
        "gather A[M, K] over M dynamic",
        "scatter C[M, N] over M sum dynamic",
        "local B[K, N] dynamic",
        "gather A[M, K] over M { tile 1 x K } dynamic",
    )


class BlockNotHere(MappingSyntaxError):
    """Maps on a tensor that does not move."""

    code = "block-not-here"
    message = "a local tensor has no maps"
    hint = "it stays where it is; a tensor that moves is named by `gather`, `scatter`, `ring`, …"
    examples = ("local B[K, N] { tile 1 x 1 }", "local B[K, N] {}")


class UnknownMap(MappingSyntaxError):
    """A word in braces that is not a map."""

    code = "unknown-map"
    message = "expected `owner`, `tile` or `signal`, found {found}"
    hint = "{suggestion}"
    words = ("owner", "tile", "signal")
    advice = "write each map on a line of its own: `owner m / 64`, `tile 128 x K`, `signal t / 2`"
    examples = (
        "gather A[M] over M { tiles 1 }",
        "gather A[M] over M { rank m }",
        "gather A[M] over M { 128 }",
        "gather A[M] over M { tile 1\n tiles 1 }",
        "gather A[M] over M { gather B[M] over M }",
        "gather A[M] over M { tile 1\n / 2 }",
        "gather A[M] over M { = 3 }",
    )


class UnclosedBlock(MappingSyntaxError):
    """A block that the text ends in."""

    code = "unclosed-block"
    message = "the block is not closed"
    hint = "close the maps with `}}`"
    examples = (
        "gather A[M] over M {",
        "gather A[M] over M { tile 1",
        "gather A[M] over M { tile M",
        "gather A[M] over M { tile M\n",
        "gather A[M] over M { owner owner_of[m]",
        "gather A[M] over M { owner (m)",
    )


class MissingMapValue(MappingSyntaxError):
    """A map's word with no expression after it."""

    code = "missing-map-value"
    message = "expected the map's expression, found {found}"
    hint = "give an integer expression: `owner m / (M / WORLD)`, `tile 128 x K`, `signal t / 2`"
    examples = (
        "gather A[M] over M { owner }",
        "gather A[M] over M { tile }",
        "gather A[M] over M { signal }",
        "gather A[M] over M { owner = m / 2 }",
        "gather A[M] over M { owner: m / 2 }",
        "gather A[M] over M { tile [1, 2] }",
        "gather A[M] over M { owner -m }",
        "gather A[M] over M { tile 128 x }",
    )


class TileSeparator(MappingSyntaxError):
    """Tile lengths separated by something other than `x`."""

    code = "tile-separator"
    message = "tile lengths are separated by `x`, found {found}"
    hint = "write `tile 128 x K`"
    examples = (
        "gather A[M, K] over M { tile 128, K }",
        "gather A[M, K] over M { tile M, K }",
        "gather A[M, K] over M { tile 128 K }",
        "gather A[M, K] over M { tile (2), K }",
        "gather A[M, K] over M { tile M K }",
    )


class BadOperator(MappingSyntaxError):
    """An operator that maps do not have."""

    code = "bad-operator"
    message = "{found} is not an operator of maps"
    hint = "maps have `+ - * / %`, `min(a, b)`, `max(a, b)`; `/` already floors"
    examples = (
        "gather A[M] over M { owner m // 2 }",
        "gather A[M] over M { owner 3 // m }",
        "gather A[M] over M { owner m ** 2 }",
        "gather A[M] over M { owner m == 2 }",
        "gather A[M] over M { owner m < 2 }",
        "gather A[M] over M { owner 2 == m }",
        "gather A[M] over M { owner (m // 2) }",
        "gather A[M] over M { owner (m < 2) }",
        "gather A[M] over M { owner m & 2 }",
        "gather A[M] over M { owner m ^ 2 }",
    )


class NotAnInteger(MappingSyntaxError):
    """A number with a point in it."""

    code = "not-an-integer"
    message = "{found} is not a whole number"
    hint = "extents and maps are of whole numbers; `/` floors"
    examples = (
        "gather A[M] over M { owner m / 2.5 }",
        "gather A[M] over M { owner (m / 2.5) }",
        "gather A[M] over M { owner 2.5 * m }",
        "gather A[M] over M { tile 2.5 }",
        "gather A[M, K] over M { tile 2.5 x K }",
        "gather A[2.5, K] over K",
    )


class MissingOperand(MappingSyntaxError):
    """An operator or a parenthesis with nothing behind it."""

    code = "missing-operand"
    message = "expected a number, a name or `(`, found {found}"
    hint = "an operator stands between two expressions; there is no unary minus"
    examples = (
        "gather A[M] over M { owner m / }",
        "gather A[M] over M { owner m + }",
        "gather A[M] over M { owner m - * 2 }",
        "gather A[M] over M { owner m % }",
        "gather A[M] over M { owner m * -1 }",
        "gather A[M] over M { owner () }",
        "gather A[M] over M { owner min() }",
        "gather A[M] over M { owner min(1, ) }",
        "gather A[M * ] over M",
    )


class UnclosedParenthesis(MappingSyntaxError):
    """A parenthesis that is not closed, or a function with the wrong number of operands."""

    code = "unclosed-parenthesis"
    message = "expected `)` or an operator, found {found}"
    hint = "close the parenthesis; `min` and `max` take two operands"
    examples = (
        "gather A[M] over M { owner (m / 2 }",
        "gather A[M] over M { owner (m }",
        "gather A[M] over M { owner ((m) }",
        "gather A[M] over M { owner (m, 2) }",
        "gather A[M] over M { owner (2, m) }",
        "gather A[M] over M { owner min(m) }",
        "gather A[M] over M { owner min(2) }",
        "gather A[M] over M { owner min(m, 2, 3) }",
        "gather A[M] over M { owner min(m, m, 3) }",
        "gather A[M] over M { owner (m",
    )


class CallNotHere(MappingSyntaxError):
    """A call of something other than `min` and `max`."""

    code = "call-not-here"
    message = "maps call `min` and `max` only"
    hint = "a table is read with brackets: `owner owner_of[m]`"
    examples = (
        "gather A[M] over M { owner cdiv(m, 2) }",
        "gather A[M] over M { owner 2 + floor(m) }",
        "gather A[M] over M { owner (abs(m)) }",
    )


SYNTAX_MISTAKES: tuple[type[MappingSyntaxError], ...] = (
    UnknownStatement,
    MissingTensor,
    MissingShape,
    MissingExtent,
    UnclosedShape,
    MissingOver,
    OverWhat,
    MissingSum,
    SumNotHere,
    OverNotHere,
    IncompleteExchange,
    IncompleteCombine,
    BadMark,
    MissingSeparator,
    MissingComma,
    BlockNotHere,
    UnknownMap,
    UnclosedBlock,
    MissingMapValue,
    TileSeparator,
    BadOperator,
    NotAnInteger,
    MissingOperand,
    UnclosedParenthesis,
    CallNotHere,
)


class TensorTwice(MappingError):
    """A tensor that two statements place."""

    code = "tensor-twice"
    message = "`{tensor}` is already placed in line {line}"
    hint = (
        "a tensor has one place and one way to move; copy it into an intermediate to move it again"
    )


class OverNotADimension(MappingError):
    """`over` an extent that the tensor does not have."""

    code = "over-not-a-dimension"
    message = "`{over}` is not an axis of `{tensor}[{dims}]`"
    hint = "`over` takes one of its extents that is a single name: {choices}"


class OverTwice(MappingError):
    """`over` an extent that two axes of the tensor have."""

    code = "over-twice"
    message = "`{tensor}[{dims}]` has two axes `{over}`"
    hint = "give the axis that the ranks divide a name of its own"


class UnknownName(MappingError):
    """A name in an expression that is no extent, variable or constant."""

    code = "unknown-name"
    message = "`{name}` is not known in this {where}"
    hint = "{suggestion}"


class NotATable(MappingError):
    """Brackets behind an extent, a variable or a constant."""

    code = "not-a-table"
    message = "`{name}` is a number, not a table"
    hint = "`table[i]` reads an integer tensor argument of the kernel"


class RankInOwner(MappingError):
    """RANK where every rank must compute the same."""

    code = "rank-in-map"
    message = "this {where} depends on RANK, so the ranks would not agree"
    hint = (
        "it must mean the same on every rank: write the owner as a function of the element's index"
    )


class TileRank(MappingError):
    """A tile with more or fewer lengths than the tensor has axes."""

    code = "tile-rank"
    message = "the tile has {given} lengths, but `{tensor}[{dims}]` has {expected} axes"
    hint = "give one length an axis: `tile 128 x K`"


class MapTwice(MappingError):
    """The same map twice in one block."""

    code = "map-twice"
    message = "`{map}` is given twice"
    hint = "keep one of them"


class MapNotHere(MappingError):
    """A map that the statement has no use for."""

    code = "map-not-here"
    message = "`{map}` has no meaning for `{kind}`"
    hint = "{reason}"


class DynamicNotADimension(MappingError):
    """`NAME dynamic` for a name that is not an extent of the statement."""

    code = "dynamic-not-a-dimension"
    message = "`{name}` is not an extent of this statement"
    hint = "only an extent can be a run-time argument: {choices}"


class ReservedName(MappingError):
    """An extent or a tensor with a name that maps use for something else."""

    code = "reserved-name"
    message = "`{name}` cannot name {what}"
    hint = "{reason}"


class ShapeMismatch(MappingError):
    """Shapes of an exchange or a combine that do not fit together."""

    code = "shape-mismatch"
    message = "`{tensor}[{dims}]` should be `{tensor}[{expected}]`"
    hint = "{reason}"


class UnknownExchange(MappingError):
    """A combine from a tensor that no exchange fills."""

    code = "unknown-exchange"
    message = "no exchange of this mapping fills `{source}`"
    hint = "`from` names what an exchange wrote: `exchange X[T, H] by dest[T, k] into R[CAP, H], …`"


class ConstantDivisionByZero(MappingError):
    """A division by the constant 0."""

    code = "division-by-zero"
    message = "this divides by zero"
    hint = "divide by an extent, WORLD or a positive number"
