/* Kernels for tests of the shim and of the fake driver. */
struct om_add_params {
    const float *from;
    float *to;
    float value;
    int count;
};
extern "C" __global__ void om_add(const om_add_params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) p.to[i] = __fadd_rn(p.from[i], p.value);
}

struct om_reverse_params {
    const float *from;
    float *to;
    int skips_barrier, reads_far;
};
extern "C" __global__ void __launch_bounds__(2 * (32)) om_reverse(const om_reverse_params p) {
    __shared__ float values[64];
    const unsigned t = threadIdx.x;
    values[t] = p.from[blockIdx.x * 64 + t];
    if (!p.skips_barrier) __syncthreads();
    p.to[blockIdx.x * 64 + t] = values[63 - t];
    if (p.reads_far && blockIdx.x > 0) p.to[blockIdx.x * 64 + t] = p.to[t]; /* what another block wrote */
}

/* The sum of each warp's values, then that of all blocks by the last one of them to come. */
struct om_sum_params {
    const int *from;
    int *parts, *count, *total;
    int skips_fence;
};
extern "C" __global__ void om_sum(const om_sum_params p) {
    __shared__ int is_last;
    int sum = p.from[blockIdx.x * 32 + threadIdx.x];
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x == 0) {
        p.parts[blockIdx.x] = sum;
        if (!p.skips_fence) __threadfence();
        is_last = atomicAdd(p.count, 1) == (int)gridDim.x - 1;
        if (!p.skips_fence) __threadfence();
    }
    __syncthreads();
    if (!is_last || threadIdx.x) return;
    sum = 0;
    for (unsigned b = 0; b < gridDim.x; b++) sum += p.parts[b];
    *p.total = sum;
}

struct om_diverge_params {
    int kind;
    int *to;
};
extern "C" __global__ void om_diverge(const om_diverge_params p) {
    __shared__ int values[32];
    if (p.kind == 0) p.to[threadIdx.x] = values[threadIdx.x]; /* never written */
    if (p.kind == 1) {
        if (threadIdx.x < 32) __syncthreads();
        else
            __syncthreads();
    }
    if (p.kind == 2 && threadIdx.x > 0) p.to[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

struct om_flag_params {
    int *flag, *data;
    int value;
};
extern "C" __global__ void om_flag(const om_flag_params p) {
    *p.data = p.value;
    __threadfence_system();
    *p.flag = p.value;
}

/* Lanes of a warp read what they then overwrite, behind a barrier of the warp or not. */
struct om_turns_params {
    int *to;
    int skips_warp_barrier;
};
extern "C" __global__ void om_turns(const om_turns_params p) {
    __shared__ int values[64];
    const int t = threadIdx.x, first = t / 32 * 32;
    values[t] = t;
    __syncwarp();
    const int next = values[first + (t + 1) % 32];
    const int all = values[first];
    if (!p.skips_warp_barrier) __syncwarp();
    values[t] = next + all;
    __syncwarp();
    p.to[t] = values[first + (t + 1) % 32];
}
