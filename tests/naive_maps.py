"""Plain torch for scans of maps: loops over the tokens of each route, from the formulas."""

import itertools

import torch
import torch.nn.functional as F
from naive import layer_norm, selective_scan

# ---- Orders of the tokens (i, j) of a map; None is a step of padding


def by_rows(H, W):
    return [(i, j) for i in range(H) for j in range(W)]


def by_columns(H, W):
    return [(i, j) for j in range(W) for i in range(H)]


def cross(H, W):
    rows, columns = by_rows(H, W), by_columns(H, W)
    return [rows, columns, rows[::-1], columns[::-1]]


def serpentine(H, W, axis="row", up=False, left=False):
    """Lines there and back, from the bottom if `up`, from the right if `left`."""
    rows = list(range(H))[:: -1 if up else 1]
    columns = list(range(W))[:: -1 if left else 1]
    if axis == "row":
        return [(i, j) for n, i in enumerate(rows) for j in columns[:: -1 if n % 2 else 1]]
    return [(i, j) for n, j in enumerate(columns) for i in rows[:: -1 if n % 2 else 1]]


def windows(H, W, size):
    """Windows one after the other; where they leave the map there is padding."""
    return [
        (i, j) if i < H and j < W else None
        for top in range(0, H, size)
        for left in range(0, W, size)
        for i in range(top, top + size)
        for j in range(left, left + size)
    ]


def atrous(H, W):
    """EfficientVMamba's four sub-grids of step 2, of the map padded to even sides."""
    high, wide = H + H % 2, W + W % 2

    def grid(top, left, columns):
        rows, cols = range(top, high, 2), range(left, wide, 2)
        pairs = (
            [(i, j) for j in cols for i in rows]
            if columns
            else [(i, j) for i in rows for j in cols]
        )
        return [(i, j) if i < H and j < W else None for i, j in pairs]

    return [grid(0, 0, False), grid(1, 0, True), grid(0, 1, False), grid(1, 1, True)]


def gather(x, order):
    """(batch, H, W, dim) -> (batch, step, dim)."""
    zero = torch.zeros_like(x[:, 0, 0])
    return torch.stack([zero if place is None else x[:, place[0], place[1]] for place in order], 1)


def scatter(y, order, H, W):
    """Every step added to its token."""
    cells = [[torch.zeros_like(y[:, 0]) for _ in range(W)] for _ in range(H)]
    for t, place in enumerate(order):
        if place is not None:
            cells[place[0]][place[1]] = cells[place[0]][place[1]] + y[:, t]
    return torch.stack([torch.stack(row, 1) for row in cells], 1)


# ---- VMamba


def route_scan(p, x, order, k, prefix=""):
    """The scan of the tokens of one order, with the parameters number k: (batch, step, dim)."""
    weight, dt_weight = p[prefix + "x_proj_weight"][k], p[prefix + "dt_projs_weight"][k]
    dim, rank = dt_weight.shape
    A = -torch.exp(p[prefix + "A_logs"].unflatten(0, (-1, dim))[k])
    D = p[prefix + "Ds"].unflatten(0, (-1, dim))[k]
    seq = gather(x, order)
    dt, B, C = (seq @ weight.T).split([rank, A.shape[1], A.shape[1]], -1)
    delta = F.softplus(dt @ dt_weight.T + p[prefix + "dt_projs_bias"][k])
    return selective_scan(seq, delta, A, B, C, D)[0]


def routed(p, x, orders, prefix=""):
    """Every order with its parameters (or all with the only ones), apart, (batch, K, H, W, dim)."""
    shared = len(p[prefix + "x_proj_weight"]) == 1
    return torch.stack(
        [
            scatter(route_scan(p, x, order, 0 if shared else k, prefix), order, *x.shape[1:3])
            for k, order in enumerate(orders)
        ],
        1,
    )


