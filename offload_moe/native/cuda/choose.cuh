/* The next token of each row: the greatest logit, or a draw by temperature, top-k and top-p.
 *
 * Sums of a draw are integers, so they depend on no order: the mass of a token is its share of the greatest token's probability, in
 * 2^-30. Its depth is how far it lies below the greatest logit, after the temperature, in 2^-26; deeper than 20.8 it has no mass. */
#ifndef OM_CHOOSE_CUH
#define OM_CHOOSE_CUH

#include "common.cuh"

#define OM_DIGITS 2048        /* values of a digit of a depth, or of an id */
#define OM_MASS_BITS 10       /* of a mass, that one bin adds up: three bins hold 30 bits of up to 2^22 tokens */
#define OM_DEEPEST 20.796875f /* 2^-30 is exp(-20.794) */

struct choose_memory {
    u32 bins[3 * OM_DIGITS]; /* low, middle and high bits of masses */
    u64 partial[32], below;
    u32 digit;
};

/* Greater for greater logits; a NaN is the greatest, as for torch, and of equal ones the lower id. */
OM_DEVICE u64 rank_of(float logit, u32 id) {
    const u32 bits = __float_as_uint(__fadd_rn(logit, 0.0f)); /* -0 and +0 are equal */
    const u32 ordered = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (0xffffffffu - id);
}

/* Of all threads; `partial` holds one for each warp. */
template <int THREADS> OM_DEVICE u64 greatest_of_block(u64 mine, u64 *partial) {
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const u64 other = __shfl_xor_sync(OM_WARP, mine, d);
        mine = other > mine ? other : mine;
    }
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) mine = partial[w] > mine ? partial[w] : mine;
    return mine;
}

OM_DEVICE void greatest(const om_card_choose_params &p, u64 *partial) {
    if (*p.pass.stop) return;
    const int row = blockIdx.y;
    if (row >= *p.pass.num_rows) return;
    const float *logits = p.logits + (long long)row * p.num_tokens;
    u64 mine = 0;
    for (int i = blockIdx.x * OM_GREATEST_THREADS + threadIdx.x; i < p.num_tokens; i += gridDim.x * OM_GREATEST_THREADS) {
        const u64 rank = rank_of(logits[i], i);
        mine = rank > mine ? rank : mine;
    }
    mine = greatest_of_block<OM_GREATEST_THREADS>(mine, partial);
    if (threadIdx.x == 0) p.greatest[(long long)row * gridDim.x + blockIdx.x] = mine;
}

/* Philox 4x32-10: 64 random bits of a seed and a position. Source: Salmon et al., "Parallel random numbers" (2011). */
OM_DEVICE u64 random_bits(u64 seed, u64 position) {
    u32 counter[4] = {(u32)position, (u32)(position >> 32), 0, 0}, key0 = (u32)seed, key1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 first = (u64)0xd2511f53u * counter[0], second = (u64)0xcd9e8d57u * counter[2];
        const u32 next0 = (u32)(second >> 32) ^ counter[1] ^ key0, next2 = (u32)(first >> 32) ^ counter[3] ^ key1;
        counter[1] = (u32)second, counter[3] = (u32)first, counter[0] = next0, counter[2] = next2;
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
    return (u64)counter[1] << 32 | counter[0];
}

/* a * b / 2^64, of b below 2^56. */
OM_DEVICE u64 high_product(u64 a, u64 b) {
    const u64 a_low = (u32)a, a_high = a >> 32, b_low = (u32)b, b_high = b >> 32;
    const u64 middle = a_high * b_low + (a_low * b_low >> 32), other = a_low * b_high + (u32)middle;
    return a_high * b_high + (middle >> 32) + (other >> 32);
}

/* What a row is drawn from. Tokens deeper than `depth` are left out. */
struct draw {
    const float *logits;
    int num_tokens;
    float greatest, inverse; /* logit, and 1 / temperature */
    u32 depth;
};

OM_DEVICE bool is_drawn(const draw &d, int id, float &t, u32 &depth) {
    t = __fmul_rn(__fadd_rn(d.logits[id], -d.greatest), d.inverse);
    if (!(t >= -OM_DEEPEST)) return false;
    depth = (u32)__float2int_rz(__fmul_rn(-t, 67108864.0f));
    return depth <= d.depth;
}

/* What is looked for: the depth that holds the k-th token, the depth through which masses reach a share of all, or the id through
 * which masses, by ascending id, reach a random part of all. */
enum { OM_BY_COUNT, OM_BY_SHARE, OM_BY_DRAW };

struct goal {
    u64 number; /* k, the share in 2^-24, or 64 random bits */
};

/* How much must be reached, of a total that is not 0. */
template <int GOAL> OM_DEVICE u64 target_of(const goal &g, u64 total) {
    if (GOAL == OM_BY_COUNT) return g.number < total ? g.number : total;
    if (GOAL == OM_BY_DRAW) return high_product(g.number, total) + 1;
    const u64 share = (total >> 24) * g.number + ((total & 0xffffffu) * g.number >> 24);
    return share ? share : 1;
}

