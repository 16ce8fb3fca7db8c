"""What a set of scan orders is: `Routes`, and the digits that describe the regular ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

GHOST = -1  # step of no token: nothing is read or written, the state decays
SKIP = -2  # step that does not take place: an exact no-op


class Digit(NamedTuple):
    """One digit of a step's number, see `DigitRoute`."""

    n: int
    stride: int
    flip: bool = False
    snake: bool = False


class DigitRoute(NamedTuple):
    r"""A regular route: the token of a step follows from the digits of the step's number.

    With T the product of the sizes n, step t (or T - 1 - t if ``rev``) is written in the mixed
    radix of the digits, the outermost first. Digit c of size n counts down instead of up,
    e = n - 1 - c, if ``flip``, and if ``snake`` every other time round (when the number made of the
    digits outside of it is odd; both at once cancel). The token is base + sum of stride * e.
    """

    digits: tuple[Digit, ...]
    base: int = 0
    rev: bool = False

    @property
    def steps(self) -> int:
        return prod(digit.n for digit in self.digits)

    def index(self) -> Tensor:
        """Token of every step, (steps), int64."""
        t = torch.arange(self.steps, device="cpu")
        if self.rev:
            t = t.flip(0)
        token = torch.full_like(t, self.base)
        inner = self.steps
        for n, stride, flip, snake in self.digits:
            if inner == 0:
                break
            outside, inner = inner, inner // n
            c = t // inner % n
            down = (t // outside % 2 == 1) & snake
            token += stride * torch.where(down ^ flip, n - 1 - c, c)
        return token


class Routes:
    """K orders in which a scan visits L tokens, T steps each. Immutable, and hashable by value.

    Build one with the functions of `statescan.routes`, from digits, or from any index table. The
    operators that take a `Routes` also take a plain int32 or int64 tensor, (K, T), or (B, K, T)
    for orders of each sample.

    Attributes:
        length: L, the number of tokens that the routes address.
        count: K, the number of routes.
        steps: T, the number of steps of each.
        index: token visited at step t of route k, (K, T), int32, on the CPU; `GHOST` and `SKIP` for
            steps of no token. Not to be written to.
        digits: a `DigitRoute` for each route, or None where there is no such description (of any).
        flat_digits: the digits as the operators hand them to the kernels: for each route base, rev
            and the number of digits, then n, stride, flip and snake of each. Empty without digits.
        reset_period: the state starts anew every so many steps; 0 for never.
        carry: the routes make one sequence: the state after the last step of route k is the one
            before the first step of route k + 1 (of the first route: the initial state).
    """

    __slots__ = (
        "_hash", "_inverse", "_on_device", "carry", "count", "digits", "flat_digits", "index",
        "length", "reset_period", "steps",
    )  # fmt: skip

    length: int
    count: int
    steps: int
    index: Tensor
    digits: tuple[DigitRoute, ...] | None
    flat_digits: tuple[int, ...]
    reset_period: int
    carry: bool

    def __init__(
        self,
        length: int,
        index: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        digits: Iterable[DigitRoute] | None = None,
        reset_period: int = 0,
        carry: bool = False,
    ):
        """Give one of ``index`` and ``digits``.

        Args:
            length: number of tokens.
            index: token of every step, (K, T) or (T); -1 is a ghost step (the state decays, nothing
                is read or written), -2 a step to skip.
            digits: one `DigitRoute` for each route, all with the same number of steps.

        Raises:
            ValueError: if a token lies outside 0 .. length - 1, or sizes do not agree.
        """
        if (index is None) == (digits is None):
            raise ValueError("give either index or digits")
        if digits is not None:
            digits = tuple(DigitRoute(tuple(map(Digit._make, d)), *rest) for d, *rest in digits)
            steps = {route.steps for route in digits}
            if len(steps) > 1:
                raise ValueError(f"routes must have the same number of steps, got {sorted(steps)}")
            tables = [route.index() for route in digits]
            index = torch.stack(tables) if tables else torch.empty(0, 0, device="cpu")
        table = torch.as_tensor(index, device="cpu")
        table = table[None] if table.dim() == 1 else table
        if table.dim() != 2:
            raise ValueError(f"index must have shape (K, T) or (T), got {list(table.shape)}")
        if table.is_floating_point() and table.numel():
            raise ValueError(f"index must hold integers, got {table.dtype}")
        if table.numel() and not (int(table.min()) >= SKIP and int(table.max()) < length):
            raise ValueError(
                f"index must be -2, -1 or a token in 0 .. {length - 1}, got values from "
                f"{int(table.min())} to {int(table.max())}"
            )
        count, steps = table.shape
        if reset_period < 0 or (reset_period and steps % reset_period):
            raise ValueError(f"reset_period must divide the {steps} steps, got {reset_period}")
        table = table.to(torch.int32).contiguous().clone()
        put = object.__setattr__
        put(self, "length", int(length))
        put(self, "count", count)
        put(self, "steps", steps)
        put(self, "digits", digits)
        put(self, "reset_period", int(reset_period))
        put(self, "carry", bool(carry))
        put(self, "flat_digits", tuple(_flat(digits or ())))
        put(self, "index", table)
        put(self, "_on_device", {torch.device("cpu"): table})
        put(self, "_inverse", {})
        put(self, "_hash", hash((length, reset_period, carry, count, _checksum(table))))

    def __setattr__(self, name, value):
        raise AttributeError("Routes are immutable")

    def __reduce__(self):
        options = {"reset_period": self.reset_period, "carry": self.carry}
        return _restore, (self.length, self.index.tolist(), self.count, self.digits, options)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        """Same tokens in the same order, reset and carried alike; however it is described."""
        if not isinstance(other, Routes):
            return NotImplemented
        same = ("length", "count", "steps", "reset_period", "carry")
        return all(getattr(self, a) == getattr(other, a) for a in same) and torch.equal(
            self.index, other.index
        )

    def __repr__(self) -> str:
        extra = f", reset_period={self.reset_period}" if self.reset_period else ""
        extra += ", carry=True" if self.carry else ""
        kind = "table" if self.digits is None else "digits"
        return f"Routes(length={self.length}, K={self.count}, T={self.steps}, {kind}{extra})"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int | slice) -> Routes:
        """Route k, or a slice of the routes, as Routes."""
        chosen = slice(k, k + 1 or None) if isinstance(k, int) else k
        if isinstance(k, int) and not -self.count <= k < self.count:
            raise IndexError(f"route {k} of {self.count}")
        return self._with(self.index[chosen], self.digits and self.digits[chosen])

    # ---- Tables

    def index_on(self, device: torch.device | str) -> Tensor:
        """`index` on a device, copied there once."""
        return _cached(self._on_device, device, self.index)

    @property
    def inverse(self) -> Tensor:
        """Step at which route k visits a token, (K, L), int32, on the CPU; -1 if it does not.

        Raises:
            ValueError: if a route visits a token twice.
        """
        return self.inverse_on("cpu")

    def inverse_on(self, device: torch.device | str) -> Tensor:
        """`inverse` on a device."""
        cpu = torch.device("cpu")
        if cpu not in self._inverse:
            if (self._visits(each=True) > 1).any():
                raise ValueError("a route visits a token twice: there is no inverse")
            table = torch.full((self.count, self.length), -1, dtype=torch.int32, device="cpu")
            k, t = torch.nonzero(self.index >= 0, as_tuple=True)
            table[k, self.index[k, t].long()] = t.int()
            self._inverse[cpu] = table
        return _cached(self._inverse, device, self._inverse[cpu])

    def _visits(self, each: bool) -> Tensor:
        """How often every token is visited, by each route or by all together."""
        rows, row_length = (self.count, self.length) if each else (1, 0)
        k = torch.arange(self.count, device="cpu")[:, None]
        visited = (self.index + k * row_length)[self.index >= 0]
        return torch.bincount(visited, minlength=rows * self.length)

    @property
    def is_permutation(self) -> bool:
        """Every route visits every token exactly once, with no other steps."""
        if self.steps != self.length:
            return False
        return bool((self._visits(each=True) == 1).all())

    @property
    def partition(self) -> bool:
        """The routes are disjoint and cover the tokens: every token is visited exactly once, by one
        of them. Ghost steps may come between."""
        return bool((self._visits(each=False) == 1).all())

    # ---- New routes from old

    def reversed(self) -> Routes:
        """Every route backwards."""
        digits = self.digits and tuple(r._replace(rev=not r.rev) for r in self.digits)
        return self._with(self.index.flip(1), digits)

    def with_reset(self, reset_period: int) -> Routes:
        """The same orders, the state starting anew every so many steps."""
        return self._with(self.index, self.digits, reset_period=reset_period)

    def with_carry(self, carry: bool = True) -> Routes:
        """The same orders as one sequence, see `carry`."""
        return self._with(self.index, self.digits, carry=carry)

    def _with(
        self, index: Tensor, digits: tuple[DigitRoute, ...] | None, **changes: int | bool
    ) -> Routes:
        options = {"reset_period": self.reset_period, "carry": self.carry} | changes
        return Routes(self.length, index if digits is None else None, digits=digits, **options)


