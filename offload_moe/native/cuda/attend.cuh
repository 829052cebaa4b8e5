/* Sections of attention: scores, their exponentials, sums of values. The order of additions is that of csrc/attend.h. */
#ifndef OM_ATTEND_CUH
#define OM_ATTEND_CUH

#include "attend_units.cuh"

template <class LONG, class SHORT> struct attend_memory {
    alignas(16) float floats[LONG::FLOATS > SHORT::FLOATS ? LONG::FLOATS : SHORT::FLOATS];
    attended_rows rows;
    section_pages pages;
    attend_unit unit; /* not in registers: they are all needed for scores */
    bool has_long_units;
};

OM_DEVICE void widen8(uint4 words, float (&values)[8]) {
    values[0] = low_half(words.x), values[1] = high_half(words.x), values[2] = low_half(words.y), values[3] = high_half(words.y);
    values[4] = low_half(words.z), values[5] = high_half(words.z), values[6] = low_half(words.w), values[7] = high_half(words.w);
}

/* sums[h][r] += q[h] * keys[r] for 16 dims: eight of sixteen lanes. A tile that has less heads than others repeats its last one. */
template <class U>
OM_DEVICE void add_products(const u16 *const (&keys)[2], const float *q, int last_head, float (&sums)[U::TILE][2][8]) {
    float key[2][8];
    widen8(load16(keys[0]), key[0]), widen8(load16(keys[1]), key[1]);
#pragma unroll
    for (int h = 0; h < U::TILE; h++) {
        const float *of_head = q + (U::NUM_HEADS_OF_UNIT % U::TILE == 0 ? h : OM_CARD_LEAST(h, last_head)) * U::WIDTH;
        const float4 a = *(const float4 *)of_head, b = *(const float4 *)(of_head + 4);
        const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int e = 0; e < 8; e++) sums[h][r][e] = __fmaf_rn(x[e], key[r][e], sums[h][r][e]);
    }
}

/* Of a thread's own token: half of its lanes are the other thread's, whose own token is this one's second. */
OM_DEVICE float sum_of_own(const float (&sums)[2][8]) {
    float own[8];
#pragma unroll
    for (int e = 0; e < 8; e++) own[e] = __fadd_rn(sums[0][e], __shfl_xor_sync(OM_WARP, sums[1][e], 1));
#pragma unroll
    for (int d = 4; d; d >>= 1)
#pragma unroll
        for (int e = 0; e < d; e++) own[e] = __fadd_rn(own[e], own[e + d]);
    return own[0];
}

/* A thread's own token of 32, or the other one of its pair, from its lanes on; behind the last token that. */
template <int DIMS> OM_DEVICE const u16 *key_of_pair(const u16 *const *pages, const attend_unit &u, int first, int is_other) {
    const int in_warp = thread_of_now() % 32, token = first + in_warp / 2 + 16 * (in_warp % 2 ^ is_other);
    return row_in<DIMS>(pages, u, OM_CARD_LEAST(token, u.count - 1)) + in_warp % 2 * 8;
}

/* scores[head * OM_CARD_SECTION + token]; those behind the last token say nothing. A warp takes 32 tokens and a tile of heads; two
 * threads share two tokens. */
template <class U>
OM_DEVICE void score_section(const attend_unit &u, const section_pages &pages, const float *q, float scaling, float *scores) {
    const int warp = threadIdx.x / 32, pair = threadIdx.x % 32 / 2, is_upper = threadIdx.x % 2, lanes = 8 * is_upper;
#pragma unroll 1
    for (int item = warp; item < OM_CARD_SECTION / 32 * U::TILES; item += U::WARPS) {
        const int tile = item % U::TILES, first = item / U::TILES * 32;
        if (first >= u.count) break;
        float sums[U::TILE][2][8] = {};
        const float *queries = q + tile * U::TILE * U::WIDTH + lanes;
        const u16 *keys[2] = {key_of_pair<U::KEY_DIMS>(pages.keys, u, first, 0), key_of_pair<U::KEY_DIMS>(pages.keys, u, first, 1)};
#pragma unroll 1
        for (int i = 0; i < U::WIDTH; i += 16, queries += 16, keys[0] += 16, keys[1] += 16) {
            if (U::MORE_DIMS > 0 && i == U::KEY_DIMS)
                for (int r = 0; r < 2; r++) keys[r] = key_of_pair<U::MORE_DIMS>(pages.values, u, first, r);
            add_products<U>(keys, queries, U::NUM_HEADS_OF_UNIT - 1 - tile * U::TILE, sums);
        }
#pragma unroll
        for (int h = 0; h < U::TILE; h++) {
            const float score = __fmul_rn(sum_of_own(sums[h]), scaling);
            const int head = tile * U::TILE + h, token = first + pair + 16 * is_upper;
            if (head < U::NUM_HEADS_OF_UNIT) scores[head * OM_CARD_SECTION + token] = score;
        }
    }
}

