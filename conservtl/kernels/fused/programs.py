"""Triton programs over tables of pointers. Each handles one block of one tensor.

A table's row is a tensor: its columns hold addresses, its ``sizes`` numbers of elements. ``entries`` and ``starts``
hold, for each program, the row and the first element of its block. Blocks inside a tensor are read without a mask, in
words of 16 bytes if every address is ALIGNED; the last block of a tensor is masked. Rows are read in such words if
their length is EVEN, a multiple of 16, and the addresses are aligned. Arithmetic is in ACC: float32, or float64 if a
tensor is.
"""

import triton
import triton.language as tl

__all__ = ["add_pull", "lerp", "mix", "range_sums", "row_norms", "shrink_rows", "soften", "sums", "unmix"]

_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _pointer(column, entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(column + entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _wide(value, ACC: tl.constexpr):
    if value.dtype.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    return value.to(ACC)


@triton.jit
def _read(pointer, at, size, ACC: tl.constexpr, MASKED: tl.constexpr):
    value = tl.load(pointer + at, mask=at < size, other=0.0) if MASKED else tl.load(pointer + at)
    return _wide(value, ACC)


@triton.jit
def _write(pointer, at, size, value, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, value.to(DTYPE), mask=at < size)
    else:
        tl.store(pointer + at, value.to(DTYPE))


@triton.jit
def _toward(weight, anchor, share):
    # As torch.lerp: exactly the weight at a share of 0, exactly the anchor at 1.
    return tl.where(share < 0.5, weight + share * (anchor - weight), anchor - (anchor - weight) * (1 - share))


@triton.jit
def _kept(share, K: tl.constexpr):
    # 1 - (1 - share)^K by squaring; as shares, so that small ones lose no digits.
    result = share * 0
    power = share
    for bit in tl.static_range(0, 31):
        if (K >> bit) > 0:
            if (K >> bit) % 2 == 1:
                result = result + power - result * power
            power = power * (2 - power)
    return result


@triton.jit
def _add_pull(
    weight, anchor, importance, gradient, amount, at, size, W: tl.constexpr, ACC: tl.constexpr,
    ANCHORED: tl.constexpr, WEIGHED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    pull = _read(weight, at, size, ACC, MASKED)
    if ANCHORED:
        pull -= _read(anchor, at, size, ACC, MASKED)
    if WEIGHED:
        pull *= _read(importance, at, size, ACC, MASKED)
    _write(gradient, at, size, _read(gradient, at, size, ACC, MASKED) + amount * pull, W, MASKED)


@triton.jit
def add_pull(
    entries, starts, sizes, weights, anchors, importances, gradients, amounts, scale,
    W: tl.constexpr, A: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr,
    ANCHORED: tl.constexpr, WEIGHED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add amount × importance × (weight - anchor) to each gradient."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    weight = _pointer(weights, entry, W, ALIGNED)
    anchor = _pointer(anchors, entry, A, ALIGNED)
    importance = _pointer(importances, entry, F, ALIGNED)
    gradient = _pointer(gradients, entry, W, ALIGNED)
    amount = tl.load(amounts + entry).to(ACC)
    if SCALED:
        amount *= tl.load(scale).to(ACC)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _add_pull(weight, anchor, importance, gradient, amount, at, size, W, ACC, ANCHORED, WEIGHED, False)
    else:
        _add_pull(weight, anchor, importance, gradient, amount, at, size, W, ACC, ANCHORED, WEIGHED, True)


@triton.jit
def _lerp(
    weight, anchor, importance, amount, at, size, W: tl.constexpr, ACC: tl.constexpr,
    ANCHORED: tl.constexpr, WEIGHED: tl.constexpr, EVERY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    value = _read(weight, at, size, ACC, MASKED)
    if WEIGHED:
        share = amount * _read(importance, at, size, ACC, MASKED)
        share = tl.where(share > 1, 1.0, share)  # no element goes beyond the anchor; NaN stays
        if EVERY > 1:
            share = _kept(share, EVERY)
    else:
        share = amount
    if ANCHORED:
        value = _toward(value, _read(anchor, at, size, ACC, MASKED), share)
    else:
        value = value * (1 - share)
    _write(weight, at, size, value, W, MASKED)


@triton.jit
def lerp(
    entries, starts, sizes, weights, anchors, importances, amounts, skip,
    W: tl.constexpr, A: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr, ANCHORED: tl.constexpr,
    WEIGHED: tl.constexpr, SKIPPED: tl.constexpr, EVERY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move each weight by a share of the way to its anchor; by nothing if the step is skipped."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    weight = _pointer(weights, entry, W, ALIGNED)
    anchor = _pointer(anchors, entry, A, ALIGNED)
    importance = _pointer(importances, entry, F, ALIGNED)
    amount = tl.load(amounts + entry).to(ACC)
    if SKIPPED:
        amount = tl.where(tl.load(skip) == 0, amount, 0.0)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _lerp(weight, anchor, importance, amount, at, size, W, ACC, ANCHORED, WEIGHED, EVERY, False)
    else:
        _lerp(weight, anchor, importance, amount, at, size, W, ACC, ANCHORED, WEIGHED, EVERY, True)


@triton.jit
def _soften(weight, anchor, threshold, at, size, W: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr):
    value = _read(weight, at, size, ACC, MASKED)
    start = _read(anchor, at, size, ACC, MASKED)
    move = value - start
    nearer = tl.where(move > 0, value - threshold, value + threshold)
    _write(weight, at, size, tl.where(tl.abs(move) <= threshold, start, nearer), W, MASKED)  # NaN stays


@triton.jit
def soften(
    entries, starts, sizes, weights, anchors, amounts, skip,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, SKIPPED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move each element by its tensor's threshold toward the anchor and no further."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    weight = _pointer(weights, entry, W, ALIGNED)
    anchor = _pointer(anchors, entry, A, ALIGNED)
    threshold = tl.load(amounts + entry).to(ACC)
    if SKIPPED:
        threshold = tl.where(tl.load(skip) == 0, threshold, 0.0)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _soften(weight, anchor, threshold, at, size, W, ACC, False)
    else:
        _soften(weight, anchor, threshold, at, size, W, ACC, True)


@triton.jit
def _terms(weight, other, gradient, at, size, ACC: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, there):
    value = _read(weight, at, size, ACC, MASKED)
    if KIND == "weight, gradient":
        slope = _wide(tl.load(gradient + at, mask=(at < size) & there, other=0.0), ACC) if MASKED else _read(
            gradient, at, size, ACC, False
        )  # fmt: skip
        return value * value, slope * slope
    start = _read(other, at, size, ACC, MASKED)
    move = value - start
    if KIND == "move, start":
        return move * move, start * start
    if KIND == "move, start, absolute":
        return tl.abs(move), tl.abs(start)
    slope = _wide(tl.load(gradient + at, mask=(at < size) & there, other=0.0), ACC) if MASKED else _read(
        gradient, at, size, ACC, False
    )  # fmt: skip
    return move * move, move * slope


@triton.jit
def sums(
    entries, starts, sizes, weights, anchors, gradients, out, programs,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write two sums over a span of BLOCKS × BLOCK elements; KIND names their terms."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    weight = _pointer(weights, entry, W, ALIGNED)
    anchor = _pointer(anchors, entry, A, ALIGNED)
    there = tl.load(gradients + entry) != 0  # a parameter may have no gradient
    gradient = _pointer(gradients, entry, W, ALIGNED)
    first = tl.zeros([BLOCK], ACC)
    second = tl.zeros([BLOCK], ACC)
    if (start + BLOCK * BLOCKS <= size) & there:
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            one, two = _terms(weight, anchor, gradient, at, size, ACC, KIND, False, there)
            first += one
            second += two
    else:
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            one, two = _terms(weight, anchor, gradient, at, size, ACC, KIND, True, there)
            first += one
            second += two
    tl.store(out + program, tl.sum(first, 0))
    tl.store(out + programs + program, tl.sum(second, 0))


@triton.jit
def range_sums(values, ends, out, count, total, ACC: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum, or the largest, of each range of neighbouring values; a program for each range and vector."""
    entry = tl.program_id(0)
    vector = tl.program_id(1)
    begin = tl.load(ends + entry)
    end = tl.load(ends + entry + 1)
    result = tl.zeros([BLOCK], ACC)
    wrong = tl.zeros([BLOCK], ACC)
    at = begin
    while at < end:
        places = at + tl.arange(0, BLOCK)
        value = tl.load(values + vector * total + places, mask=places < end, other=0.0)
        if LARGEST:
            wrong += tl.where(value == value, 0.0, value)  # NaN, which a maximum would leave out
            result = tl.maximum(result, value)
        else:
            result += value
        at += BLOCK
    answer = tl.max(result, 0) + tl.sum(wrong, 0) if LARGEST else tl.sum(result, 0)
    tl.store(out + vector * count + entry, answer)


@triton.jit
def _row_norm(total, ABSOLUTE: tl.constexpr):
    norm = tl.sum(total, 1)
    if not ABSOLUTE:
        norm = tl.sqrt(norm)
    return norm


@triton.jit
def row_norms(
    entries, starts, sizes, lengths, bases, weights, anchors, out, programs,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ABSOLUTE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the norms of rows of weight - anchor, and of the anchor."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    rows = tl.load(sizes + entry)
    length = tl.load(lengths + entry)
    if EVEN:
        length = tl.multiple_of(length, 16)
    weight = _pointer(weights, entry, W, EVEN)
    anchor = _pointer(anchors, entry, A, EVEN)
    row = tl.load(starts + program) + tl.arange(0, ROWS)
    first = tl.zeros([ROWS, COLUMNS], ACC)
    second = tl.zeros([ROWS, COLUMNS], ACC)
    block = 0
    while block < length:
        column = block + tl.arange(0, COLUMNS)
        at = row[:, None] * length + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < length)
        start = _wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
        move = _wide(tl.load(weight + at, mask=inside, other=0.0), ACC) - start
        if ABSOLUTE:
            first += tl.abs(move)
            second += tl.abs(start)
        else:
            first += move * move
            second += start * start
        block += COLUMNS
    base = tl.load(bases + entry)
    tl.store(out + base + row, _row_norm(first, ABSOLUTE), mask=row < rows)
    tl.store(out + programs + base + row, _row_norm(second, ABSOLUTE), mask=row < rows)


@triton.jit
def shrink_rows(
    entries, starts, sizes, lengths, weights, anchors, amounts, skip,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ABSOLUTE: tl.constexpr, BALL: tl.constexpr,
    RELATIVE: tl.constexpr, SKIPPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Move each row toward the anchor: into a ball around it, or by a threshold and no further."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    rows = tl.load(sizes + entry)
    length = tl.load(lengths + entry)
    if EVEN:
        length = tl.multiple_of(length, 16)
    weight = _pointer(weights, entry, W, EVEN)
    anchor = _pointer(anchors, entry, A, EVEN)
    amount = tl.load(amounts + entry).to(ACC)
    if SKIPPED:
        amount = tl.where(tl.load(skip) == 0, amount, 0.0)
    row = tl.load(starts + program) + tl.arange(0, ROWS)
    first = tl.zeros([ROWS, COLUMNS], ACC)
    second = tl.zeros([ROWS, COLUMNS], ACC)
    block = 0
    while block < length:
        column = block + tl.arange(0, COLUMNS)
        at = row[:, None] * length + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < length)
        start = _wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
        move = _wide(tl.load(weight + at, mask=inside, other=0.0), ACC) - start
        if ABSOLUTE:
            first += tl.abs(move)
        else:
            first += move * move
        if RELATIVE:
            second += tl.abs(start) if ABSOLUTE else start * start
        block += COLUMNS
    norm = _row_norm(first, ABSOLUTE)
    norm = tl.where(norm < _TINY, _TINY, norm)
    if BALL:
        radius = amount * _row_norm(second, ABSOLUTE) if RELATIVE else amount
        share = 1 - radius / norm
        share = tl.where(share < 0, 0.0, share)
    else:
        share = amount * tl.sqrt(length.to(ACC)) / norm
        share = tl.where(share > 1, 1.0, share)
    block = 0
    while block < length:
        column = block + tl.arange(0, COLUMNS)
        at = row[:, None] * length + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < length)
        start = _wide(tl.load(anchor + at, mask=inside, other=0.0), ACC)
        value = _wide(tl.load(weight + at, mask=inside, other=0.0), ACC)
        tl.store(weight + at, _toward(value, start, share[:, None]).to(W), mask=inside)

        block += COLUMNS


@triton.jit
def _draw(seed, step, identity, start, QUARTER: tl.constexpr):
    # Element start + q QUARTER + i of a tensor takes the q-th word of the i-th counter of its block.
    counter = start // 4 + tl.arange(0, QUARTER)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + identity.to(tl.uint32), zero + step.to(tl.uint32))


@triton.jit
def _mix(
    weight, anchor, plain, word, dropped, at, size, W: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    value = tl.load(weight + at, mask=at < size, other=0.0) if MASKED else tl.load(weight + at)
    if MASKED:
        tl.store(plain + at, value, mask=at < size)
    else:
        tl.store(plain + at, value)
    start = _read(anchor, at, size, ACC, MASKED)
    scale = 65536 / (65536 - dropped.to(ACC))
    mixed = start + (_wide(value, ACC) - start) * scale
    kept = (word >> 16).to(tl.int32) >= dropped
    _write(weight, at, size, tl.where(kept, mixed, start), W, MASKED)


@triton.jit(do_not_specialize=["seed", "step", "dropped"])
def mix(
    entries, starts, sizes, identities, weights, anchors, plains, seed, step, dropped,
    W: tl.constexpr, A: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep a copy of each weight, and put anchor + M (weight - anchor) / (1 - p) in its place."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    weight = _pointer(weights, entry, W, ALIGNED)
    anchor = _pointer(anchors, entry, A, ALIGNED)
    plain = _pointer(plains, entry, W, ALIGNED)
    QUARTER: tl.constexpr = BLOCK // 4
    a, b, c, d = _draw(seed, step, tl.load(identities + entry), start, QUARTER)
    at = start + tl.arange(0, QUARTER)
    if start + BLOCK <= size:
        _mix(weight, anchor, plain, a, dropped, at, size, W, ACC, False)
        _mix(weight, anchor, plain, b, dropped, at + QUARTER, size, W, ACC, False)
        _mix(weight, anchor, plain, c, dropped, at + 2 * QUARTER, size, W, ACC, False)
        _mix(weight, anchor, plain, d, dropped, at + 3 * QUARTER, size, W, ACC, False)
    else:
        _mix(weight, anchor, plain, a, dropped, at, size, W, ACC, True)
        _mix(weight, anchor, plain, b, dropped, at + QUARTER, size, W, ACC, True)
        _mix(weight, anchor, plain, c, dropped, at + 2 * QUARTER, size, W, ACC, True)
        _mix(weight, anchor, plain, d, dropped, at + 3 * QUARTER, size, W, ACC, True)


@triton.jit
def _unmix(gradient, word, dropped, at, size, W: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr):
    scale = 65536 / (65536 - dropped.to(ACC))
    kept = (word >> 16).to(tl.int32) >= dropped
    slope = _read(gradient, at, size, ACC, MASKED) * tl.where(kept, scale, 0.0)
    _write(gradient, at, size, slope, W, MASKED)


@triton.jit(do_not_specialize=["seed", "step", "dropped"])
def unmix(
    entries, starts, sizes, identities, gradients, seed, step, dropped,
    W: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply each gradient by the mask M / (1 - p) that ``mix`` drew."""
    program = tl.program_id(0)
    entry = tl.load(entries + program)
    start = tl.multiple_of(tl.load(starts + program), 16)
    size = tl.load(sizes + entry)
    if tl.load(gradients + entry) != 0:
        gradient = _pointer(gradients, entry, W, ALIGNED)
        QUARTER: tl.constexpr = BLOCK // 4
        a, b, c, d = _draw(seed, step, tl.load(identities + entry), start, QUARTER)
        at = start + tl.arange(0, QUARTER)
        if start + BLOCK <= size:
            _unmix(gradient, a, dropped, at, size, W, ACC, False)
            _unmix(gradient, b, dropped, at + QUARTER, size, W, ACC, False)
            _unmix(gradient, c, dropped, at + 2 * QUARTER, size, W, ACC, False)
            _unmix(gradient, d, dropped, at + 3 * QUARTER, size, W, ACC, False)
        else:
            _unmix(gradient, a, dropped, at, size, W, ACC, True)
            _unmix(gradient, b, dropped, at + QUARTER, size, W, ACC, True)
            _unmix(gradient, c, dropped, at + 2 * QUARTER, size, W, ACC, True)
            _unmix(gradient, d, dropped, at + 3 * QUARTER, size, W, ACC, True)