def stack(*routes: Routes, pad: int | None = None) -> Routes:
    """One set of all these routes, in this order.

    Args:
        pad: shorter routes are continued to the longest with this: `GHOST` (as LocalMamba does) or
            `SKIP`. By default they must have the same number of steps.

    Raises:
        ValueError: if they address different numbers of tokens, differ in length and ``pad`` is
            None, or differ in their resets.
    """
    length, reset_period, carry = _common(routes)
    longest = max(r.steps for r in routes)
    if all(r.steps == longest for r in routes):
        if all(r.digits is not None for r in routes):
            digits = [d for r in routes for d in r.digits or ()]
            return Routes(length, digits=digits, reset_period=reset_period, carry=carry)
    elif pad not in (GHOST, SKIP):
        steps = [r.steps for r in routes]
        raise ValueError(f"routes have {steps} steps: say how to pad them, GHOST or SKIP")
    padded = [torch.nn.functional.pad(r.index, (0, longest - r.steps), value=pad) for r in routes]
    return Routes(length, torch.cat(padded), reset_period=reset_period, carry=carry)


def concat(*routes: Routes) -> Routes:
    """One route (K = 1) that follows all these routes, and all routes of each, end to end: the
    state flows from the end of one into the beginning of the next.

    Raises:
        ValueError: if they address different numbers of tokens or differ in their resets.
    """
    length, reset_period, _ = _common(routes)
    if len(routes) == 1 and routes[0].count == 1:
        return routes[0]
    index = torch.cat([r.index.reshape(-1) for r in routes])
    return Routes(length, index[None], reset_period=reset_period)