template <int GOAL>
OM_DEVICE void add_tokens(const draw &d, u32 prefix, bool has_prefix, int shift, int width, choose_memory &m) {
    for (int id = threadIdx.x; id < d.num_tokens; id += OM_CHOOSE_THREADS) {
        float t;
        u32 depth;
        if (!is_drawn(d, id, t, depth)) continue;
        const u32 key = GOAL == OM_BY_DRAW ? (u32)id : depth;
        if (has_prefix && key >> (shift + width) != prefix) continue;
        u32 amount = GOAL == OM_BY_COUNT ? 1 : (u32)__float2int_rn(__fmul_rn(own_exp(t), 1073741824.0f));
        for (int part = 0; amount; part++, amount >>= OM_MASS_BITS) {
            const u32 bits = part < 2 ? amount & ((1u << OM_MASS_BITS) - 1) : amount; /* the greatest token has 2^30 */
            if (bits) atomicAdd(&m.bins[part * OM_DIGITS + (key >> shift & ((1u << width) - 1))], bits);
            if (part == 2) break;
        }
    }
}

OM_DEVICE u64 amount_of(const choose_memory &m, u32 digit) {
    u64 amount = 0;
    for (int part = 0; part < 3; part++) amount += (u64)m.bins[part * OM_DIGITS + digit] << part * OM_MASS_BITS;
    return amount;
}

/* By the first warp, of which a lane has 64 bins: the first digit that reaches the target, and what lies below it. */
template <int GOAL> OM_DEVICE void find_digit(const goal &g, bool is_first, u64 &target, u64 below, choose_memory &m) {
    const u32 lane = threadIdx.x;
    constexpr u32 EACH = OM_DIGITS / 32;
    u64 mine = 0;
    for (u32 i = 0; i < EACH; i++) mine += amount_of(m, lane * EACH + i);
    u64 through = mine;
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        const u64 before = __shfl_sync(OM_WARP, through, lane >= d ? lane - d : lane);
        through += lane >= d ? before : 0;
    }
    const u64 total = __shfl_sync(OM_WARP, through, 31);
    if (is_first) target = target_of<GOAL>(g, total);
    below += through - mine;
    if (below >= target || below + mine < target) return;
    u32 digit = lane * EACH;
    for (u64 amount; below + (amount = amount_of(m, digit)) < target; digit++) below += amount;
    m.digit = digit, m.below = below;
}

/* The depth or id that reaches the goal, digit by digit from the highest: bits 30 to 20 of a depth, 10 and 10 more; bits 21 to 11
 * of an id, 11 more. */
template <int GOAL> OM_DEVICE u32 select(const draw &d, const goal &g, choose_memory &m) {
    u64 target = 0, below = 0;
    u32 prefix = 0;
    for (int shift = GOAL == OM_BY_DRAW ? 11 : 20; shift >= 0; shift -= GOAL == OM_BY_DRAW ? 11 : 10) {
        const bool is_first = shift == (GOAL == OM_BY_DRAW ? 11 : 20);
        const int width = is_first || GOAL == OM_BY_DRAW ? 11 : 10;
        for (int i = threadIdx.x; i < 3 * OM_DIGITS; i += OM_CHOOSE_THREADS) m.bins[i] = 0;
        __syncthreads();
        add_tokens<GOAL>(d, prefix, !is_first, shift, width, m);
        __syncthreads();
        if (threadIdx.x < 32) find_digit<GOAL>(g, is_first, target, below, m);
        __syncthreads();
        prefix = prefix << width | m.digit, below = m.below;
    }
    return prefix;
}

OM_DEVICE int drawn(const om_card_sampling &s, draw &d, int position, choose_memory &m) {
    const goal count = {(u64)(s.top_k > 0 ? s.top_k : 0)}, share = {(u64)__float2int_rn(__fmul_rn(s.top_p, 16777216.0f))};
    const goal random = {random_bits(s.seed, (u64)position)};
    if (s.top_k > 0) d.depth = select<OM_BY_COUNT>(d, count, m);
    if (s.top_p < 1.0f) d.depth = select<OM_BY_SHARE>(d, share, m);
    return (int)select<OM_BY_DRAW>(d, random, m);
}

OM_DEVICE void choose(const om_card_choose_params &p, choose_memory &m) {
    if (*p.pass.stop) return;
    const int row = blockIdx.x, num_parts = OM_GREATEST_BLOCKS(p.num_tokens);
    if (row >= *p.pass.num_rows) return;
    const u64 mine = threadIdx.x < num_parts ? p.greatest[(long long)row * num_parts + threadIdx.x] : 0;
    const u64 greatest = greatest_of_block<OM_CHOOSE_THREADS>(mine, m.partial);
    int token = (int)(0xffffffffu - (u32)greatest);
    const om_card_sampling &s = p.sampling[row];
    draw d = {p.logits + (long long)row * p.num_tokens, p.num_tokens, 0.0f, 0.0f, 0xffffffffu};
    d.greatest = d.logits[token];
    const bool is_finite = (__float_as_uint(d.greatest) & 0x7fffffffu) < 0x7f800000u;
    if (s.temperature > 0.0f && is_finite) {
        d.inverse = __fdiv_rn(1.0f, s.temperature);
        token = drawn(s, d, p.positions[row], m);
    }
    if (threadIdx.x == 0) p.tokens[row] = token;
}

#define OM_DEFINE_GREATEST(name) \
    OM_KERNEL __launch_bounds__(OM_GREATEST_THREADS) name(const om_card_choose_params p) { \
        __shared__ u64 partial[OM_GREATEST_THREADS / 32]; \
        greatest(p, partial); \
    }

#define OM_DEFINE_CHOOSE(name) \
    OM_KERNEL __launch_bounds__(OM_CHOOSE_THREADS) name(const om_card_choose_params p) { \
        __shared__ choose_memory memory; \
        choose(p, memory); \
    }

#endif