/* scores -> exponentials of their distances from each head's greatest. */
template <class U> OM_DEVICE void soften_section(const attend_unit &u, float *scores, om_card_section *sections, int stride) {
    const int thread = thread_of_now(), warp = thread / 32, head = warp / U::WARPS_OF_HEAD, part = warp % U::WARPS_OF_HEAD;
    const bool has_head = head < u.num_heads;
    float *own = scores + head * OM_CARD_SECTION;
    const float greatest = has_head ? greatest_of_warp(own, u.count) : 0.0f;
    if constexpr (U::WARPS_OF_HEAD > 1) __syncthreads();
    if (has_head)
        for (int i = thread % (32 * U::WARPS_OF_HEAD); i < u.count; i += 32 * U::WARPS_OF_HEAD)
            own[i] = own_exp(__fadd_rn(own[i], -greatest));
    __syncthreads();
    if (!has_head || part > 0) return;
    const float sum = sum_of_warp(own, u.count);
    if (thread % 32 == 0) sections[head * (long long)stride] = {greatest, sum};
}

OM_DEVICE void load_words(const u16 *row, u32 (&words)[1]) { words[0] = load4(row); }
OM_DEVICE void load_words(const u16 *row, u32 (&words)[2]) {
    const uint2 w = load8(row);
    words[0] = w.x, words[1] = w.y;
}
OM_DEVICE void load_weights(const float *weights, float (&weight)[1]) { weight[0] = *weights; }
OM_DEVICE void load_weights(const float *weights, float (&weight)[4]) {
    const float4 w = *(const float4 *)weights;
    weight[0] = w.x, weight[1] = w.y, weight[2] = w.z, weight[3] = w.w;
}

/* sums[h] += weights[h][token] * a thread's features of the values of COUNT tokens, ascending. */
template <class U, int COUNT>
OM_DEVICE void weigh_tokens(const attend_unit &u, const section_pages &pages, bool are_keys, int token, int feature,
                            const float *weights, float (&sums)[U::NUM_HEADS_OF_UNIT][U::VECTOR]) {
    const u16 *const *of_section = are_keys ? pages.keys : pages.values;
    const u16 *first = row_in<U::VALUE_DIMS>(of_section, u, token) + feature;
    u32 words[COUNT][U::VECTOR / 2];
    if (are_in_page<COUNT>(u, token)) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) load_words(first + k * U::VALUE_DIMS, words[k]);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; k++) load_words(row_in<U::VALUE_DIMS>(of_section, u, token + k) + feature, words[k]);
    }
#pragma unroll
    for (int h = 0; h < U::NUM_HEADS_OF_UNIT; h++) {
        float weight[COUNT];
        load_weights(weights + h * OM_CARD_SECTION + token, weight);
#pragma unroll
        for (int k = 0; k < COUNT; k++)
#pragma unroll
            for (int v = 0; v < U::VECTOR; v += 2) {
                sums[h][v] = __fmaf_rn(weight[k], low_half(words[k][v / 2]), sums[h][v]);
                sums[h][v + 1] = __fmaf_rn(weight[k], high_half(words[k][v / 2]), sums[h][v + 1]);
            }
    }
}

/* A tile of up to 64 tokens. */
template <class U>
OM_DEVICE void weigh_tile(const attend_unit &u, const section_pages &pages, int tile, int feature, const float *weights,
                          float (&sums)[U::NUM_HEADS_OF_UNIT][U::VECTOR]) {
    constexpr bool ARE_KEYS = U::MORE_DIMS > 0; /* latents are keys and values */
    const int end = OM_CARD_LEAST(64 * tile + 64, u.count);
    int token = 64 * tile;
#pragma unroll
    for (int h = 0; h < U::NUM_HEADS_OF_UNIT; h++)
#pragma unroll
        for (int v = 0; v < U::VECTOR; v++) sums[h][v] = 0.0f;
#pragma unroll 1
    for (; token + 4 <= end; token += 4) weigh_tokens<U, 4>(u, pages, ARE_KEYS, token, feature, weights, sums);
#pragma unroll 1
    for (; token < end; token++) weigh_tokens<U, 1>(u, pages, ARE_KEYS, token, feature, weights, sums);
}

