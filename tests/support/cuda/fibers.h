/* The threads of a CUDA block as fibers of one thread of the CPU, one block after another.
 *
 * Between two meeting points the order of the threads, and the order of the blocks, follow from a seed: 0 ascending, 1
 * descending, others at random. Barriers and shuffles are real meeting points: a thread that does not come, or that waits at
 * another barrier than the rest, is a named error. Shared memory is poisoned before each block. */
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>
#include "trace.h"
#define SHIM_QUIET __attribute__((no_sanitize("thread"), noinline))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr unsigned MAX_THREADS = 1024, STACK_BYTES = 1 << 17;
enum state { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct fiber {
    void *stack_pointer, *stack;
    ucontext_t context; /* where the switch below is not known */
    unsigned index;
    state now;
    int line; /* of the barrier it waits at */
};

inline dim3 grid, block, block_index, thread_index;
inline fiber fibers[MAX_THREADS], scheduler;
inline unsigned num_threads;
inline fiber *self;
inline std::function<void()> body;
inline uint64_t slots[2][MAX_THREADS]; /* of shuffles, by turns: a lane may already be at the next one */
inline unsigned turns[MAX_THREADS];
inline uint64_t random_state;
inline unsigned order_seed;

SHIM_QUIET inline unsigned random_below(unsigned n) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (unsigned)((random_state >> 33) % n);
}

[[noreturn]] inline void fail(const char *what, int first = 0, int second = 0) {
    std::fprintf(stderr, "shim: block (%u, %u, %u): ", block_index.x, block_index.y, block_index.z);
    std::fprintf(stderr, what, first, second);
    std::fprintf(stderr, "\n");
    std::abort();
}

#ifdef __x86_64__ /* swapcontext makes two system calls */
extern "C" __attribute__((visibility("hidden"))) void shim_switch(void **from, void *to);
asm(".text\n.hidden shim_switch\n.weak shim_switch\n.type shim_switch, @function\nshim_switch:\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".size shim_switch, . - shim_switch\n");
SHIM_QUIET inline void jump(fiber &from, fiber &to) { shim_switch(&from.stack_pointer, to.stack_pointer); }
SHIM_QUIET inline void prepare(fiber &f, void (*start)()) {
    void **top = (void **)((char *)f.stack + STACK_BYTES) - 2; /* after the `ret` the stack is as after a call */
    top[0] = (void *)start, top[1] = nullptr;
    f.stack_pointer = std::fill_n(top - 6, 6, nullptr) - 6;
}
#else
inline void jump(fiber &from, fiber &to) { swapcontext(&from.context, &to.context); }
inline void prepare(fiber &f, void (*start)()) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&f.context, start, 0);
}
#endif

SHIM_QUIET inline void leave(state next) {
    self->now = next;
    is_inside = false;
    jump(*self, scheduler);
    is_inside = true;
}

SHIM_QUIET inline void enter(fiber &f) {
    self = &f;
    thread_index = dim3(f.index % block.x, f.index / block.x % block.y, f.index / (block.x * block.y));
    jump(scheduler, f);
}

inline void start() {
    is_inside = true;
    body();
    leave(DONE);
    __builtin_unreachable();
}

inline void barrier(int line) {
    self->line = line;
    leave(AT_BARRIER);
}

/* A value of another lane. It orders no memory, as on a card. */
template <class T> SHIM_QUIET T shuffle(unsigned mask, T value, unsigned lane) {
    static_assert(sizeof value <= sizeof slots[0][0]);
    const unsigned turn = turns[self->index]++ & 1, first = self->index & ~31u;
    if (mask != 0xffffffffu || num_threads % 32) fail("only whole warps shuffle");
    __builtin_memcpy(&slots[turn][self->index], &value, sizeof value);
    leave(AT_SHUFFLE);
    __builtin_memcpy(&value, &slots[turn][first + lane % 32], sizeof value);
    return value;
}

inline void warp_barrier(unsigned mask) {
    shuffle(mask, 0, 0);
    trace_warp_barrier();
}

extern "C" __attribute__((weak, visibility("hidden"))) char __start_shim_shared[], __stop_shim_shared[];

SHIM_QUIET inline void poison_shared() {
    if (__start_shim_shared) std::memset(__start_shim_shared, 0xff, __stop_shim_shared - __start_shim_shared);
}

