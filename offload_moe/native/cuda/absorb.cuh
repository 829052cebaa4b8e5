/* Latent attention before its sections: queries move into the space of latents, and the cache gets latents and rotated keys.
 * Source: DeepSeek-V2, arXiv:2405.04434. */
#ifndef OM_ABSORB_CUH
#define OM_ABSORB_CUH

#include "heads.cuh"

/* Sums have 32 lanes by unrotated dim. A warp has the eight lanes that are equal to its number modulo 4; a thread, two dims of the
 * latent, so that the matrix is read as it lies: rows are dims of a key, a warp's loads are whole lines. */
#define OM_ABSORB_DIMS 64
#define OM_ABSORB_LANES 8

template <int CODEC, int N, int K, int P, int V, int Z, int R> struct absorb_of {
    static constexpr bool IS_BF16 = CODEC == OM_BF16;
    static constexpr int PARTS = OM_ABSORB_BLOCKS(Z), STEPS = OM_CARD_UP(K, 32), WIDTH = IS_BF16 ? 1 : 2;
    union memory {
        struct {
            float query[R][K], rotated[R][P], sums[4][R][OM_ABSORB_DIMS];
        } of_query;
        struct {
            float values[Z + P], factor;
        } of_latent;
    };
    /* Two neighbours of each row of the matrix that the warp's lanes meet. */
    struct columns {
        u32 words[OM_ABSORB_LANES][STEPS][WIDTH];
    };
    struct sums {
        float of[R][2];
    };

    static __device__ __forceinline__ columns load(const unsigned char *matrix, int head, int warp, int dim) {
        columns c;
        const long long first = (long long)head * (K + V) * Z + dim;
#pragma unroll
        for (int n = 0; n < OM_ABSORB_LANES; n++)
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const int wanted = warp + 4 * n + 32 * i, row = K % 32 == 0 || wanted < K ? wanted : K - 1;
                const unsigned char *at = matrix + (first + (long long)row * Z) * (IS_BF16 ? 2 : 4);
                c.words[n][i][0] = load4(at);
                if (!IS_BF16) c.words[n][i][WIDTH - 1] = load4(at + 4);
            }
        return c;
    }

    static __device__ __forceinline__ sums lane(const columns &c, const memory &m, int warp, int n) {
        sums s;
#pragma unroll
        for (int t = 0; t < R; t++) s.of[t][0] = s.of[t][1] = 0.0f;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int k = warp + 4 * n + 32 * i;
            const float first = IS_BF16 ? low_half(c.words[n][i][0]) : __uint_as_float(c.words[n][i][0]);
            const float second = IS_BF16 ? high_half(c.words[n][i][0]) : __uint_as_float(c.words[n][i][WIDTH - 1]);
#pragma unroll
            for (int t = 0; t < R; t++) {
                if (K % 32 == 0 || k < K) {
                    const float x = m.of_query.query[t][k];
                    s.of[t][0] = __fmaf_rn(x, first, s.of[t][0]), s.of[t][1] = __fmaf_rn(x, second, s.of[t][1]);
                } else if (K % 16 && k < OM_CARD_UP(K, 16) * 16) { /* a product of zeros fills the vector */
                    s.of[t][0] = __fadd_rn(s.of[t][0], 0.0f), s.of[t][1] = __fadd_rn(s.of[t][1], 0.0f);
                }
            }
        }
        return s;
    }

    /* Lanes n and n + 4 are added first (16 apart), then 2 and 1. */
    template <int FIRST, int STEP> static __device__ __forceinline__ sums fold(const columns &c, const memory &m, int warp) {
        if constexpr (STEP == OM_ABSORB_LANES) return lane(c, m, warp, FIRST);
        else {
            sums a = fold<FIRST, 2 * STEP>(c, m, warp);
            const sums b = fold<FIRST + STEP, 2 * STEP>(c, m, warp);
#pragma unroll
            for (int t = 0; t < R; t++) a.of[t][0] = __fadd_rn(a.of[t][0], b.of[t][0]), a.of[t][1] = __fadd_rn(a.of[t][1], b.of[t][1]);
            return a;
        }
    }

    static __device__ __forceinline__ void load_query(const om_card_absorb_params &p, int head, int num_rows, memory &m) {
        for (int i = threadIdx.x; i < num_rows * (K + P); i += OM_ABSORB_THREADS) {
            const int row = i / (K + P), dim = i % (K + P), at = head * (K + P) + dim;
            const float value = with_bias(p.heads[(long long)row * N * (K + P) + at], p.biases[0], at);
            if (dim < K) m.of_query.query[row][dim] = value;
            else m.of_query.rotated[row][dim - K] = value;
        }
    }

    static __device__ __forceinline__ void move_query(const om_card_absorb_params &p, int head, int part, int num_rows, memory &m) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = part * OM_ABSORB_DIMS, dim = first + 2 * lane;
        const columns c = load(p.expansion, head, warp, dim < Z ? dim : 0);
        load_query(p, head, num_rows, m);
        __syncthreads();
        const sums s = fold<0, 1>(c, m, warp);