/* results[head * stride * VALUE_DIMS + feature]: tiles of 64 tokens, each from +0, are added in ascending order. */
template <class U>
OM_DEVICE void weigh_section(const attend_unit &u, const section_pages &pages, const float *weights, float *parts, float *results,
                             int stride) {
    constexpr int HEADS = U::NUM_HEADS_OF_UNIT, DIMS = U::VALUE_DIMS;
    const int thread = thread_of_now(), across = thread % U::ACROSS, at_once = thread / U::ACROSS, num_tiles = OM_CARD_UP(u.count, 64);
    float total[U::OWNED] = {};
#pragma unroll 1
    for (int first = 0; first < num_tiles; first += U::AT_ONCE) {
        float sums[HEADS][U::VECTOR];
        const bool has_tile = at_once < U::AT_ONCE; /* without tokens behind the last one */
        if (has_tile) weigh_tile<U>(u, pages, first + at_once, across * U::VECTOR, weights, sums);
        if constexpr (U::AT_ONCE == 1) {
#pragma unroll
            for (int n = 0; n < U::OWNED; n++)
                if (has_tile) total[n] = __fadd_rn(total[n], sums[n / U::VECTOR][n % U::VECTOR]);
        } else {
            if (has_tile)
#pragma unroll
                for (int n = 0; n < HEADS * U::VECTOR; n++)
                    parts[(at_once * HEADS + n / U::VECTOR) * DIMS + across * U::VECTOR + n % U::VECTOR] = sums[n / U::VECTOR][n % U::VECTOR];
            __syncthreads();
            const int count = OM_CARD_LEAST(U::AT_ONCE, num_tiles - first);
#pragma unroll
            for (int n = 0; n < U::OWNED; n++) {
                const int at = n * OM_ATTEND_THREADS + thread;
                if (at < HEADS * DIMS)
                    for (int i = 0; i < count; i++) total[n] = __fadd_rn(total[n], parts[i * HEADS * DIMS + at]);
            }
            if (first + U::AT_ONCE < num_tiles) __syncthreads();
        }
    }
#pragma unroll
    for (int n = 0; n < U::OWNED; n++) {
        const int at = n * OM_ATTEND_THREADS + thread;
        const int head = U::AT_ONCE == 1 ? n / U::VECTOR : at / DIMS;
        const int feature = U::AT_ONCE == 1 ? across * U::VECTOR + n % U::VECTOR : at % DIMS;
        if (head < u.num_heads && (U::AT_ONCE > 1 || at_once == 0)) results[head * (long long)stride * DIMS + feature] = total[n];
    }
}

template <class U> OM_DEVICE void load_queries(const attend_unit &u, const float *queries, float *q) {
    const float *from = queries + ((long long)u.row * U::NUM_HEADS + u.first_head) * U::WIDTH;
    for (int i = thread_of_now(); i < U::NUM_HEADS_OF_UNIT * U::WIDTH; i += OM_ATTEND_THREADS)
        q[i] = i < u.num_heads * U::WIDTH ? from[i] : 0.0f;
}

/* Where the first head's section is among all of them. */
template <class U> OM_DEVICE long long place_of(const attend_unit &u, const om_card_attended &attended) {
    return ((long long)u.row * U::NUM_HEADS + u.first_head) * attended.capacity + u.section;
}

/* Units of this block. */
template <class U, class MEMORY> OM_DEVICE void attend_units(const om_card_attend_params &p, MEMORY &m) {
    float *scores = m.floats, *q = m.floats + U::NUM_HEADS_OF_UNIT * OM_CARD_SECTION;
#pragma unroll 1
    for (;;) {
        if (threadIdx.x == 0) take_unit<U>(m.rows, m.unit);
        __syncthreads();
        if (m.unit.row < 0) return;
        if (m.unit.count > 0) {
            find_pages(p.view.rooms[m.unit.row], m.unit, m.pages);
            load_queries<U>(m.unit, p.query, q);
            __syncthreads();
            score_section<U>(m.unit, m.pages, q, p.scaling, scores);
            __syncthreads();
            soften_section<U>(m.unit, scores, p.attended->sections + place_of<U>(m.unit, *p.attended), p.attended->capacity);
            float *sums = p.attended->sums + place_of<U>(m.unit, *p.attended) * U::VALUE_DIMS;
            weigh_section<U>(m.unit, m.pages, scores, q, sums, p.attended->capacity);
        }
        __syncthreads();
    }
}

template <class LONG, class SHORT> OM_DEVICE void attend(const om_card_attend_params &p, attend_memory<LONG, SHORT> &m) {
    if (*p.pass.stop) return;
    const int num_rows = *p.pass.num_rows;
    if ((int)threadIdx.x < num_rows) load_row(p.view, threadIdx.x, m.rows);
    __syncthreads();
    if (threadIdx.x == 0) {
        find_sequences(num_rows, m.rows);
        const int num_heads = sections_of_rows(m.rows, num_rows) * LONG::NUM_KV_HEADS;
        /* Where units of several heads do not occupy the card, each has one. */
        m.has_long_units = num_heads * LONG::PARTS >= (int)gridDim.x;
        m.rows.num_units = num_heads * (m.has_long_units ? LONG::PARTS : SHORT::PARTS);
        m.rows.next_unit = blockIdx.x;
    }
    __syncthreads();
    if (m.has_long_units) attend_units<LONG>(p, m);
    else attend_units<SHORT>(p, m);
}

#define OM_DEFINE_ATTEND(name, num_heads, num_kv_heads, dim, more_dim, value_dim) \
    OM_KERNEL __launch_bounds__(OM_ATTEND_THREADS, 2) name(const om_card_attend_params p) { \
        constexpr int HEADS = OM_ATTEND_HEADS(num_heads / num_kv_heads); \
        typedef attend_unit_of<num_heads, num_kv_heads, dim, more_dim, value_dim, HEADS> many; \
        typedef attend_unit_of<num_heads, num_kv_heads, dim, more_dim, value_dim, 1> one; \
        __shared__ attend_memory<many, one> memory; \
        attend<many, one>(p, memory); \
    }

#endif