def depthwise(x, weight, bias=None, stride=1):
    """2-D convolution of every channel, (batch, H, W, dim)."""
    y = F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, stride, weight.shape[-1] // 2, groups=len(weight)
    )
    return y.permute(0, 2, 3, 1)


def vss(p, x, mix, gate=True, prefix=""):
    """VMamba's block around mix(x): in_proj, convolution, SiLU, mix, layer norm, gate, out_proj."""
    q = {name[len(prefix) :]: value for name, value in p.items() if name.startswith(prefix)}
    x = F.linear(x, q["in_proj.weight"], q.get("in_proj.bias"))
    x, z = x.chunk(2, -1) if gate else (x, None)
    x = F.silu(depthwise(x, q["conv2d.weight"], q.get("conv2d.bias")))
    y = layer_norm(mix(q, x), q["out_norm.weight"], q["out_norm.bias"])
    return F.linear(y * F.silu(z) if gate else y, q["out_proj.weight"], q.get("out_proj.bias"))


def ss2d(p, x, orders=cross, gate=True, prefix=""):
    """SS2D with a set of orders that are summed."""

    def mix(q, x):
        return routed(q, x, orders(*x.shape[1:3])).sum(1)

    return vss(p, x, mix, gate, prefix)


def sra(y, threshold=0.0):
    """MHS-VM's merge of (batch, K, ...)."""
    mean = (y - y.min(1, keepdim=True).values).mean(1)
    spread = ((y - y.mean(1, keepdim=True)).square().sum(1) / (y.shape[1] - 1)).sqrt()
    return y.sum(1) * F.relu(spread / (mean + 1e-5) - threshold)


def snake(H, W):
    """LaMamba-Diff: rows from the top left and the bottom left, columns from the bottom left and
    the bottom right."""
    return [
        serpentine(H, W),
        serpentine(H, W, up=True),
        serpentine(H, W, "column", up=True),
        serpentine(H, W, "column", up=True, left=True),
    ]


def local(H, W):
    """h, v_flip, w7, w2_flip; all as long as the longest, the end filled with padding."""
    orders = [by_rows(H, W), by_columns(H, W)[::-1], windows(H, W, 7), windows(H, W, 2)[::-1]]
    longest = max(map(len, orders))
    return [order + [None] * (longest - len(order)) for order in orders]


# ---- MSVMamba


def chained(p, x, part):
    """Backwards, columns, columns backwards as one sequence: every visit of a token, normed."""
    H, W = x.shape[1:3]
    order = by_rows(H, W)[::-1] + by_columns(H, W) + by_columns(H, W)[::-1]
    return normed_visits(p, x, order, part)


def normed_visits(p, x, order, part):
    weight, dt_weight = p["x_proj_weight"][part], p["dt_projs_weight"][part]
    dim, rank = dt_weight.shape
    rows = slice(part * dim, (part + 1) * dim)
    A = -torch.exp(p["A_logs"][rows])
    seq = gather(x, order)
    dt, B, C = (seq @ weight.T).split([rank, A.shape[1], A.shape[1]], -1)
    delta = F.softplus(dt @ dt_weight.T + p["dt_projs_bias"][part])
    y, _ = selective_scan(seq, delta, A, B, C, p["Ds"][rows])
    y = layer_norm(y, p["out_norm.weight"], p["out_norm.bias"])
    return scatter(y, order, *x.shape[1:3])


def multi_scale(p, x, se=None):
    H, W = x.shape[1:3]
    x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    small = F.silu(depthwise(x, p["conv2d_b1.weight"], p["conv2d_b1.bias"], stride=2))
    x = F.silu(depthwise(x, p["conv2d.weight"], p["conv2d.bias"]))
    y = normed_visits(p, x, by_rows(H, W), 1)
    y_small = chained(p, small, 0).permute(0, 3, 1, 2)
    y = y + F.interpolate(y_small, (H, W), mode="bilinear").permute(0, 2, 3, 1)
    y = y if se is None else y * se(y)
    return (y * F.silu(z)) @ p["out_proj.weight"].T


