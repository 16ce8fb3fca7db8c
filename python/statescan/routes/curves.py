"""Orders that no digits describe: tables, from their geometric definitions.

Tokens of an H x W map are numbered row by row: token (i, j) is i * W + j.
"""

from __future__ import annotations


def diagonal(H: int, W: int) -> list[int]:
    """The zigzag of JPEG: one anti-diagonal after the other, upwards on the even ones."""
    order = []
    for s in range(H + W - 1):
        rows = range(max(0, s - W + 1), min(H, s + 1))
        order += [i * W + s - i for i in (reversed(rows) if s % 2 == 0 else rows)]
    return order


def spiral(H: int, W: int) -> list[int]:
    """Clockwise rings from (0, 0) inwards."""
    order = []
    top, bottom, left, right = 0, H - 1, 0, W - 1
    while top <= bottom and left <= right:
        order += [top * W + j for j in range(left, right + 1)]
        order += [i * W + right for i in range(top + 1, bottom + 1)]
        if top < bottom and left < right:
            order += [bottom * W + j for j in range(right - 1, left - 1, -1)]
            order += [i * W + left for i in range(bottom - 1, top, -1)]
        top, bottom, left, right = top + 1, bottom - 1, left + 1, right - 1
    return order


def mirrored(order: list[int], W: int) -> list[int]:
    """The same curve with left and right exchanged."""
    return [token // W * W + W - 1 - token % W for token in order]


def hilbert(H: int, W: int) -> list[int]:
    """A Hilbert curve for any rectangle: from (0, 0) along the longer side to its other end.

    A rectangle is walked from one corner to the other end of its `along` side. A long one is cut in
    two, one behind the other. Otherwise it is walked in three parts: away from the side through the
    first half of it, along the far half, and back through the second half; halves are chosen even,
    so that the parts meet, whenever there is an even half.
    """
    order: list[int] = []
    if H > 0 and W > 0:
        sides = ((0, 1), W), ((1, 0), H)
        along, across = sides if W >= H else sides[::-1]
        _walk((0, 0), along, across, W, order)
    return order


_Side = tuple[tuple[int, int], int]  # direction (rows, columns) and number of tokens


def _walk(at: tuple[int, int], along: _Side, across: _Side, W: int, order: list[int]) -> None:
    (u, a), (v, b) = along, across
    if a == 1 or b == 1:
        step = u if b == 1 else v
        order += [(at[0] + i * step[0]) * W + at[1] + i * step[1] for i in range(max(a, b))]
        return
    half = a // 2
    if 2 * a > 3 * b:
        half += half % 2 if a > 2 else 0
        _walk(at, (u, half), across, W, order)
        _walk(_moved(at, u, half), (u, a - half), across, W, order)
        return
    far = b // 2
    far += far % 2 if b > 2 else 0
    back = (-v[0], -v[1])
    _walk(at, (v, far), (u, half), W, order)
    _walk(_moved(at, v, far), along, (v, b - far), W, order)
    end = _moved(_moved(at, u, a - 1), v, far - 1)
    _walk(end, (back, far), ((-u[0], -u[1]), a - half), W, order)


def _moved(at: tuple[int, int], step: tuple[int, int], times: int) -> tuple[int, int]:
    return at[0] + times * step[0], at[1] + times * step[1]
