"""Slow, obvious forms of what the library computes: float64, one sample, head and query at a time.

Written from the papers' equations and with none of the library's own arithmetic. Shapes: q (B, H,
N, K), k (B, G, M, K), v (B, G, M, V) with G = H or 1; everything is differentiable by autograd.
"""

from __future__ import annotations

import itertools
import math

import torch

from vision_xformer import Site


def relative_error(x, expected):
    """|x - expected| / |expected|, over all elements, in float64."""
    x, expected = x.detach().double(), expected.detach().double()
    assert x.shape == expected.shape
    return ((x - expected).norm() / expected.norm()).item()


def assert_same(ours, expected, leaves, tolerance=1e-10):
    """Two functions of no argument give equal outputs, and equal gradients of ``leaves``."""
    outputs = ours(), expected()
    assert relative_error(*outputs) <= tolerance
    direction = torch.randn_like(outputs[1])
    gradients = [torch.autograd.grad((y * direction).sum(), leaves) for y in outputs]
    for place, pair in enumerate(zip(*gradients, strict=True)):
        assert relative_error(*pair) <= tolerance, f"gradient of leaf {place}"


def per_head(function, q, k, v):
    """``function(q, k, v, head)`` on the (N, K), (M, K), (M, V) of every sample and head."""
    samples = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            g = h if k.shape[1] > 1 else 0
            heads.append(function(q[b, h], k[b, g], v[b, g], h))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def softmax_rows(logits):
    weights = [(row - row.max()).exp() for row in logits]
    return torch.stack([w / w.sum() for w in weights])


def attend(q, k, v):
    """softmax(q k^T / sqrt(K)) v of one head, query by query."""
    out = []
    for query in q:
        logits = k @ query / math.sqrt(q.shape[-1])
        weights = (logits - logits.max()).exp()
        out.append(weights @ v / weights.sum())
    return torch.stack(out)


def softmax_attention(q, k, v):
    return per_head(lambda q, k, v, _: attend(q, k, v), q, k, v)


def compress(x, e):
    """(..., M, C), (M, R) -> (..., R, C): row r is the sum over tokens of e[m, r] x[m]."""
    columns = []
    for r in range(e.shape[1]):
        columns.append(sum(e[m, r] * x[..., m, :] for m in range(e.shape[0])))
    return torch.stack(columns, -2)


def linformer_attention(q, k, v, e, f):
    """Linformer, eq. 7: k and v of full length, E and F (M, R)."""
    return softmax_attention(q, compress(k, e), compress(v, f))


def favor_features(x, w, form, is_query, eps):
    """phi of x (B, H, L, K) with features w (m, K): (B, H, L, m).

    (1 / sqrt(m)) (exp(w.x' - |x'|^2/2 - shift) + eps), x' = x / K^(1/4), Performer, lemma 1. The
    shift is the largest exponent ("exponent") or the largest w.x' ("package", "v0.2"): of the
    query; of all keys of the head; in "v0.2" of all keys of the batch. It is a constant to
    autograd, but for the |x'|^2 of a query, which its exponents share: that cancels ("exponent").
    "relu": relu(w.x') + eps.
    """
    x = x * x.shape[-1] ** -0.25
    dots = torch.stack([(x * row).sum(-1) for row in w], -1)
    if form == "relu":
        return torch.where(dots > 0, dots, torch.zeros_like(dots)) + eps
    exponent = dots - 0.5 * (x * x).sum(-1)[..., None]
    if form == "exponent" and is_query:
        exponent = dots
    shifted = (exponent if form == "exponent" else dots).detach()
    out = torch.zeros_like(exponent)
    for b, h, i in itertools.product(*map(range, x.shape[:3])):
        if is_query:
            shift = shifted[b, h, i].max()
        elif form == "v0.2":
            shift = shifted.max()
        else:
            shift = shifted[b, h].max()
        out[b, h, i] = ((exponent[b, h, i] - shift).exp() + eps) / math.sqrt(w.shape[0])
    return out


