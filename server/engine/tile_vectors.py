"""Vector instructions over tiles of 16 rows, as functions that numba can call: its own loops do not reach them.

Codes of a tile are byte-major: one load takes one byte of each of its 16 rows, so that no sum runs across a vector
until the very end. All functions take addresses and sizes as six int64, 0 where one has no use for them; addresses
are the caller's to check. Imported only where a compressing policy is served, as it loads the compiler.
"""

# Letters: NQ queries handled at once, R = 16 rows of a tile, n = all rows of a head, D head dimension.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from swarm.kvpolicy.row_codecs import level_polynomial

__all__ = [
    "ROWS",
    "exp2_rows",
    "halves_to_floats",
    "score_codes",
    "score_halves",
    "spread_scales",
    "sum_codes",
    "sum_halves",
]

ROWS: Final = 16
"""Rows of a tile, and lanes of a vector; the compiler splits it where registers are narrower."""
_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FAST = ("fast",)
_EXP2 = (1.0, 0.693147182, 0.240226462, 0.0555032472, 0.00961843737, 0.00133929, 0.000154035)
"""2 ** x for x in -0.5..0.5, to a few float32 roundings."""


class _Vectors:
    """Shorthands over the compiler's instruction builder, for vectors of `width` numbers."""

    def __init__(self, builder: Any, width: int = ROWS) -> None:
        self.builder = builder
        self.width = width
        self.floats = ir.VectorType(_F32, width)
        self.ints = ir.VectorType(_I32, width)

    def const(self, value: float) -> Any:
        return ir.Constant(self.floats, [value] * self.width)

    def const_int(self, value: int) -> Any:
        return ir.Constant(self.ints, [value] * self.width)

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(self.floats, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, _I32(0))
        return self.builder.shuffle_vector(one, undefined, self.const_int(0))

    def load(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def load_floats(self, address: Any) -> Any:
        return self.load(address, self.floats)

    def load_ints(self, address: Any, bits: Any) -> Any:
        return self.builder.zext(self.load(address, ir.VectorType(bits, self.width)), self.ints)

    def load_splat(self, address: Any) -> Any:
        return self.splat(self.load(address, _F32))

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def add(self, left: Any, right: Any) -> Any:
        return self.builder.fadd(left, right, flags=_FAST)

    def mul(self, left: Any, right: Any) -> Any:
        return self.builder.fmul(left, right, flags=_FAST)

    def add_to(self, total: Any, left: Any, right: Any) -> None:
        """total += left * right, where total is a variable."""
        self.builder.store(self.add(self.builder.load(total), self.mul(left, right)), total)

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        value = self.const(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = self.add(self.mul(value, x), self.const(coefficient))
        return value

    def levels(self, packed: Any, width: int) -> list[Any]:
        """The levels of the codes of `width` bits in packed bytes, lowest bits first."""
        coefficients = level_polynomial(width)
        found = []
        for lane in range(8 // width):
            codes = self.builder.lshr(packed, self.const_int(lane * width)) if lane else packed
            codes = self.builder.and_(codes, self.const_int((1 << width) - 1))
            x = self.add(self.builder.sitofp(codes, self.floats), self.const(-((1 << width) - 1) / 2))
            found.append(self.mul(x, self.polynomial(self.mul(x, x), coefficients)))
        return found

    def half(self, bits: Any, kind: str) -> Any:
        """float16 or bfloat16 bits in the low halves of ints."""
        builder = self.builder
        if kind == "bfloat16":
            return builder.bitcast(builder.shl(bits, self.const_int(16)), self.floats)
        sign = builder.shl(builder.and_(bits, self.const_int(0x8000)), self.const_int(16))
        rest = builder.shl(builder.and_(bits, self.const_int(0x7FFF)), self.const_int(13))
        # The exponents' biases differ by 112; as a product it is right for subnormal numbers, too.
        size = builder.fmul(builder.bitcast(rest, self.floats), self.const(2.0**112))
        return builder.bitcast(builder.or_(builder.bitcast(size, self.ints), sign), self.floats)

    def exp2(self, x: Any) -> Any:
        """2 ** x for x up to 126; next to nothing below -126."""
        builder = self.builder
        lowest = self.const(-126.0)
        x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
        # Rounded by way of integers: fast arithmetic would undo adding and taking away a large number.
        raised = builder.fptosi(builder.fadd(x, self.const(127.5)), self.ints)
        whole = builder.sub(raised, self.const_int(127))
        power = self.polynomial(builder.fsub(x, builder.sitofp(whole, self.floats)), _EXP2)
        exponent = builder.shl(whole, self.const_int(23))
        return builder.bitcast(builder.add(builder.bitcast(power, self.ints), exponent), self.floats)

    def sum(self, vector: Any) -> Any:
        """Over all lanes."""
        width = self.width
        while width > 1:
            width //= 2
            kind = ir.VectorType(_I32, width)
            low = self.builder.shuffle_vector(vector, vector, ir.Constant(kind, list(range(width))))
            high = self.builder.shuffle_vector(vector, vector, ir.Constant(kind, list(range(width, 2 * width))))
            vector = self.add(low, high)
        return self.builder.extract_element(vector, _I32(0))

    def variables(self, count: int) -> list[Any]:
        """0 at first; the compiler keeps them in registers."""
        alloca: Any = cgutils.alloca_once
        made = [alloca(self.builder, self.floats) for _ in range(count)]
        for variable in made:
            self.builder.store(self.const(0.0), variable)
        return made


def _at(builder: Any, base: Any, *terms: tuple[Any, int]) -> Any:
    """base + the sum of index * size."""
    for index, size in terms:
        base = builder.add(base, builder.mul(index, _I64(size)))
    return base


def _function(build: Callable[..., None]) -> Any:
    """A function of six int64 that numba puts in place as the instructions `build` writes."""

    @intrinsic
    def primitive(typingctx: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            build(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return primitive


def score_codes(width: int, num_queries: int) -> Any:
    """f(codes, num_bytes, queries, queries' stride, scores, _): scores [NQ, R] += queries . levels of one plane.

    `codes` is a tile's byte column with which the plane begins, `queries` the first coordinate of the plane.
    """

    def build(builder: Any, codes: Any, num_bytes: Any, queries: Any, stride: Any, scores: Any, _: Any) -> None:
        v = _Vectors(builder)
        totals = v.variables(num_queries)
        with cgutils.for_range(builder, num_bytes) as loop:
            levels = v.levels(v.load_ints(_at(builder, codes, (loop.index, ROWS)), _I8), width)
            for lane, numbers in enumerate(levels):
                first = _at(builder, queries, (loop.index, 4), (builder.mul(num_bytes, _I64(lane)), 4))
                for query, total in enumerate(totals):
                    v.add_to(total, v.load_splat(_at(builder, first, (stride, query))), numbers)
        for query, total in enumerate(totals):
            place = _at(builder, scores, (_I64(query), 4 * ROWS))
            v.store(v.add(v.load_floats(place), builder.load(total)), place)

    return _function(build)


def score_halves(kind: str, num_queries: int) -> Any:
    """As `score_codes` for rows of 16-bit numbers: f(codes, D, queries, queries' stride, scores, _)."""

    def build(builder: Any, codes: Any, dim: Any, queries: Any, stride: Any, scores: Any, _: Any) -> None:
        v = _Vectors(builder)
        totals = v.variables(num_queries)
        with cgutils.for_range(builder, dim) as loop:
            numbers = _half_column(v, _at(builder, codes, (loop.index, 2 * ROWS)), kind)
            first = _at(builder, queries, (loop.index, 4))
            for query, total in enumerate(totals):
                v.add_to(total, v.load_splat(_at(builder, first, (stride, query))), numbers)
        for query, total in enumerate(totals):
            place = _at(builder, scores, (_I64(query), 4 * ROWS))
            v.store(v.add(v.load_floats(place), builder.load(total)), place)

    return _function(build)


def _half_column(v: _Vectors, address: Any, kind: str) -> Any:
    low = v.load_ints(address, _I8)
    high = v.load_ints(v.builder.add(address, _I64(ROWS)), _I8)
    return v.half(v.builder.or_(low, v.builder.shl(high, v.const_int(8))), kind)


def _sum_column(num_queries: int, num_lanes: int, decode: Callable[[_Vectors, Any], list[Any]]) -> Any:
    """f(tiles, num_tiles, column, weights, weights' stride, sums): sums [lanes, NQ] = weights . one byte column.

    `tiles` are addresses [num_tiles] of tiles, `column` the offset within each, `weights` [NQ, n].
    """

    def build(builder: Any, tiles: Any, count: Any, column: Any, weights: Any, stride: Any, sums: Any) -> None:
        v = _Vectors(builder)
        totals = v.variables(num_queries * num_lanes)
        with cgutils.for_range(builder, count) as loop:
            tile = v.load(_at(builder, tiles, (loop.index, 8)), _I64)
            lanes = decode(v, builder.add(tile, column))
            first = _at(builder, weights, (loop.index, 4 * ROWS))
            for query in range(num_queries):
                shares = v.load_floats(_at(builder, first, (stride, query)))
                for lane, numbers in enumerate(lanes):
                    v.add_to(totals[lane * num_queries + query], shares, numbers)
        for index, total in enumerate(totals):
            v.store(v.sum(builder.load(total)), _at(builder, sums, (_I64(index), 4)))

    return _function(build)


def sum_codes(width: int, num_queries: int) -> Any:
    """Weighted sums of the levels in one byte column of codes of `width` bits; see _sum_column."""
    return _sum_column(num_queries, 8 // width, lambda v, address: v.levels(v.load_ints(address, _I8), width))


def sum_halves(kind: str, num_queries: int) -> Any:
    """Weighted sums of one column of 16-bit numbers; see _sum_column."""
    return _sum_column(num_queries, 1, lambda v, address: [_half_column(v, address, kind)])


def _build_scales(builder: Any, codes: Any, factors: Any, count: Any, result: Any, _: Any, __: Any) -> None:
    v = _Vectors(builder)
    steps = builder.sitofp(v.load_ints(codes, _I8), v.floats)
    scales = v.exp2(v.mul(v.add(steps, v.const(-160.0)), v.const(1 / 16)))
    v.store(scales, result)


spread_scales = _function(_build_scales)
"""f(codes, _, _, result, _, _): 16 scale codes to float32 [R]."""


def _build_exp2(builder: Any, numbers: Any, count: Any, largest: Any, total: Any, _: Any, __: Any) -> None:
    v = _Vectors(builder)
    totals = v.variables(1)
    most = v.load_splat(largest)
    with cgutils.for_range(builder, count) as loop:
        place = _at(builder, numbers, (loop.index, 4 * ROWS))
        powers = v.exp2(builder.fsub(v.load_floats(place), most))
        v.store(powers, place)
        v.add_to(totals[0], powers, v.const(1.0))
    v.store(v.sum(builder.load(totals[0])), total)


exp2_rows = _function(_build_exp2)
"""f(numbers, count, largest, total, _, _): 2 ** (number - largest) in place for 16 * count numbers; also their sum."""


def halves_to_floats(kind: str, width: int) -> Any:
    """f(halves, floats, count, _, _, _): `width` * count 16-bit numbers to float32."""

    def build(builder: Any, halves: Any, floats: Any, count: Any, _: Any, __: Any, ___: Any) -> None:
        v = _Vectors(builder, width)
        with cgutils.for_range(builder, count) as loop:
            bits = v.load_ints(_at(builder, halves, (loop.index, 2 * width)), _I16)
            v.store(v.half(bits, kind), _at(builder, floats, (loop.index, 4 * width)))

    return _function(build)
