"""What the Triton kernels share: loading and storing tiles, one online-softmax step, one step of each gradient.

Shape legend of the kernels: M query rows and N keys of a Triton tile, BLOCK tokens of a mask block (M and N divide it),
D head dim, GROUP query heads per KV head, C column capacity. ACC is the accumulator's dtype.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_pointers(source, at, batch, head, first, ROWS: tl.constexpr, D: tl.constexpr):
    """Pointers [ROWS, D] to rows first .. first + ROWS of one head; at: views.Strides of the source."""
    start = batch.to(tl.int64) * at.b + head.to(tl.int64) * at.h + tl.cast(first, tl.int64) * at.s
    return source + start + tl.arange(0, ROWS)[:, None] * at.s + tl.arange(0, D)[None, :]


@triton.jit
def load_tile(source, at, batch, head, first, limit, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
              MASKED: tl.constexpr):
    """Rows first .. first + ROWS of one head, [ROWS, D]; zero from row `limit` on (TMA: the descriptor ends there).

    at: views.Strides of the source.
    """
    if TMA:
        tile = source.load([batch, head, first, 0]).reshape([ROWS, D])
    else:
        pointers = tile_pointers(source, at, batch, head, first, ROWS, D)
        if MASKED:
            tile = tl.load(pointers, mask=(first + tl.arange(0, ROWS) < limit)[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_pair(left, right, left_at, right_at, batch, head, first, limit, ROWS: tl.constexpr, D: tl.constexpr,
              TMA: tl.constexpr, MASKED: tl.constexpr):
    """The same rows of two sources: k and v, or q and grad_out."""
    left_tile = load_tile(left, left_at, batch, head, first, limit, ROWS, D, TMA, MASKED)
    return left_tile, load_tile(right, right_at, batch, head, first, limit, ROWS, D, TMA, MASKED)


@triton.jit
def load_documents(side, first, SIZE: tl.constexpr, OTHER: tl.constexpr):
    """Documents [SIZE] of tokens from `first` on, OTHER where not valid; side: QueryTiles or BlockLists."""
    tokens = first + tl.arange(0, SIZE)
    return tl.load(side.documents + tokens, mask=tokens < side.valid, other=OTHER)


@triton.jit
def load_row_values(row_values, line, first, padded, M: tl.constexpr, TMA: tl.constexpr):
    """M values of one line of row_values [B * H * 2, padded]: even lines hold lse, odd ones delta."""
    if TMA:
        # In the layout of a transposed tile every thread needs them: one bulk copy instead of a copy per thread.
        values = row_values.load([line, first]).reshape([M])
    else:
        values = tl.load(row_values + tl.cast(line, tl.int64) * padded + first + tl.arange(0, M))
    return values


@triton.jit
def write_tile(target, at, values, batch, head, first, limit, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
               ADD: tl.constexpr):
    """target[batch, first + 0 .. ROWS, head, :] = (ADD: +=) values [ROWS, D], rows from `limit` on excepted.

    Only one program owns these rows, so that the copy engine's addition (TMA) is as repeatable as loads and stores.
    """
    if TMA:
        tile = values.to(target.dtype).reshape([1, 1, ROWS, D])
        if ADD:
            target.atomic_add([batch, head, first, 0], tile)
        else:
            target.store([batch, head, first, 0], tile)
    else:
        pointers = tile_pointers(target, at, batch, head, first, ROWS, D)
        mask = (first + tl.arange(0, ROWS) < limit)[:, None]
        if ADD:
            values += tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def store_part(target, values, part, first, capacity, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """target[part, first + 0 .. ROWS, :] = values of a contiguous [parts, C, D]; rows from C on are left out."""
    if TMA:
        target.store([part, first, 0], values.reshape([1, ROWS, D]))
    else:
        rows = first + tl.arange(0, ROWS)
        pointers = target + part.to(tl.int64) * capacity * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(pointers, values, mask=(rows < capacity)[:, None])


@triton.jit
def capped(products, scale):
    """Products as scores: their hyperbolic tangent where scale (views.Scale) has a softcap, else themselves."""
    if scale.softcap is not None:
        products = 1.0 - 2.0 / (1.0 + tl.exp2(products * scale.softcap))
    return products


@triton.jit
def uncapped_gradients(grad_scores, scores, scale):
    """Gradients of products from those of scores, which `capped` made."""
    if scale.softcap is not None:
        grad_scores = grad_scores * (1.0 - scores * scores)
    return grad_scores


@triton.jit
def softmax_step(acc, peak, total, q, k, v, allowed, scale, MASKED: tl.constexpr, ACC: tl.constexpr,
                 PRECISION: tl.constexpr):
    """One online-softmax step in base 2: (acc, peak, total) after the keys k, v; `allowed` bool [M, N] where MASKED.

    scale: views.Scale.
    """
    scores = capped(tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION), scale)
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale.log2)
        # A row with nothing allowed so far keeps peak -inf: shift by 0, so that exp2 gives 0, not NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale.log2)
        shift = new_peak
    weights = tl.exp2(scores * scale.log2 - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, out_dtype=ACC, input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def query_step(state, query, k, v, allowed, scale, MASKED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The state of a query tile after the keys k, v; `allowed` bool [M, N] where MASKED.

    Forward: state (acc, peak, total), query (q,). dQ: state (acc,), query (q, grad_out, lse, delta). scale: see
    views.Scale.
    """
    if len(query) == 1:
        acc, peak, total = state
        state = softmax_step(acc, peak, total, query[0], k, v, allowed, scale, MASKED, ACC, PRECISION)
    else:
        q, grad_out, lse, delta = query
        state = (grad_q_step(state[0], q, k, v, grad_out, lse, delta, allowed, scale, MASKED, ACC, PRECISION),)
    return state


