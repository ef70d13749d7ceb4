"""Tile IR: one immutable node shape, integer expressions, and a text form that round-trips."""

from tilelink.ir.expr import Expr, binary, minimum
from tilelink.ir.instance import dynamic_extents
from tilelink.ir.node import All, At, Block, Broadcast, Index, Op, Range, Ref, Value, make, rewrite
from tilelink.ir.text import op_line, parse_ir, print_ir
from tilelink.ir.types import DTYPES, FLOATS, INDEX, INTEGERS, TILE, Type, promote

__all__ = [
    "DTYPES",
    "FLOATS",
    "INDEX",
    "INTEGERS",
    "TILE",
    "All",
    "At",
    "Block",
    "Broadcast",
    "Expr",
    "Index",
    "Op",
    "Range",
    "Ref",
    "Type",
    "Value",
    "binary",
    "dynamic_extents",
    "make",
    "minimum",
    "op_line",
    "parse_ir",
    "print_ir",
    "promote",
    "rewrite",
]