def performer_attention(q, k, v, w, form):
    """Attention with weights phi(q).phi(k) / sum over keys, the N x M map and all."""
    eps = 1e-3 if form == "relu" else 1e-4
    phi_q = favor_features(q, w, form, True, eps)
    phi_k = favor_features(k, w, form, False, eps)

    def one_head(phi_q, phi_k, v, _):
        out = []
        for query in phi_q:
            weights = phi_k @ query
            out.append(weights @ v / weights.sum())
        return torch.stack(out)

    return per_head(one_head, phi_q, phi_k, v)


def feature(x, name, is_query, part, head, places):
    """f of the tokens of one head, (N, K) -> (N, F).

    ``part`` has the weights of learned feature maps; ``places``: see :func:`coordinates`.
    """
    eps, zero = 1e-6, torch.zeros_like(x)
    signs = [torch.where(sign * x > 0, sign * x, zero) for sign in (1, -1)]
    if name == "squared_relu":
        return signs[0] * signs[0] + eps
    if name == "focused":
        y = signs[0] + eps
        factor = (y * y).sum(1).sqrt() / (y**6).sum(1).sqrt()
        return factor[:, None] * y**3
    if name == "polarity":
        power = 1 + 4 / (1 + (-part.power[head]).exp())
        return torch.cat([side.clamp(min=eps) ** power for side in signs], 1) + eps
    if name == "norm_aware":
        if not is_query:
            return torch.cat([side**3 for side in signs], 1) + eps
        norm = (x * x).sum(1, keepdim=True).sqrt()
        power = 3 * (0.5 + torch.tanh(norm))
        return torch.cat([(side / norm).clamp(min=eps) ** power for side in signs], 1) + eps
    out = []  # "cosine": the product over the axes of cos(a - b) = cos a cos b + sin a sin b
    for waves in itertools.product((math.cos, math.sin), repeat=len(places[1])):
        factors = [
            math.prod(
                w(math.pi / 2 * c / size) for w, c, size in zip(waves, at, places[1], strict=True)
            )
            for at in places[0]
        ]
        out.append((signs[0] + eps) * torch.tensor(factors, dtype=x.dtype)[:, None])
    return torch.cat(out, 1)


