"""What the text of a user's function (``functions``) may call beside ``tl``: arithmetic as torch defines it."""

import triton
import triton.language as tl


@triton.jit
def index_on_axis(index, size):
    """An index counted from the end where it is negative, as in torch; of 64 bits only if the index or the size is."""
    return tl.where(index < 0, index + size, index)


@triton.jit
def is_on_axis(index, size):
    """Whether an index that :func:`index_on_axis` has returned lies on an axis of this size."""
    return (index >= 0) & (index < size)


@triton.jit
def divided_down(a, b):
    """The quotient of two integers, rounded down; Triton rounds towards zero, and its interpreter may not."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def rest(a, b):
    """What :func:`divided_down` leaves of ``a``, of the sign of ``b``."""
    left = a % b
    return tl.where((left != 0) & ((left < 0) != (b < 0)), left + b, left)


@triton.jit
def divided_to_zero(a, b):
    """The quotient of two integers, rounded towards zero."""
    down = divided_down(a, b)
    return tl.where((down < 0) & (down * b != a), down + 1, down)


@triton.jit
def round_to_even(x):
    """The nearest whole number, the even one of two that are as near."""
    down = tl.floor(x)
    rest = x - down
    is_odd = tl.floor(down * 0.5) * 2.0 != down
    return tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), down + 1.0, down)


@triton.jit
def log1p(x):
    """``log(1 + x)`` to float32's precision: the rounding of ``1 + x`` is made up for (Kahan)."""
    one_more = 1.0 + x
    is_exact = (one_more == 1.0) | (one_more == float("inf"))
    return tl.where(is_exact, x, tl.log(one_more) * (x / tl.where(is_exact, 1.0, one_more - 1.0)))


@triton.jit
def expm1(x):
    """``exp(x) - 1`` to float32's precision (Kahan)."""
    power = tl.exp(x)
    less = power - 1.0
    is_plain = (power == 1.0) | (less == -1.0) | (power == float("inf"))
    corrected = less * (x / tl.where(is_plain, 1.0, tl.log(power)))
    return tl.where(power == 1.0, x, tl.where(is_plain, less, corrected))


@triton.jit
def power(base, exponent):
    """``base ** exponent`` of floating numbers; of a negative base with a whole exponent, too. Both zeros are positive.

    Of a large result as many digits are lost as the logarithm has in front of its point.
    """
    magnitude = tl.exp2(exponent * tl.log2(tl.abs(base)))
    # the logarithm of 1 is 0, which times inf is NaN, though 1 to the power of inf is 1
    magnitude = tl.where((tl.abs(base) == 1.0) & (exponent == exponent), 1.0, magnitude)
    is_whole = tl.floor(exponent) == exponent
    is_odd = is_whole & (tl.floor(exponent * 0.5) * 2.0 != exponent)
    of_even = tl.where(is_whole | (base == -float("inf")), magnitude, float("nan"))
    found = tl.where(base < 0.0, tl.where(is_odd, -magnitude, of_even), magnitude)
    return tl.where((exponent == 0.0) | (base == 1.0), 1.0, found)
