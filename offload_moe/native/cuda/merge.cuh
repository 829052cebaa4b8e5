/* What sections of attention give together: means of values, or of latents, which become means of values. */
#ifndef OM_MERGE_CUH
#define OM_MERGE_CUH

#include "quantize.cuh"
#include "softmax.cuh"
#include "view.cuh"

/* Two neighbouring features of a head of a row; at: row * N + head. sink: NULL if it has none. */
OM_DEVICE float2 merge_two(const om_card_attended &attended, long long at, int num_sections, int dims, int feature, const float *sink) {
    const om_card_section *sections = attended.sections + at * attended.capacity;
    const float *sums = attended.sums + at * attended.capacity * dims + feature;
    float greatest = sink ? *sink : OM_LEAST, total = 0.0f;
    float2 out = {0.0f, 0.0f};
#pragma unroll 4
    for (int s = 0; s < num_sections; s++) greatest = sections[s].greatest > greatest ? sections[s].greatest : greatest;
#pragma unroll 4
    for (int s = 0; s < num_sections; s++) {
        const float factor = own_exp(__fadd_rn(sections[s].greatest, -greatest));
        const float2 of_section = *(const float2 *)(sums + (long long)s * dims);
        total = __fmaf_rn(factor, sections[s].sum, total);
        out.x = __fmaf_rn(factor, of_section.x, out.x), out.y = __fmaf_rn(factor, of_section.y, out.y);
    }
    if (sink) total = __fadd_rn(total, own_exp(__fadd_rn(*sink, -greatest)));
    const float share = __fdiv_rn(1.0f, total);
    out.x = __fmul_rn(out.x, share), out.y = __fmul_rn(out.y, share);
    return out;
}

/* A warp has a block of 64 features of a row. */
template <int N, int D> OM_DEVICE void merge(const om_card_merge_params &p) {
    if (*p.pass.stop) return;
    const int row = blockIdx.y, feature = 64 * blockIdx.x + 2 * threadIdx.x, head = feature / D;
    if (row >= *p.pass.num_rows) return;
    float2 pair = {0.0f, 0.0f};
    if (head < N) {
        const int num_sections = sections_of(tokens_seen(p.view, row));
        pair = merge_two(*p.attended, (long long)row * N + head, num_sections, D, feature % D, p.sinks ? p.sinks + head : nullptr);
        if (p.gates) {
            const float2 gate = *(const float2 *)(p.gates + ((long long)row * N + head) * 2 * D + D + feature % D);
            pair.x = __fmul_rn(pair.x, over(1.0f, gate.x)), pair.y = __fmul_rn(pair.y, over(1.0f, gate.y));
        }
        if (p.out) *(float2 *)(p.out + (long long)row * N * D + feature) = pair;
    }
    quantize_for<OM_CARD_UP(N * D, 64)>(p.inputs, row, blockIdx.x, pair.x, pair.y);
}

/* CODEC: of the expansion. A thread block has a block of 64 value features of all rows; four threads multiply one of its rows, each
 * with eight of 32 lanes. */