def _common(routes: tuple[Routes, ...]) -> tuple[int, int, bool]:
    if not routes:
        raise ValueError("give at least one Routes")
    for name in ("length", "reset_period", "carry"):
        values = [getattr(r, name) for r in routes]
        if len(set(values)) > 1:
            raise ValueError(f"routes must agree in their {name}, got {values}")
    return routes[0].length, routes[0].reset_period, routes[0].carry


def _cached(tables: dict[torch.device, Tensor], device: torch.device | str, cpu: Tensor) -> Tensor:
    device = torch.device(device)
    if device not in tables:
        tables[device] = cpu.to(device)
    return tables[device]


def _flat(digits: Iterable[DigitRoute]) -> Iterable[int]:
    for route in digits:
        yield from (route.base, int(route.rev), len(route.digits))
        for digit in route.digits:
            yield from map(int, digit)


def _checksum(table: Tensor) -> int:
    place = torch.arange(1, table.numel() + 1, device="cpu")
    return int((table.reshape(-1) * (place * 0x9E3779B1)).sum())


def _restore(length, index, count, digits, options) -> Routes:
    if digits is not None:
        return Routes(length, digits=digits, **options)
    table = torch.tensor(index, dtype=torch.int32, device="cpu").reshape(count, -1)
    return Routes(length, table, **options)