@triton.jit
def start_partial(prior, at, lse, batch, head, first, rows, q_tokens, M: tl.constexpr, D: tl.constexpr,
                  TMA: tl.constexpr, ACC: tl.constexpr):
    """(acc [M, D], peak [M], total [M]) of an online softmax: empty, or the partial in prior (if given) and lse.

    A partial is a state with total 1 and its lse (in base 2) as peak: going on from it is the merge.
    """
    if prior is not None:
        old = tl.load(lse.data + batch.to(tl.int64) * lse.b + head.to(tl.int64) * lse.h + rows, mask=rows < q_tokens,
                      other=float("-inf")).to(ACC)
        acc = load_tile(prior, at, batch, head, first, q_tokens, M, D, TMA, True).to(ACC)
        peak = old * LOG2_E
        total = tl.where(old == float("-inf"), 0.0, 1.0).to(ACC)
    else:
        acc = tl.zeros([M, D], ACC)
        peak = tl.full([M], float("-inf"), ACC)
        total = tl.zeros([M], ACC)
    return acc, peak, total


@triton.jit
def store_partial(out, at, lse, acc, peak, total, batch, head, first, rows, q_tokens, q_valid, M: tl.constexpr,
                  D: tl.constexpr, TMA: tl.constexpr):
    """Write out = acc / total and the natural-log lse; 0 and -inf for rows that attend nothing and from q_valid on."""
    alive = (total > 0.0) & (rows < q_valid)
    row_lse = tl.where(alive, (peak + tl.log2(tl.where(alive, total, 1.0))) * LN_2, float("-inf"))
    weight = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    # Padding rows of a 16-bit input may hold NaN: what they computed never counts.
    values = tl.where(alive[:, None], acc * weight[:, None], 0.0)
    write_tile(out, at, values, batch, head, first, q_tokens, M, D, TMA, False)
    lse_pointers = lse.data + batch.to(tl.int64) * lse.b + head.to(tl.int64) * lse.h + rows
    tl.store(lse_pointers, row_lse.to(lse.data.dtype.element_ty), mask=rows < q_tokens)


@triton.jit
def grad_q_step(acc, q, k, v, grad_out, lse, delta, allowed, scale, MASKED: tl.constexpr, ACC: tl.constexpr,
                PRECISION: tl.constexpr):
    """acc [M, D] plus scale * dS k of one key tile; scale: views.Scale; delta is scaled already."""
    scores = capped(tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION), scale)
    weights = tl.exp2(scores * scale.log2 - lse[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
    grad_scores = weights * (grad_weights * scale.natural - delta[:, None])
    grad_scores = uncapped_gradients(grad_scores, scores, scale).to(k.dtype)
    return tl.dot(grad_scores, k, acc, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def grad_kv_step(grad_k, grad_v, k, v, q, grad_out, row_values, padded, at, queries, batch, head, query, k_document,
                 allowed, scale, MASKED: tl.constexpr, M: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
                 ACC: tl.constexpr, PRECISION: tl.constexpr, anchors=None):
    """(grad_k, grad_v) [N, D] of keys k, v plus the share of M queries of a head, from `query` on; scale: views.Scale.

    MASKED: `allowed` bool [N, M]; documents are compared in any case, but queries of other documents attend the keys
    that are anchors, bool [N]. lse and delta of the queries are read just before use, to hold fewer registers.
    """
    q_tile, do_tile = load_pair(q, grad_out, at.q, at.grad_out, batch, head, query, queries.valid, M, D, TMA, True)
    if queries.documents is not None:
        q_document = load_documents(queries, query, M, -1)
        same = q_document[None, :] == k_document[:, None]
        allowed = allowed & same
        if anchors is not None:
            allowed = allowed | (anchors[:, None] & (q_document >= 0)[None, :] & (same == 0))
    line = (batch * queries.heads + head) * 2
    scores = capped(tl.dot(k, tl.trans(q_tile), out_dtype=ACC, input_precision=PRECISION), scale)
    lse = load_row_values(row_values, line, query, padded, M, TMA)
    weights = tl.exp2(scores * scale.log2 - lse[None, :])
    if MASKED or queries.documents is not None:
        weights = tl.where(allowed, weights, 0.0)
    grad_v = tl.dot(weights.to(q_tile.dtype), do_tile, grad_v, out_dtype=ACC, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(do_tile), out_dtype=ACC, input_precision=PRECISION)
    delta = load_row_values(row_values, line + 1, query, padded, M, TMA)
    grad_scores = weights * (grad_weights * scale.natural - delta[None, :])
    grad_scores = uncapped_gradients(grad_scores, scores, scale).to(q_tile.dtype)
    grad_k = tl.dot(grad_scores, q_tile, grad_k, out_dtype=ACC, input_precision=PRECISION)
    return grad_k, grad_v