def feature_attention(q, k, v, name, kernel, queries, keys):
    """Means of the values with weights f(q).f(k); those of opposite signs for half of them.

    ``queries``, ``keys``: see :func:`coordinates`.
    """

    def one_head(q, k, v, head):
        fq = feature(q, name, True, kernel.q_map, head, queries)
        fk = feature(k, name, False, kernel.k_map, head, keys)

        def means(weights):
            return torch.stack([row @ v / row.sum() for row in weights])

        if name != "polarity":
            return means(fq @ fk.T)
        width, half = q.shape[1], -(-v.shape[1] // 2)
        opposite = torch.cat((fk[:, width:], fk[:, :width]), 1)
        return torch.cat((means(fq @ fk.T)[:, :half], means(fq @ opposite.T)[:, half:]), 1)

    return per_head(one_head, q, k, v)


def elu_plus_one(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def mala_attention(q, k, v):
    """MALA: (1 + 1/z) s/N f(q).f(k) - z/N, all weights of one query at a time."""

    def one_head(q, k, v, _):
        rows = []
        for query in elu_plus_one(q):
            products = elu_plus_one(k) @ query / math.sqrt(q.shape[1]) / len(k)
            z = products.sum()
            rows.append(((1 + 1 / z) * products - z / len(k)) @ v)
        return torch.stack(rows)

    return per_head(one_head, q, k, v)


def rala_attention(q, k, v):
    """RALA: linear attention whose keys are scaled by M softmax(mean f(q).f(k) / sqrt(K))."""

    def one_head(q, k, v, _):
        fq, fk = elu_plus_one(q), elu_plus_one(k)
        mean = sum(fq) / len(fq)
        scores = softmax_rows((fk @ mean / math.sqrt(q.shape[1]))[None])[0]
        fk = torch.stack([len(k) * a * key for a, key in zip(scores, fk, strict=True)])
        return torch.stack([(fk @ query) @ v / (fk @ query).sum() for query in fq])

    return per_head(one_head, q, k, v)


def inline_attention(q, k, v):
    """InLine: s q.k / M + (1 - sum of s q.k / M) / M, all weights of one query at a time."""

    def one_head(q, k, v, _):
        rows = []
        for query in q:
            products = k @ query / math.sqrt(q.shape[1]) / len(k)
            rows.append((products + (1 - products.sum()) / len(k)) @ v)
        return torch.stack(rows)

    return per_head(one_head, q, k, v)


def agent_attention(q, k, v, queries, parts):
    """softmax(q A^T) softmax(A k^T) v, A the means of q in boxes; ``queries``: (grid, prefix)."""

    def one_head(q, k, v, _):
        agents = cell_means(q, *queries, parts)
        return attend(q, agents, attend(agents, k, v))

    return per_head(one_head, q, k, v)


def mhla_attention(q, k, v, mixing, queries, keys, parts, cells):
    """MHLA: the weight of key j for query i is f(q_i).f(k_j) C[block of i, block of j].

    ``queries``, ``keys``: (grid, prefix). The block of a query is that of the key at its place.
    """

    def blocks(grid, prefix):
        found = [0] * prefix
        for cell in itertools.product(*map(range, grid)):
            number = 0
            for at, size, of_keys, count, width in zip(
                cell, grid, keys[0], parts, cells, strict=True
            ):
                stride, upscale = max(1, -(-of_keys // size)), max(1, -(-size // of_keys))
                number = number * count + at * stride // upscale // width
            found.append(number + (keys[1] > 0))
        return torch.tensor(found)

    c = torch.where(mixing > 0, mixing, -mixing)

    def one_head(q, k, v, _):
        fq, fk = (torch.where(x > 0, x, torch.zeros_like(x)) + 1e-6 for x in (q, k))
        of_keys, rows = blocks(*keys), []
        for query, block in zip(fq, blocks(*queries), strict=True):
            weights = torch.stack(
                [c[block, b] * (query @ key) for b, key in zip(of_keys, fk, strict=True)]
            )
            rows.append(weights @ v / weights.sum())
        return torch.stack(rows)

    return per_head(one_head, q, k, v)


def cross_covariance(q, k, v, temperature):
    """XCiT: a channel of the output is a mean of channels of v, weighted by cosines over tokens."""

    def one_head(q, k, v, head):
        columns = []
        for c in range(q.shape[1]):
            query = q[:, c] / q[:, c].norm()
            logits = [query @ k[:, d] / k[:, d].norm() for d in range(k.shape[1])]
            weights = softmax_rows(torch.stack(logits)[None] * temperature[head])[0]
            columns.append(v @ weights)
        return torch.stack(columns, 1)

    return per_head(one_head, q, k, v)


def coordinates(grid, prefix):
    """The coordinates of each token in cells, and the sizes of the grid; prefix at the center."""
    cells = [tuple(c + 0.5 for c in cell) for cell in itertools.product(*map(range, grid))]
    return [tuple(size / 2 for size in grid)] * prefix + cells, grid


def runs(size, parts):
    """``size`` cells in ``parts`` runs whose lengths differ by at most one."""
    return [range(-(-p * size // parts), -(-(p + 1) * size // parts)) for p in range(parts)]


def cell_means(x, grid, prefix, parts):
    """(L, C) -> (prod(parts), C): means over boxes of the grid, box by box, token by token."""
    means = []
    for box in itertools.product(*map(runs, grid, parts)):
        rows = []
        for cell in itertools.product(*box):
            row = 0
            for size, coordinate in zip(grid, cell, strict=True):
                row = row * size + coordinate
            rows.append(x[prefix + row])
        means.append(sum(rows) / len(rows))
    return torch.stack(means)


def newton_schulz(a, iterations):
    """Nyströmformer, eq. 14, of one matrix (m, m)."""
    z = a.T / (a.abs().sum(0).max() * a.abs().sum(1).max())
    one = torch.eye(a.shape[0], dtype=a.dtype)
    for _ in range(iterations):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def convolve(v, taps):
    """out[..., i, :] = sum_t taps[h, t] v[..., h, i + t - T // 2, :], zero outside the sequence."""
    out = torch.zeros_like(v)
    length, width = v.shape[-2], taps.shape[1]
    for h, i in itertools.product(range(v.shape[1]), range(length)):
        for t in range(width):
            j = i + t - width // 2
            if 0 <= j < length:
                out[:, h, i] = out[:, h, i] + taps[h, t] * v[:, h, j]
    return out


def key_under(query, q_grid, q_prefix, k_grid, k_prefix):
    """Index of the key at the place of a query: prefix to prefix, grid to grid."""
    if query < q_prefix:
        return min(query, k_prefix - 1)
    rest, key, stride = query - q_prefix, 0, 1
    for q_size, k_size in zip(reversed(q_grid), reversed(k_grid), strict=True):
        at = rest % q_size  # one of the grids has every s-th place of the other
        at = at * -(-k_size // q_size) if k_size > q_size else at // -(-q_size // k_size)
        key += min(at, k_size - 1) * stride
        rest, stride = rest // q_size, stride * k_size
    return k_prefix + key


def nystrom_attention(q, k, v, queries, keys, parts, iterations, taps=None):
    """Nyströmformer, eq. 13-15. ``parts``: boxes on each axis, or one number of runs.

    ``queries``, ``keys``: (grid, prefix).
    """

    def boxes(grid):
        grid, prefix = grid
        return (grid if len(parts) == len(grid) else (math.prod(grid),)), prefix

    def one_head(q, k, v, _):
        ql, kl = (cell_means(x, *boxes(at), parts) for x, at in ((q, queries), (k, keys)))
        scale = 1 / math.sqrt(q.shape[-1])
        first, core, last = (softmax_rows(a @ b.T * scale) for a, b in ((q, kl), (ql, kl), (ql, k)))
        return first @ newton_schulz(core, iterations) @ last @ v

    out = per_head(one_head, q, k, v)
    if taps is None:
        return out
    local = convolve(v, taps)
    under = [key_under(i, *queries, *keys) for i in range(q.shape[2])]
    return out + torch.stack([local[:, :, j] for j in under], 2)


def dft(size):
    """(C, S): C - iS is the matrix of the discrete Fourier transform."""
    angle = torch.zeros(size, size, dtype=torch.float64)
    for j, k in itertools.product(range(size), repeat=2):
        angle[j, k] = 2 * math.pi * (j * k % size) / size
    return angle.cos(), angle.sin()


def real_fourier(x, grid):
    """Re of the transform over the axes of ``grid`` and the width: (B, prod(grid), D) -> same.

    Over several axes the matrix is a Kronecker product, and over tokens and width
    Re((C_n - i S_n) x (C_d - i S_d)) = C_n x C_d - S_n x S_d.
    """
    c, s = dft(grid[0])
    for size in grid[1:]:
        c2, s2 = dft(size)
        c, s = (
            torch.kron(c, c2) - torch.kron(s, s2),
            torch.kron(c, s2) + torch.kron(s, c2),
        )
    cd, sd = dft(x.shape[-1])
    return torch.stack([c @ sample @ cd - s @ sample @ sd for sample in x])


def rotate(x, coordinates, dim, base):
    """Rotary embedding, pair by pair, of x (B, N, H, K).

    Token n with ``coordinates[n]`` = (p_0, p_1, ...) has pair i of axis a, the channels
    ``a dim + 2 i`` and the next, turned by p_a base^(-2 i / dim). ``None`` leaves it as it is.
    """
    x = x.double()
    out = x.clone()
    for n, places in enumerate(coordinates):
        for axis, place in enumerate(places or ()):
            for i in range(dim // 2):
                angle = place * base ** (-2 * i / dim)
                turn = torch.tensor(
                    [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
                    dtype=torch.float64,
                )
                first = axis * dim + 2 * i
                out[:, n, :, first : first + 2] = x[:, n, :, first : first + 2] @ turn.T
    return out


def patches(x, patch):
    """(B, C, *shape) -> (B, N, prod(patch) * C): row-major patches, channels innermost."""
    shape = x.shape[2:]
    tokens = []
    for place in itertools.product(*(range(s // p) for s, p in zip(shape, patch, strict=True))):
        values = []
        for offset in itertools.product(*map(range, patch)):
            at = tuple(i * p + o for i, p, o in zip(place, patch, offset, strict=True))
            values += [x[(slice(None), channel, *at)] for channel in range(x.shape[1])]
        tokens.append(torch.stack(values, -1))
    return torch.stack(tokens, 1)


# What the backbones do around their kernels


def normalize(y, norm):
    """Batch norm in evaluation, channels last; ``norm``: mean, variance, weight, bias."""
    mean, variance, weight, bias = norm
    return (y - mean) / (variance + 1e-5).sqrt() * weight + bias


def hard_swish(x):
    return x * (x + 3).clamp(0, 6) / 6


def strided_cells(grid, stride):
    """The places that are kept, and the place of each in the sequence."""
    cells = itertools.product(*(range(0, size, stride) for size in grid))
    kept = []
    for cell in cells:
        row = 0
        for size, coordinate in zip(grid, cell, strict=True):
            row = row * size + coordinate
        kept.append((cell, row))
    return kept


def depthwise_on_grid(x, grid, prefix, weight, stride):
    """Cross-correlation of each channel, zero outside: (B, N, D), (D, 1, *kernel) -> (B, n, D).

    Prefix tokens stay as they are.
    """
    places = dict(strided_cells(grid, 1))
    kernel = weight.shape[2:]
    out = [x[:, i] for i in range(prefix)]
    for cell, _ in strided_cells(grid, stride):
        total = torch.zeros_like(x[:, 0])
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(c + t - k // 2 for c, t, k in zip(cell, tap, kernel, strict=True))
            if at in places:
                total = total + x[:, prefix + places[at]] * weight[(slice(None), 0, *tap)]
        out.append(total)
    return torch.stack(out, 1)


def cvt_operand(x, grid, prefix, weight, norm, stride, matrix, bias):
    """q, k or v of CvT: depth-wise convolution, batch norm (not for the prefix), linear map."""
    y = depthwise_on_grid(x, grid, prefix, weight, stride)
    y = torch.cat((y[:, :prefix], normalize(y[:, prefix:], norm)), 1)
    return y @ matrix.T + (0 if bias is None else bias)


def in_heads(x, heads):
    """(B, N, H * K) -> (B, H, N, K)"""
    return torch.stack(x.chunk(heads, -1), 1)


def out_of_heads(x):
    """(B, H, N, V) -> (B, N, H * V)"""
    return torch.cat([x[:, h] for h in range(x.shape[1])], -1)


def distance_bias(table, grid, stride):
    """(*grid, H) -> (H, N, M): what the table holds for the distance along each axis."""
    rows = []
    for query, _ in strided_cells(grid, stride):
        row = []
        for key, _ in strided_cells(grid, 1):
            distance = tuple(abs(a - b) for a, b in zip(query, key, strict=True))
            row.append(table[distance])
        rows.append(torch.stack(row))
    return torch.stack(rows).permute(2, 0, 1)


def biased_attention(q, k, v, bias, scale=None):
    """softmax(q k^T scale + bias) v, head by head; ``scale`` is 1 / sqrt(K), ``bias`` (H, N, M)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def one_head(q, k, v, head):
        logits = q @ k.T * scale
        return softmax_rows(logits if bias is None else logits + bias[head]) @ v

    return per_head(one_head, q, k, v)


def raster_sincos(length, dim):
    """(N, D): sin p / 10000^(2 (i // 2) / D) on even channels i, cos on odd ones."""
    table = torch.zeros(length, dim, dtype=torch.float64)
    for p, i in itertools.product(range(length), range(dim)):
        angle = p / 10000 ** (2 * (i // 2) / dim)
        table[p, i] = math.cos(angle) if i % 2 else math.sin(angle)
    return table


@torch.no_grad()
def shake(module):
    """Weights, statistics and all that starts as zero or one, far from its start."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for key, buffer in module.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_()
        if key.endswith("running_var"):
            buffer.uniform_(0.3, 2.0)
    return module


def site(heads, key_dim, keys, queries=None, value_dim=None):
    """The site of a kernel; queries lie on the grid of the keys, values are as wide as keys."""
    return Site(heads, key_dim, value_dim or key_dim, queries or keys, keys)