/* Run the lanes of a warp that can run, in an order of the seed. Returns whether one could. */
SHIM_QUIET inline bool run_warp(unsigned first, unsigned end) {
    const unsigned size = end - first, turn = order_seed > 1 ? random_below(size) : 0;
    const bool descending = order_seed == 1 || (order_seed > 1 && random_below(2));
    bool moved = false;
    for (unsigned n = 0; n < size; n++) {
        fiber &f = fibers[first + ((descending ? size - 1 - n : n) + turn) % size];
        if (f.now == READY) enter(f), moved = true;
    }
    const auto waits = [](const fiber &f) { return f.now == AT_SHUFFLE; };
    if (std::all_of(fibers + first, fibers + end, waits))
        for (unsigned i = first; i < end; i++) fibers[i].now = READY;
    return moved;
}

/* Release the barrier if all threads that are left wait at it. Returns whether any thread is left. */
SHIM_QUIET inline bool meet() {
    const fiber *waiting = nullptr, *elsewhere = nullptr;
    for (unsigned i = 0; i < num_threads; i++) {
        if (fibers[i].now == AT_SHUFFLE) elsewhere = &fibers[i];
        if (fibers[i].now == AT_BARRIER && waiting && waiting->line != fibers[i].line)
            fail("threads wait at different barriers: lines %d and %d", waiting->line, fibers[i].line);
        if (fibers[i].now == AT_BARRIER) waiting = &fibers[i];
    }
    if (elsewhere) fail("thread %d shuffles, and others of its warp do not come", (int)elsewhere->index);
    for (unsigned i = 0; i < num_threads; i++)
        if (fibers[i].now == AT_BARRIER) fibers[i].now = READY;
    if (waiting) trace_barrier();
    return waiting != nullptr;
}

SHIM_QUIET inline void run_block() {
    poison_shared();
    trace_block();
    for (unsigned i = 0; i < num_threads; i++) {
        fibers[i].index = i, fibers[i].now = READY, turns[i] = 0;
        prepare(fibers[i], start);
    }
    const unsigned num_warps = (num_threads + 31) / 32;
    do {
        const unsigned turn = order_seed > 1 ? random_below(num_warps) : 0;
        for (bool moved = true; moved;) {
            moved = false;
            for (unsigned n = 0; n < num_warps; n++) {
                const unsigned w = ((order_seed == 1 ? num_warps - 1 - n : n) + turn) % num_warps;
                for (unsigned steps = order_seed > 1 ? 1 + random_below(4) : 1; steps; steps--)
                    moved |= run_warp(32 * w, std::min(32 * w + 32, num_threads));
            }
        }
    } while (meet());
}

SHIM_QUIET inline void *stacks() {
    static void *all = mmap(nullptr, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) fail("no memory for stacks");
    for (unsigned i = 0; i < num_threads; i++) fibers[i].stack = (char *)all + (size_t)i * STACK_BYTES;
    return all;
}

/* Run a kernel, already bound to its arguments. Not from two threads at once. */
SHIM_QUIET inline void launch(dim3 of_grid, dim3 of_block, unsigned seed, std::function<void()> of_body) {
    grid = of_grid, block = of_block, body = std::move(of_body), order_seed = seed;
    random_state = 0x9e3779b97f4a7c15u ^ ((uint64_t)seed << 20);
    num_threads = block.x * block.y * block.z;
    const unsigned num_blocks = grid.x * grid.y * grid.z;
    if (num_threads == 0 || num_threads > MAX_THREADS || num_blocks == 0) fail("%d threads in %d blocks", (int)num_threads, (int)num_blocks);
    trace_launch(stacks(), (uint64_t)MAX_THREADS * STACK_BYTES);
    std::vector<unsigned> blocks(num_blocks);
    for (unsigned i = 0; i < num_blocks; i++) blocks[i] = seed == 1 ? num_blocks - 1 - i : i;
    if (seed > 1)
        for (unsigned i = num_blocks - 1; i > 0; i--) std::swap(blocks[i], blocks[random_below(i + 1)]);
    for (unsigned i : blocks) {
        block_index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
        run_block();
    }
}

} // namespace shim
