/* Experts and gated MLPs: gate and up, activation and int8 in one kernel, the second matrix and the weight in another. */
#ifndef OM_EXPERTS_CUH
#define OM_EXPERTS_CUH

#include "quantize.cuh"
#include "segments.cuh"

#define OM_MOST_ROWS 8

/* The pairs (a row of activations and a place among its experts) that an expert has: in shared memory, or from `first` on. */
struct expert_pairs {
    const int *of;
    int first, count;
};

OM_DEVICE int pair_at(const expert_pairs &pairs, int n) { return pairs.of ? pairs.of[n] : pairs.first + n; }

struct pair_memory {
    int of_row[OM_MOST_ROWS], of[OM_MOST_ROWS], count;
};

/* The thread block's expert is that of the pair blockIdx.y; the first pair of those with its address computes all of them.
 * Returns its record, or NULL: another thread block, or another launch. */
template <int R>
OM_DEVICE const u8 *find_pairs(const om_card_pass &pass, const om_card_address *addresses, int top_k, expert_pairs &pairs,
                               pair_memory &m) {
    const int num_pairs = *pass.num_rows * top_k, first = blockIdx.y;
    if (first >= num_pairs) return 0;
    const om_card_address address = addresses[first];
    pairs.of = 0, pairs.first = first, pairs.count = 1;
    if (R == 1 || !address) return (const u8 *)address;
    if (threadIdx.x < OM_MOST_ROWS) m.of_row[threadIdx.x] = -1;
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += blockDim.x)
        if (addresses[pair] == address) m.of_row[pair / top_k] = pair; /* experts of a row are distinct */
    __syncthreads();
    if (threadIdx.x == 0) {
        m.count = 0;
        for (int row = 0; row < OM_MOST_ROWS; row++)
            if (m.of_row[row] >= 0) m.of[m.count++] = m.of_row[row];
    }
    __syncthreads();
    pairs.of = m.of, pairs.count = m.count;
    return m.of[0] == first ? (const u8 *)address : 0;
}

/* Rows of an input that a tile reads: of its pairs, or of their rows of activations. The last one fills the tile. */
template <int T> OM_DEVICE tile_rows<T> rows_of(const expert_pairs &pairs, int first, int divisor) {
    tile_rows<T> rows;
#pragma unroll
    for (int t = 0; t < T; t++) rows.of[t] = pair_at(pairs, first + t < pairs.count ? first + t : pairs.count - 1) / divisor;
    return rows;
}

/* One tile through the panels. */
template <class G, int CODEC, int COLS, int GROUP, int PARTS, int T, bool ALIGNED>
OM_DEVICE void multiply_tile(const panel_part (&parts)[PARTS], int panel, bool are_whole, const om_card_input &input,
                             const tile_rows<T> &rows, typename G::memory &m) {
    if (are_whole)
        multiply_panels<G, CODEC, COLS, GROUP, PARTS, T, true, ALIGNED>(parts, panel, input, rows, m);
    else
        multiply_panels<G, CODEC, COLS, GROUP, PARTS, T, false, false>(parts, panel, input, rows, m);
}

struct activation_numbers {
    float alpha, limit;
};

/* Gate and up rows of a thread block: where their biases are. */
struct bias_place {
    const u8 *records[2];
    om_card_matrix matrices[2];
    int first_rows[2];
};

