"""The programs that run on a GPU, in Gluon: Triton with explicit layouts. Imported on use only, because Triton is.

A block is 4096 neighbouring numbers, seen as 128 words of 32 signs. The 256 threads of a program hold 16 of them each.
Random signs are made where they are used: one Philox counter a thread, exchanged through shared memory. H_4096 is
three Hadamard transforms of 16 numbers, each in the registers of one thread, with an exchange between threads before
the second and the third. All sums have a fixed order and nothing is added by atomics, so results do not depend on
timing. Measured instructions, registers and traffic are in docs/hardware.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7


@gluon.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four random words of each counter: Philox4x32-10, as in ``gradsketch.random``."""
    A: gl.constexpr = 0xD2511F53
    B: gl.constexpr = 0xCD9E8D57
    for _ in gl.static_range(10):
        p0, p2 = c0, c2
        c0 = gl.umulhi(gl.full_like(p2, B), p2) ^ c1 ^ k0
        c2 = gl.umulhi(gl.full_like(p0, A), p0) ^ c3 ^ k1
        c1 = p2 * B
        c3 = p0 * A
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@gluon.jit
def sign_words(counter, identity, stream):
    """The words of each counter, in order; ``stream`` says per counter which four words of ``identity`` it takes."""
    upper2 = gl.load(identity + stream * 4).to(gl.uint32, bitcast=True)
    upper3 = gl.load(identity + stream * 4 + 1).to(gl.uint32, bitcast=True)
    key0 = gl.load(identity + stream * 4 + 2).to(gl.uint32, bitcast=True)
    key1 = gl.load(identity + stream * 4 + 3).to(gl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox(counter.to(gl.uint32), (counter >> 32).to(gl.uint32), upper2, upper3, key0, key1)
    words = gl.join(gl.join(w0, w2), gl.join(w1, w3))
    return words.reshape([4 * counter.shape[0]])


@gluon.jit
def with_signs(x, words, layout: gl.constexpr):
    """A block with the sign of each number flipped where its bit of 128 words in shared memory is set."""
    word = words.load(gl.SliceLayout(1, layout))
    bit = gl.arange(0, 32, gl.SliceLayout(0, layout)).to(gl.uint32)
    mask = gl.expand_dims(word, 1) << (31 - gl.expand_dims(bit, 0)) & 0x80000000
    return (x.to(gl.uint32, bitcast=True) ^ mask).to(gl.float32, bitcast=True)


@gluon.jit
def hadamard16(v):
    """Unnormalised H_16 over the last four dims of size 2, all held by one thread."""
    a, b = gl.split(v)
    p, q = a + b, a - b
    pa, pb = gl.split(p)
    qa, qb = gl.split(q)
    p0, p1, q0, q1 = pa + pb, pa - pb, qa + qb, qa - qb
    a0, b0 = gl.split(p0)
    a1, b1 = gl.split(q0)
    a2, b2 = gl.split(p1)
    a3, b3 = gl.split(q1)
    c0, d0, c1, d1 = a0 + b0, a0 - b0, a1 + b1, a1 - b1
    c2, d2, c3, d3 = a2 + b2, a2 - b2, a3 + b3, a3 - b3
    e0, f0 = gl.split(c0)
    e1, f1 = gl.split(c1)
    e2, f2 = gl.split(c2)
    e3, f3 = gl.split(c3)
    e4, f4 = gl.split(d0)
    e5, f5 = gl.split(d1)
    e6, f6 = gl.split(d2)
    e7, f7 = gl.split(d3)
    # Joined so that the last dims are bit 3, bit 2, bit 1, bit 0.
    y0 = gl.join(e0 + f0, e0 - f0)
    y1 = gl.join(e1 + f1, e1 - f1)
    y2 = gl.join(e2 + f2, e2 - f2)
    y3 = gl.join(e3 + f3, e3 - f3)
    y4 = gl.join(e4 + f4, e4 - f4)
    y5 = gl.join(e5 + f5, e5 - f5)
    y6 = gl.join(e6 + f6, e6 - f6)
    y7 = gl.join(e7 + f7, e7 - f7)
    z0, z1, z2, z3 = gl.join(y0, y4), gl.join(y1, y5), gl.join(y2, y6), gl.join(y3, y7)
    return gl.join(gl.join(z0, z2), gl.join(z1, z3))


@gluon.jit
def hadamard_high(y):
    """H_16 over bits 11, 10, 1 and 0 of the position in a block."""
    v = gl.permute(y.reshape([2, 2, 256, 2, 2]), [2, 0, 1, 3, 4])
    return gl.permute(hadamard16(v), [1, 2, 0, 3, 4]).reshape([128, 32])


@gluon.jit
def hadamard_inner(y, before: gl.constexpr, after: gl.constexpr):
    """H_16 over the four bits that have ``before`` values of higher bits and ``after`` of lower ones around them."""
    v = gl.permute(y.reshape([before, 2, 2, 2, 2, after]), [0, 5, 1, 2, 3, 4])
    return gl.permute(hadamard16(v), [0, 2, 3, 4, 5, 1]).reshape([128, 32])


@gluon.jit
def hadamard_middle(y):
    """H_16 over bits 9 to 6."""
    return hadamard_inner(y, 4, 64)


@gluon.jit
def hadamard_low(y):
    """H_16 over bits 5 to 2."""
    return hadamard_inner(y, 64, 4)


@gluon.constexpr_function
def block_layout(registers, threads, wave64):
    """Who holds which number of a block: the bits of its position that name register and thread, lanes first."""

    def basis(bits):
        return [[0, 1 << bit] if bit < 5 else [1 << (bit - 5), 0] for bit in bits]

    lanes = 6 if wave64 else 5
    return gl.DistributedLinearLayout(basis(registers), basis(threads[:lanes]), basis(threads[lanes:]), [], [128, 32])


@gluon.constexpr_function
def high_layout(wave64):
    """Bits 11, 10, 1 and 0 in registers: 16 bytes of neighbours at a time from and to memory."""
    return block_layout([0, 1, 10, 11], [2, 3, 4, 5, 6, 7, 8, 9], wave64)


@gluon.constexpr_function
def middle_layout(wave64):
    """Bits 9 to 6 in registers."""
    return block_layout([6, 7, 8, 9], [2, 3, 4, 5, 0, 1, 10, 11], wave64)


@gluon.constexpr_function
def low_layout(wave64):
    """Bits 5 to 2 in registers."""
    return block_layout([2, 3, 4, 5], [0, 6, 7, 8, 9, 1, 10, 11], wave64)


@gluon.constexpr_function
def flat_layout(wave64):
    """One number a thread and round."""
    return gl.BlockedLayout([1], [64 if wave64 else 32], [4 if wave64 else 8], [0])


@gluon.jit
def positions(layout: gl.constexpr):
    """The position in its block of each number of a thread."""
    word = gl.arange(0, 128, gl.SliceLayout(1, layout))
    bit = gl.arange(0, 32, gl.SliceLayout(0, layout))
    return gl.expand_dims(word, 1) * 32 + gl.expand_dims(bit, 0)


@gluon.jit(do_not_specialize=["classes", "splits"])
def fold_blocks(x, partial, identity, n: gl.int64, classes, splits, T: gl.constexpr, WAVE64: gl.constexpr):
    """partial[row, split, class·4096 …] = Σ second · H_4096 · first · x over the split's blocks of the class.

    A program takes T blocks a round. The next block is on its way while this one is worked on.
    """
    HIGH: gl.constexpr = high_layout(WAVE64)
    MIDDLE: gl.constexpr = middle_layout(WAVE64)
    LOW: gl.constexpr = low_layout(WAVE64)
    FLAT: gl.constexpr = flat_layout(WAVE64)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pid, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    x += row * n
    partial += (row * splits + pid // classes) * classes * 4096 + (pid % classes) * 4096
    words = gl.allocate_shared_memory(gl.uint32, [T * 64 * 4], SHARED)
    k = gl.arange(0, T * 64, FLAT)  # the first half of the counters for the first signs, the second for the second
    e = positions(HIGH)
    total = gl.full([128, 32], 0, gl.float32, LOW)
    blocks = (n + 4095) // 4096
    step = classes * splits
    i = gl.to_tensor(pid).to(gl.int64) * 4096 + e
    coming = gl.load(x + i, mask=i < n, other=0.0)
    for begin in range(pid, blocks, step * T):
        block = begin + ((k % (T * 32)) // 32).to(gl.int64) * step
        drawn = sign_words(block * 32 + k % 32, identity, k // (T * 32))
        barrier()
        words.store(drawn)
        barrier()
        for t in gl.static_range(T):
            y = coming.to(gl.float32)
            i = (begin + (t + 1) * step).to(gl.int64) * 4096 + e
            coming = gl.load(x + i, mask=i < n, other=0.0)
            y = hadamard_high(with_signs(y, words.slice(t * 128, 128), HIGH))
            y = hadamard_middle(gl.convert_layout(y, MIDDLE))
            y = gl.convert_layout(hadamard_low(gl.convert_layout(y, LOW)), LOW)
            total += with_signs(y, words.slice((T + t) * 128, 128), LOW)
    gl.store(partial + e, gl.convert_layout(total * 0.015625, HIGH))


@gluon.jit(do_not_specialize=["classes"])
def repeat_blocks(u, out, identity, n: gl.int64, classes, T: gl.constexpr, WAVE64: gl.constexpr):
    """The adjoint of ``fold_blocks``: out = first · H_4096 · second · (u repeated). A program makes T neighbours."""
    HIGH: gl.constexpr = high_layout(WAVE64)
    MIDDLE: gl.constexpr = middle_layout(WAVE64)
    LOW: gl.constexpr = low_layout(WAVE64)
    FLAT: gl.constexpr = flat_layout(WAVE64)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    begin, row = gl.program_id(0) * T, gl.program_id(1).to(gl.int64)
    u += row * classes * 4096
    out += row * n
    words = gl.allocate_shared_memory(gl.uint32, [T * 64 * 4], SHARED)
    k = gl.arange(0, T * 64, FLAT)  # here the first half of the counters is for the second signs
    words.store(sign_words(gl.to_tensor(begin).to(gl.int64) * 32 + k % (T * 32), identity, 1 - k // (T * 32)))
    barrier()
    e, source = positions(HIGH), positions(LOW)
    for t in gl.static_range(T):
        block = begin + t
        y = gl.load(u + (block % classes) * 4096 + source) * 0.015625
        y = hadamard_low(with_signs(y, words.slice(t * 128, 128), LOW))
        y = hadamard_middle(gl.convert_layout(y, MIDDLE))
        y = gl.convert_layout(hadamard_high(gl.convert_layout(y, HIGH)), HIGH)
        i = gl.to_tensor(block).to(gl.int64) * 4096 + e
        gl.store(out + i, with_signs(y, words.slice((T + t) * 128, 128), HIGH), mask=i < n)


@gluon.jit(do_not_specialize=["classes", "splits"])
def fold_signs(x, partial, identity, n: gl.int64, classes, splits, T: gl.constexpr, WAVE64: gl.constexpr):
    """partial[row, split, class·4096 …] = Σ first · x over the split's blocks of the class."""
    HIGH: gl.constexpr = high_layout(WAVE64)
    FLAT: gl.constexpr = flat_layout(WAVE64)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pid, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    x += row * n
    partial += (row * splits + pid // classes) * classes * 4096 + (pid % classes) * 4096
    words = gl.allocate_shared_memory(gl.uint32, [T * 32 * 4], SHARED)
    k = gl.arange(0, T * 32, FLAT)
    e = positions(HIGH)
    total = gl.full([128, 32], 0, gl.float32, HIGH)
    blocks = (n + 4095) // 4096
    step = classes * splits
    for begin in range(pid, blocks, step * T):
        drawn = sign_words((begin + (k // 32).to(gl.int64) * step) * 32 + k % 32, identity, k // (T * 32))
        barrier()
        words.store(drawn)
        barrier()
        for t in gl.static_range(T):
            i = (begin + t * step).to(gl.int64) * 4096 + e
            y = gl.load(x + i, mask=i < n, other=0.0).to(gl.float32)
            total += with_signs(y, words.slice(t * 128, 128), HIGH)
    gl.store(partial + e, total)


@gluon.jit(do_not_specialize=["classes"])
def repeat_signs(u, out, identity, n: gl.int64, classes, T: gl.constexpr, WAVE64: gl.constexpr):
    """The adjoint of ``fold_signs``: out = first · (u repeated). A program makes T neighbours."""
    HIGH: gl.constexpr = high_layout(WAVE64)
    FLAT: gl.constexpr = flat_layout(WAVE64)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    begin, row = gl.program_id(0) * T, gl.program_id(1).to(gl.int64)
    u += row * classes * 4096
    out += row * n
    words = gl.allocate_shared_memory(gl.uint32, [T * 32 * 4], SHARED)
    k = gl.arange(0, T * 32, FLAT)
    words.store(sign_words(gl.to_tensor(begin).to(gl.int64) * 32 + k, identity, k // (T * 32)))
    barrier()
    e = positions(HIGH)
    for t in gl.static_range(T):
        block = begin + t
        y = gl.load(u + (block % classes) * 4096 + e)
        i = gl.to_tensor(block).to(gl.int64) * 4096 + e
        gl.store(out + i, with_signs(y, words.slice(t * 128, 128), HIGH), mask=i < n)


@gluon.jit(do_not_specialize=["count", "width"])
def add_rows(partial, out, count, width, T: gl.constexpr, WAVE64: gl.constexpr):
    """out[row, column] = Σ partial[row, :, column] over ``count`` terms, 32 columns a program, T terms a round."""
    BOTH: gl.constexpr = gl.BlockedLayout([1, 1], [2 if WAVE64 else 1, 32], [4 if WAVE64 else 8, 1], [1, 0])
    pid, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    partial += row * count * width
    out += row * width
    term = gl.expand_dims(gl.arange(0, T, gl.SliceLayout(1, BOTH)), 1)
    column = gl.expand_dims(pid * 32 + gl.arange(0, 32, gl.SliceLayout(0, BOTH)), 0)
    total = gl.full([T, 32], 0, gl.float32, BOTH)
    for begin in range(0, count, T):
        here = begin + term
        total += gl.load(partial + here * width + column, mask=(here < count) & (column < width), other=0.0)
    one = pid * 32 + gl.arange(0, 32, gl.SliceLayout(0, BOTH))
    gl.store(out + one, gl.sum(total, 0), mask=one < width)
