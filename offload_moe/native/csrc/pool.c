/* The kernels' own thread pool: workers spin briefly for the next phase, then sleep; one job at a time.
 *
 * A phase is open while its units are handed out. A worker that wakes too late finds it closed and goes back to sleep, so
 * the caller waits only for workers that hold a unit. After fork() the child starts with no workers and makes its own. */
#define _GNU_SOURCE
#include "float_mode.h"
#include "om_kernels.h"
#include "platform.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_THREADS 256
#define SPIN_NS 60000
#define OPEN_BIT 0x80000000u
#define MEMBER_MASK 0x7fffffffu

static struct {
    pthread_mutex_t job_mutex, sleep_mutex;
    pthread_cond_t wake;
    pthread_t workers[MAX_THREADS];
    int chosen_threads, num_workers, is_pinned;
    atomic_int num_sleeping, is_stopping;
    _Atomic uint32_t epoch;   /* counts phases; workers watch it */
    _Atomic uint32_t members; /* OPEN_BIT, and how many workers are inside of the phase */
    _Atomic int64_t next_unit;
    int64_t num_units;
    om_unit_fn unit;
    void *context;
    uint8_t *arena;
    size_t arena_bytes;
    uint64_t callers_mode; /* of floating point, of the thread whose job it is */
} pool = {.job_mutex = PTHREAD_MUTEX_INITIALIZER,
          .sleep_mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .chosen_threads = 1};

OM_INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t claim_unit(void) { return atomic_fetch_add_explicit(&pool.next_unit, 1, memory_order_relaxed); }

/* Units are claimed one ahead, so that they can be prefetched; not the last ones, which any idle thread should take. */
static void run_units(int thread) {
    const int64_t end = pool.num_units, last_claimed_ahead = end - 2 * (pool.num_workers + 1);
    for (int64_t unit = claim_unit(); unit < end;) {
        const int64_t next = unit < last_claimed_ahead ? claim_unit() : -1;
        pool.unit(pool.context, unit, next < end ? next : -1, thread);
        unit = next >= 0 ? next : claim_unit();
    }
}

static int join_phase(void) {
    uint32_t members = atomic_load(&pool.members);
    while (members & OPEN_BIT)
        if (atomic_compare_exchange_weak(&pool.members, &members, members + 1)) return 1;
    return 0;
}

static uint32_t wait_for_phase(uint32_t seen) {
    const int64_t deadline = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            const uint32_t epoch = atomic_load_explicit(&pool.epoch, memory_order_acquire);
            if (epoch != seen) return epoch;
            relax();
        }
    } while (now_ns() < deadline);
    pthread_mutex_lock(&pool.sleep_mutex);
    atomic_fetch_add(&pool.num_sleeping, 1);
    while (atomic_load(&pool.epoch) == seen) pthread_cond_wait(&pool.wake, &pool.sleep_mutex);
    atomic_fetch_sub(&pool.num_sleeping, 1);
    pthread_mutex_unlock(&pool.sleep_mutex);
    return atomic_load(&pool.epoch);
}

static void *worker(void *argument) {
    const int thread = (int)(intptr_t)argument;
    uint32_t seen = 0;
    om_enter_float_mode();
    while (!atomic_load(&pool.is_stopping)) {
        if (join_phase()) {
            run_units(thread);
            atomic_fetch_sub(&pool.members, 1);
        }
        seen = wait_for_phase(seen);
    }
    return NULL;
}

static void announce(void) {
    atomic_fetch_add(&pool.epoch, 1);
    if (atomic_load(&pool.num_sleeping) == 0) return;
    pthread_mutex_lock(&pool.sleep_mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep_mutex);
}

#if defined(__linux__)
static cpu_set_t cores; /* cores for workers; empty: the caller's */

/* The caller is thread 0, on the first core if it is pinned at all. */
static void keep_one(cpu_set_t *allowed, int thread) {
    const int chosen = thread % CPU_COUNT(allowed);
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, allowed) && seen++ != chosen) CPU_CLR(cpu, allowed);
}