template <int CODEC, int NEXT, int COLS, int INTERMEDIATE, int R, int ACTIVATION, int HAS_GATE, bool ALIGNED> struct first_matrix {
    static constexpr int PARTS = HAS_GATE ? 2 : 1, GROUP = 4 * PARTS, TILE = OM_EXPERT_TILE(R);
    static constexpr int BLOCKS = OM_CARD_UP(INTERMEDIATE, 64), GROUPS = NEXT == OM_MXFP4 ? 2 : 1;
    typedef panel_group<CODEC, COLS, GROUP, PARTS, TILE> group;
    static constexpr int THREADS = group::THREADS, LEAST_BLOCKS = occupancy<CODEC, THREADS, TILE, INTERMEDIATE % 16 == 0>::BLOCKS;
    struct memory {
        typename group::memory panels;
        float hidden[TILE * 64];
        pair_memory pairs;
    };

    OM_DEVICE float with_bias(const bias_place &place, int part, int row, float value) {
        if (place.matrices[part].bias < 0) return value;
        return __fadd_rn(value, bias_at(place.records[part], place.matrices[part], place.first_rows[part] + row));
    }

    /* memory.hidden: the activations of 64 features, zeros behind the last one. */
    OM_DEVICE void activate(const bias_place &place, const activation_numbers &numbers, int tile, memory &m) {
        for (int i = threadIdx.x; i < tile * 64; i += THREADS) {
            const int feature = i % 64, row = blockIdx.x * 64 + feature, t = i / 64;
            float value = 0.0f;
            if (row < INTERMEDIATE) {
                const int at = feature / 16 * tile * 16 + t * 16 + feature % 16;
                const float gate = with_bias(place, 0, row, m.panels.results[at]);
                const float up = HAS_GATE ? with_bias(place, PARTS - 1, row, m.panels.results[at + 4 * tile * 16]) : 0.0f;
                if (ACTIVATION == OM_GPT_OSS)
                    value = gpt_oss(numbers.alpha, numbers.limit, gate, up);
                else
                    value = HAS_GATE ? __fmul_rn(activation<ACTIVATION>(gate), up) : activation<ACTIVATION>(gate);
            }
            m.hidden[i] = value;
        }
    }

    template <int T>
    OM_DEVICE void run_tile(const panel_part (&parts)[PARTS], const om_card_input &input, const expert_pairs &pairs, int first,
                            int divisor, const bias_place &place, const activation_numbers &numbers, const om_card_input &hidden,
                            memory &m) {
        const bool are_whole = INTERMEDIATE % 16 == 0 || (blockIdx.x + 1) * 64 <= INTERMEDIATE;
        multiply_tile<group, CODEC, COLS, GROUP, PARTS, T, ALIGNED>(parts, blockIdx.x * 4, are_whole, input,
                                                                    rows_of<T>(pairs, first, divisor), m.panels);
        activate(place, numbers, T, m);
        __syncthreads();
        for (int t = threadIdx.x / 32; t < T; t += THREADS / 32) {
            if (first + t >= pairs.count) break;
            const int lane = threadIdx.x % 32, at = pair_at(pairs, first + t) * BLOCKS + blockIdx.x;
            quantize_block<NEXT>(m.hidden[t * 64 + 2 * lane], m.hidden[t * 64 + 2 * lane + 1], hidden.quants + 64 * at,
                                 hidden.scales + GROUPS * at);
        }
    }

    OM_DEVICE void run(const panel_part (&parts)[PARTS], const om_card_input &input, const expert_pairs &pairs, int divisor,
                       const bias_place &place, const activation_numbers &numbers, const om_card_input &hidden, memory &m) {
        fill_map<CODEC, THREADS>(m.panels.tables);
        if (TILE == 1 || pairs.count == 1) {
            run_tile<1>(parts, input, pairs, 0, divisor, place, numbers, hidden, m);
        } else if constexpr (TILE > 1) {
            for (int first = 0; first < pairs.count; first += TILE)
                run_tile<TILE>(parts, input, pairs, first, divisor, place, numbers, hidden, m);
        }
    }

    OM_DEVICE void of_experts(const om_card_first_params &p, memory &m) {
        if (*p.pass.stop) return;
        expert_pairs pairs;
        const u8 *record = find_pairs<R>(p.pass, p.addresses, p.top_k, pairs, m.pairs);
        if (!record) return;
        panel_part parts[PARTS];
        constexpr int FIRST_UP = OM_IS_GGUF(CODEC) ? 0 : INTERMEDIATE;
        const om_card_matrix up = OM_IS_GGUF(CODEC) ? p.up : p.matrix;
        parts[0] = open_part<CODEC, COLS>(record, p.matrix, 0, INTERMEDIATE);
        if (HAS_GATE) parts[PARTS - 1] = open_part<CODEC, COLS>(record, up, FIRST_UP, INTERMEDIATE);
        const bias_place place = {{record, record}, {p.matrix, up}, {0, FIRST_UP}};
        const activation_numbers numbers = {p.alpha, p.limit};
        run(parts, p.input, pairs, p.pairs_of_input, place, numbers, p.hidden, m);
    }

    OM_DEVICE void of_mlp(const om_card_mlp_first_params &p, memory &m) {
        if (*p.pass.stop) return;
        const expert_pairs pairs = {0, 0, *p.pass.num_rows};
        panel_part parts[PARTS];
        for (int n = 0; n < PARTS; n++) parts[n] = open_part<CODEC, COLS>(p.records[n], p.matrices[n], 0, INTERMEDIATE);
        const bias_place place = {{p.records[0], p.records[1]}, {p.matrices[0], p.matrices[1]}, {0, 0}};
        const activation_numbers numbers = {0.0f, 0.0f};
        run(parts, p.input, pairs, 1, place, numbers, p.hidden, m);
    }
};