template <int CODEC, int N, int K, int V, int Z, int R> struct expand_of {
    static constexpr bool IS_BF16 = CODEC == OM_BF16;
    struct memory {
        alignas(16) float means[R][Z];
        float values[R][64];
    };

    static __device__ __forceinline__ void find_means(const om_card_expand_params &p, int head, int num_rows, memory &m) {
        for (int i = threadIdx.x; i < num_rows * (Z / 2); i += OM_EXPAND_THREADS) {
            const int row = i / (Z / 2), at = i % (Z / 2) * 2, num_sections = sections_of(tokens_seen(p.view, row));
            const float2 pair = merge_two(*p.attended, (long long)row * N + head, num_sections, Z, at, nullptr);
            m.means[row][at] = pair.x, m.means[row][at + 1] = pair.y;
        }
    }

    static __device__ __forceinline__ void load(const unsigned char *row, int at, float (&values)[8]) {
        if (IS_BF16) {
            const uint4 words = load16(row + at * 2);
            values[0] = low_half(words.x), values[1] = high_half(words.x), values[2] = low_half(words.y), values[3] = high_half(words.y);
            values[4] = low_half(words.z), values[5] = high_half(words.z), values[6] = low_half(words.w), values[7] = high_half(words.w);
        } else {
            const uint4 a = load16(row + at * 4), b = load16(row + at * 4 + 16);
            const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int e = 0; e < 8; e++) values[e] = __uint_as_float(words[e]);
        }
    }

    /* sums[t][e]: lane 8 * quarter + e of the row times the means of row t. */
    static __device__ __forceinline__ void multiply(const unsigned char *matrix_row, int quarter, const memory &m, float (&sums)[R][8]) {
#pragma unroll 4
        for (int at = 8 * quarter; at < Z; at += 32) {
            float weights[8];
            load(matrix_row, at, weights);
#pragma unroll
            for (int t = 0; t < R; t++) {
                const float4 a = *(const float4 *)(m.means[t] + at), b = *(const float4 *)(m.means[t] + at + 4);
                const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                for (int e = 0; e < 8; e++) sums[t][e] = __fmaf_rn(x[e], weights[e], sums[t][e]);
            }
        }
    }

    /* Lanes 16 apart are two threads apart, those 8 apart one. */
    static __device__ __forceinline__ float sum_of_row(float (&lanes)[8]) {
#pragma unroll
        for (int d = 2; d; d >>= 1)
#pragma unroll
            for (int e = 0; e < 8; e++) lanes[e] = __fadd_rn(lanes[e], __shfl_xor_sync(OM_WARP, lanes[e], d));
#pragma unroll
        for (int d = 4; d; d >>= 1)
#pragma unroll
            for (int e = 0; e < d; e++) lanes[e] = __fadd_rn(lanes[e], lanes[e + d]);
        return lanes[0];
    }
};

template <class E, int N, int K, int V, int Z, int R> OM_DEVICE void expand(const om_card_expand_params &p, typename E::memory &m) {
    if (*p.pass.stop) return;
    const int num_rows = *p.pass.num_rows, in_block = threadIdx.x / 4, quarter = threadIdx.x % 4, warp = threadIdx.x / 32;
    const int feature = 64 * blockIdx.x + in_block, first_head = 64 * blockIdx.x / V, last = OM_CARD_LEAST(64 * (int)blockIdx.x + 63, N * V - 1);
    const int own_head = OM_CARD_LEAST(feature, last) / V;
    if (threadIdx.x < 64 * 4)
        for (int t = quarter; t < R; t += 4) m.values[t][in_block] = 0.0f; /* columns behind the last one */
#pragma unroll 1
    for (int head = first_head; head <= last / V; head++) {
        E::find_means(p, head, num_rows, m);
        __syncthreads();
        const long long matrix_row = (long long)own_head * (K + V) + K + OM_CARD_LEAST(feature, last) % V;
        float sums[R][8] = {};
        E::multiply(p.expansion + matrix_row * Z * (E::IS_BF16 ? 2 : 4), quarter, m, sums);
#pragma unroll
        for (int t = 0; t < R; t++) {
            const float value = E::sum_of_row(sums[t]);
            if (quarter == 0 && own_head == head && feature <= last && t < num_rows) m.values[t][in_block] = value;
        }
        __syncthreads();
    }
    const int at = threadIdx.x % 32 * 2, column = 64 * blockIdx.x + at;
    if (warp >= num_rows) return;
    const float even = m.values[warp][at], odd = m.values[warp][at + 1];
    float *out = p.out ? p.out + (long long)warp * N * V + column : nullptr;
    if (out && column <= last) out[0] = even;
    if (out && column + 1 <= last) out[1] = odd;
    quantize_for<OM_CARD_UP(N * V, 64)>(p.inputs, warp, blockIdx.x, even, odd);
}

#define OM_DEFINE_MERGE(name, num_heads, value_dim) \
    OM_KERNEL __launch_bounds__(OM_MERGE_THREADS) name(const om_card_merge_params p) { merge<num_heads, value_dim>(p); }

#define OM_DEFINE_EXPAND(name, codec, num_heads, unrotated_dims, value_dims, rank, R) \
    OM_KERNEL __launch_bounds__(OM_EXPAND_THREADS, 2) name(const om_card_expand_params p) { \
        typedef expand_of<codec, num_heads, unrotated_dims, value_dims, rank, R> sizes; \
        __shared__ sizes::memory memory; \
        expand<sizes, num_heads, unrotated_dims, value_dims, rank, R>(p, memory); \
    }

#endif