# ---- MHS-VM


def diagonals(H, W, mirror):
    """Anti-diagonals there and back, upwards first."""
    order = []
    for s in range(H + W - 1):
        line = [(i, s - i) for i in range(H) if 0 <= s - i < W]
        order += line[::-1] if s % 2 == 0 else line
    return [(i, W - 1 - j) for i, j in order] if mirror else order


def spiral(H, W, mirror):
    """Rings: as far as one can, then turn right."""
    left, order, place, way = set(by_rows(H, W)), [], (0, 0), (0, 1)
    while left:
        order.append(place)
        left.discard(place)
        ahead = (place[0] + way[0], place[1] + way[1])
        if ahead not in left:
            way = (way[1], -way[0])
            ahead = (place[0] + way[0], place[1] + way[1])
        place = ahead
    return [(i, W - 1 - j) for i, j in order] if mirror else order


CURVES = {
    "C": lambda H, W: (serpentine(H, W), serpentine(H, W, "column")),
    "X": lambda H, W: (diagonals(H, W, False), diagonals(H, W, True)),
    "S": lambda H, W: (spiral(H, W, False), spiral(H, W, True)),
    "Z": lambda H, W: (by_rows(H, W), by_columns(H, W)),
}


def multi_head(p, x, prefix="", threshold=0.0):
    parts = (x @ p[prefix + "x_ssproj.weight"].T).chunk(
        3 + (prefix + "scanhead_Z.mambaeng.Ds" in p), -1
    )
    y = []
    for part, (family, curves) in zip(parts, CURVES.items(), strict=False):
        first, second = curves(*x.shape[1:3])
        orders = [first, first[::-1], second, second[::-1]]
        y.append(sra(routed(p, part, orders, f"{prefix}scanhead_{family}.mambaeng."), threshold))
    y = torch.cat(y, -1)
    if prefix + "y_proj.weight" not in p:
        return y
    y = layer_norm(y, p[prefix + "cat_norm.weight"], p[prefix + "cat_norm.bias"])
    return y @ p[prefix + "y_proj.weight"].T


# ---- PlainMamba


def plain_orders(H, W):
    rows, columns = serpentine(H, W), serpentine(H, W, "column")
    return [rows, rows[::-1], columns, columns[::-1]]


def arrived(order):
    """start, right, left, up, down."""
    codes = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}
    return [0] + [codes[b[0] - a[0], b[1] - a[1]] for a, b in itertools.pairwise(order)]


def plain_mamba(p, x, route_all=False):
    """With `route_all` the wrong way: delta, B and C follow the serpentine, too."""
    H, W = x.shape[1:3]
    z = None
    if "in_proj.weight" in p:
        x = x @ p["in_proj.weight"].T
        if x.shape[-1] > len(p["D"]):
            x, z = x.chunk(2, -1)
    x = F.silu(depthwise(x, p["conv2d.weight"], p["conv2d.bias"]))
    A = -torch.exp(p["A_log"])
    rank = p["dt_proj.weight"].shape[1]
    y = torch.zeros_like(x)
    for order in plain_orders(H, W):
        narrow = gather(x, order if route_all else by_rows(H, W)) @ p["x_proj.weight"].T
        dt, B, C = narrow.split([rank, A.shape[1], A.shape[1]], -1)
        dt = F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"])
        delta = F.softplus(dt + p["dt_proj.bias"])
        B = B + p["direction_Bs"][arrived(order)]
        y_k, _ = selective_scan(gather(x, order), delta, A, B, C, p["D"])
        y = y + scatter(y_k, order, H, W)
    y = y if z is None else y * F.silu(z)
    y = y @ p["out_proj.weight"].T if "out_proj.weight" in p else y
    return y * p["gamma"] if "gamma" in p else y