#pragma unroll
        for (int t = 0; t < R; t++) {
            m.of_query.sums[warp][t][2 * lane] = s.of[t][0];
            m.of_query.sums[warp][t][2 * lane + 1] = s.of[t][1];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_rows * OM_ABSORB_DIMS; i += OM_ABSORB_THREADS) {
            const int row = i / OM_ABSORB_DIMS, at = i % OM_ABSORB_DIMS;
            const float even = __fadd_rn(m.of_query.sums[0][row][at], m.of_query.sums[2][row][at]);
            const float odd = __fadd_rn(m.of_query.sums[1][row][at], m.of_query.sums[3][row][at]);
            if (first + at < Z) p.query[((long long)row * N + head) * (Z + P) + first + at] = __fadd_rn(even, odd);
        }
    }

    /* The rotated dims stay as they are in the space of latents. */
    template <int ROTATION>
    static __device__ __forceinline__ void rotate_query(const om_card_absorb_params &p, int head, int num_rows, const memory &m) {
        for (int i = threadIdx.x; i < num_rows * P; i += OM_ABSORB_THREADS) {
            const int row = i / P, dim = i % P;
            const long long turn = (long long)p.view.positions[row] * P;
            p.query[((long long)row * N + head) * (Z + P) + Z + dim] =
                turned<P, ROTATION>(m.of_query.rotated[row], p.angles.cos + turn, p.angles.signed_sin + turn, dim);
        }
    }

    template <int ROTATION> static __device__ __forceinline__ void append(const om_card_absorb_params &p, int row, memory &m) {
        float *values = m.of_latent.values;
        for (int i = threadIdx.x; i < Z + P; i += OM_ABSORB_THREADS)
            values[i] = with_bias(p.compressed[(long long)row * (Z + P) + i], p.biases[1], i);
        find_factor(values, Z, p.epsilon, &m.of_latent.factor);
        const om_card_room &room = p.view.rooms[row];
        const int token = own_token(p.view, row);
        const long long turn = (long long)p.view.positions[row] * P;
        u16 *latent = row_of_token(room.key_pages, 0, token, Z), *key = row_of_token(room.value_pages, 0, token, P);
        for (int i = threadIdx.x; i < Z; i += OM_ABSORB_THREADS)
            latent[i] = to_bf16(__fmul_rn(__fmul_rn(values[i], m.of_latent.factor), p.norm[i]));
        for (int i = threadIdx.x; i < P; i += OM_ABSORB_THREADS)
            key[i] = to_bf16(turned<P, ROTATION>(values + Z, p.angles.cos + turn, p.angles.signed_sin + turn, i));
    }
};

template <class A, int ROTATION> OM_DEVICE void absorb(const om_card_absorb_params &p, int num_heads, typename A::memory &m) {
    if (*p.pass.stop) return;
    const int num_rows = *p.pass.num_rows, head = blockIdx.x / A::PARTS, part = blockIdx.x % A::PARTS;
    if (head < num_heads) {
        A::move_query(p, head, part, num_rows, m);
        if (part == 0) A::template rotate_query<ROTATION>(p, head, num_rows, m);
        return;
    }
    const int row = blockIdx.x - num_heads * A::PARTS;
    if (row < num_rows) A::template append<ROTATION>(p, row, m);
}

#define OM_DEFINE_ABSORB(name, codec, num_heads, unrotated_dims, rotated_dims, value_dims, rank, rotation, R) \
    OM_KERNEL __launch_bounds__(OM_ABSORB_THREADS) name(const om_card_absorb_params p) { \
        typedef absorb_of<codec, num_heads, unrotated_dims, rotated_dims, value_dims, rank, R> sizes; \
        __shared__ sizes::memory memory; \
        absorb<sizes, rotation>(p, num_heads, memory); \
    }

#endif