static void place(pthread_t handle, int thread) {
    cpu_set_t allowed = cores;
    if (CPU_COUNT(&cores) == 0 && sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    if (pool.is_pinned) keep_one(&allowed, thread);
    pthread_setaffinity_np(handle, sizeof allowed, &allowed);
}
void om_pool_place_anywhere(pthread_t thread) {
    if (CPU_COUNT(&cores) > 0) pthread_setaffinity_np(thread, sizeof cores, &cores);
}
#else
static void place(pthread_t handle, int thread) { (void)handle, (void)thread; }
void om_pool_place_anywhere(pthread_t thread) { (void)thread; }
#endif

void om_pool_place_caller(pthread_t handle) { place(handle, 0); }

static void stop_workers(void) {
    atomic_store(&pool.is_stopping, 1);
    announce();
    for (int i = 0; i < pool.num_workers; i++) pthread_join(pool.workers[i], NULL);
    pool.num_workers = 0;
    atomic_store(&pool.is_stopping, 0);
}

/* Thread 0 is the caller. A thread that cannot be made is no error: the others do all units. */
static void start_workers(void) {
    while (pool.num_workers < pool.chosen_threads - 1) {
        const int thread = pool.num_workers + 1;
        if (pthread_create(&pool.workers[thread - 1], NULL, worker, (void *)(intptr_t)thread) != 0) return;
        pool.num_workers = thread;
        place(pool.workers[thread - 1], thread);
    }
}

/* Only the forking thread exists in the child: no workers, and locks and an arena that another thread may have been using. */
static void after_fork_in_child(void) {
    const pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    const pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    pool.job_mutex = mutex;
    pool.sleep_mutex = mutex;
    pool.wake = condition;
    pool.num_workers = 0;
    pool.arena = NULL;
    pool.arena_bytes = 0;
    atomic_store(&pool.is_stopping, 0);
    atomic_store(&pool.num_sleeping, 0);
    atomic_store(&pool.members, 0);
}

__attribute__((constructor)) static void register_fork_handler(void) { om_after_fork(after_fork_in_child); }

void om_pool_begin(void) {
    pthread_mutex_lock(&pool.job_mutex);
    pool.callers_mode = om_enter_float_mode();
    start_workers();
}

void om_pool_end(void) {
    om_restore_float_mode(pool.callers_mode);
    pthread_mutex_unlock(&pool.job_mutex);
}

int om_pool_threads(void) { return pool.chosen_threads; }

void om_pool_run(om_unit_fn unit, void *context, int64_t num_units) {
    if (num_units <= 1 || pool.num_workers == 0) {
        for (int64_t i = 0; i < num_units; i++) unit(context, i, i + 1 < num_units ? i + 1 : -1, 0);
        return;
    }
    pool.unit = unit;
    pool.context = context;
    pool.num_units = num_units;
    atomic_store(&pool.next_unit, 0);
    atomic_store(&pool.members, OPEN_BIT);
    announce();
    run_units(0);
    atomic_fetch_and(&pool.members, MEMBER_MASK);
    for (int64_t spins = 1; atomic_load(&pool.members) != 0; spins++) {
        relax();
        if (spins % 4096 == 0) sched_yield(); /* more threads than cores: let the worker that holds a unit run */
    }
}

uint8_t *om_arena_reserve(size_t num_bytes) {
    if (num_bytes > pool.arena_bytes) {
        om_free_pages(pool.arena);
        pool.arena_bytes = (num_bytes + OM_PAGE - 1) / OM_PAGE * OM_PAGE;
        pool.arena = om_allocate_pages(pool.arena_bytes);
        if (pool.arena == NULL) pool.arena_bytes = 0;
    }
    return pool.arena;
}

OM_EXPORT int om_configure_threads(int num_threads, int is_pinned) {
    if (num_threads < 1 || num_threads > MAX_THREADS) return -1;
    pthread_mutex_lock(&pool.job_mutex);
    if (num_threads != pool.chosen_threads || is_pinned != pool.is_pinned) {
        stop_workers();
        pool.chosen_threads = num_threads;
        pool.is_pinned = is_pinned;
    }
    pthread_mutex_unlock(&pool.job_mutex);
    return 0;
}

/* For workers to come: a calling thread that OpenMP bound to one core would pass that on to them. */
OM_EXPORT void om_use_cores(const int *cpus, int num_cpus) {
#if defined(__linux__)
    CPU_ZERO(&cores);
    for (int i = 0; i < num_cpus; i++)
        if (cpus[i] >= 0 && cpus[i] < CPU_SETSIZE) CPU_SET(cpus[i], &cores);
#else
    (void)cpus, (void)num_cpus;
#endif
}

OM_EXPORT int om_num_threads(void) { return pool.chosen_threads; }