template <int CODEC, int COLS, int ROWS, int R> struct second_matrix {
    static constexpr int GROUP = OM_LINEAR_GROUP(CODEC, COLS), TILE = OM_EXPERT_TILE(R);
    typedef panel_group<CODEC, COLS, GROUP, 1, TILE> group;
    static constexpr int THREADS = group::THREADS, LEAST_BLOCKS = occupancy<CODEC, THREADS, TILE, ROWS % 16 == 0>::BLOCKS;
    struct memory {
        typename group::memory panels;
        pair_memory pairs;
        int ranks[OM_MOST_ROWS];
    };

    /* What is made of a tile's results: `store(t, row, value)` has the bias in its value. */
    template <int T, class Store>
    OM_DEVICE void run_tile(const panel_part (&parts)[1], const u8 *record, const om_card_matrix &matrix, const om_card_input &hidden,
                            const expert_pairs &pairs, int first, const Store &store, memory &m) {
        const int panel = blockIdx.x * GROUP;
        const bool are_whole = ROWS % 16 == 0 || (panel + GROUP) * 16 <= ROWS;
        multiply_tile<group, CODEC, COLS, GROUP, 1, T, true>(parts, panel, are_whole, hidden, rows_of<T>(pairs, first, 1), m.panels);
        for (int i = threadIdx.x; i < GROUP * T * 16; i += THREADS) {
            const int row = (panel + i / (T * 16)) * 16 + i % 16, t = first + i / 16 % T;
            if (t >= pairs.count || row >= ROWS) continue;
            float value = m.panels.results[i];
            if (matrix.bias >= 0) value = __fadd_rn(value, bias_at(record, matrix, row));
            store.put(t, row, value);
        }
    }

    template <class Store>
    OM_DEVICE void run(const u8 *record, const om_card_matrix &matrix, const om_card_input &hidden, const expert_pairs &pairs,
                       const Store &store, memory &m) {
        const panel_part parts[1] = {open_part<CODEC, COLS>(record, matrix, 0, ROWS)};
        fill_map<CODEC, THREADS>(m.panels.tables);
        if (TILE == 1 || pairs.count == 1) {
            run_tile<1>(parts, record, matrix, hidden, pairs, 0, store, m);
        } else if constexpr (TILE > 1) {
            for (int first = 0; first < pairs.count; first += TILE)
                run_tile<TILE>(parts, record, matrix, hidden, pairs, first, store, m);
        }
    }

    struct store_pairs {
        const om_card_second_params &p;
        const expert_pairs &pairs;
        const int *ranks;
        __device__ __forceinline__ void put(int t, int row, float value) const {
            const int pair = pair_at(pairs, t), of_row = pair / p.top_k;
            if (p.weights) value = __fmul_rn(__fmul_rn(p.weights[pair], p.weight_scale), value);
            p.pairs[((long long)of_row * p.stride + ranks[t]) * ROWS + row] = value;
        }
    };

    /* The place of each pair's expert among those of its row, ascending; visible after the next barrier. */
    OM_DEVICE void find_ranks(const om_card_second_params &p, const expert_pairs &pairs, memory &m) {
        if (threadIdx.x >= pairs.count) return;
        const int pair = pair_at(pairs, threadIdx.x), *ids = p.ids + pair / p.top_k * p.top_k;
        int rank = 0;
        for (int k = 0; k < p.top_k; k++) rank += ids[k] < p.ids[pair];
        m.ranks[threadIdx.x] = rank;
    }

    OM_DEVICE void of_experts(const om_card_second_params &p, memory &m) {
        if (*p.pass.stop) return;
        expert_pairs pairs;
        const u8 *record = find_pairs<R>(p.pass, p.addresses, p.top_k, pairs, m.pairs);
        if (!record) return;
        find_ranks(p, pairs, m);
        const store_pairs store = {p, pairs, m.ranks};
        run(record, p.matrix, p.hidden, pairs, store, m);
    }

    struct store_rows {
        const om_card_mlp_second_params &p;
        __device__ __forceinline__ void put(int t, int row, float value) const {
            if (p.shares) value = __fmul_rn(p.shares[t], value);
            p.out[(long long)t * p.stride * ROWS + row] = value;
        }
    };

    OM_DEVICE void of_mlp(const om_card_mlp_second_params &p, memory &m) {
        if (*p.pass.stop) return;
        const expert_pairs pairs = {0, 0, *p.pass.num_rows};
        const store_rows store = {p};
        run(p.record, p.matrix, p.hidden, pairs, store, m);
    }
};

/* Scales of the up rows begin behind those of the gate rows: where rows are no multiple of 16, not where words do. */
#define OM_ARE_ALIGNED(intermediate) ((intermediate) % 16 == 0)

#define OM_DEFINE_OF(name, type, params, run) \
    OM_KERNEL __launch_bounds__(type::THREADS, type::LEAST_BLOCKS) name(const params p) { \
        __shared__ type::memory memory; \
        type::run(p, memory); \
    }

#define OM_DEFINE_FIRST(name, codec, hidden, intermediate, R, activation, has_gate) \
    typedef first_matrix<codec, codec, hidden, intermediate, R, activation, has_gate, OM_ARE_ALIGNED(intermediate)> name##_of; \
    OM_DEFINE_OF(name, name##_of, om_card_first_params, of_experts)

#define OM_DEFINE_SECOND(name, codec, intermediate, hidden, R) \
    typedef second_matrix<codec, intermediate, hidden, R> name##_of; \
    OM_DEFINE_OF(name, name##_of, om_card_second_params, of_experts)

#define OM_DEFINE_MLP_FIRST(name, codec, next_codec, hidden, intermediate, R, activation) \
    typedef first_matrix<codec, next_codec, hidden, intermediate, R, activation, 1, true> name##_of; \
    OM_DEFINE_OF(name, name##_of, om_card_mlp_first_params, of_mlp)

#define OM_DEFINE_MLP_SECOND(name, codec, intermediate, hidden, R) \
    typedef second_matrix<codec, intermediate, hidden, R> name##_of; \
    OM_DEFINE_OF(name, name##_of, om_card_mlp_second_params, of_mlp)

#endif
