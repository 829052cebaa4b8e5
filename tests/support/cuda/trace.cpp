/* The runtime behind -fsanitize=thread, for kernels: which bytes a launch reads and writes, and which two threads touch a byte
 * without a barrier between them, one of them writing.
 *
 * ThreadSanitizer's own runtime cannot be loaded into Python, and it does not know what orders threads on a card: barriers within
 * a block, __syncwarp within a warp, and between blocks of a launch nothing but atomics and fences. It is compiled without that
 * flag, and linked in place of libtsan. */
#include "fibers.h"
#include <dlfcn.h>
#include <map>
#include <set>
#include <string>
#include <unordered_map>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HOOK extern "C" __attribute__((visibility("hidden")))

namespace {

constexpr uint64_t PAGE = 4096;
constexpr uint32_t OF_BLOCKS = 1u << 31, OF_WARPS = 1u << 30, OF_THREADS = 1u << 29, SERIAL = OF_THREADS - 1; /* of several readers */

/* Accesses of one thread between two meeting points. */
struct segment {
    uint32_t block, thread, barriers, warp_barriers;
    bool is_atomic;
};

struct page {
    uint64_t read[PAGE / 64], written[PAGE / 64]; /* bits: bytes, in this launch */
    uint32_t writer[PAGE], reader[PAGE];          /* by byte: number of the last segment */
    uint64_t launch;
};

std::unordered_map<uint64_t, page *> pages;
std::map<uint64_t, page *> touched; /* in this launch */
std::vector<segment> segments;      /* of this launch; the first has the number `base` */
std::vector<std::string> races;
std::set<std::string> known;
uint32_t base = 1, barriers, current[shim::MAX_THREADS], warp_barriers[shim::MAX_THREADS];
uint64_t launches, blocks, stacks_begin, stacks_end, last_number = ~0ull, epochs[shim::MAX_THREADS];
page *last_page;

/* By blocks, in the order of their atomics: what is published through fences. */
struct publication {
    uint32_t barriers, thread; /* all before that barrier, and what this thread did before */
};
std::map<uint64_t, std::map<uint32_t, publication>> published; /* address of an atomic -> block -> ... */
std::map<uint32_t, publication> seen, pending;                 /* of the block that runs */
bool has_fenced[shim::MAX_THREADS];

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

uint32_t block_number() {
    return (shim::block_index.z * shim::grid.y + shim::block_index.y) * shim::grid.x + shim::block_index.x;
}

bool is_ours(uint64_t at) { return at >= (uint64_t)__ehdr_start && at < (uint64_t)_end; }
bool is_shared(uint64_t at) { return at >= (uint64_t)shim::__start_shim_shared && at < (uint64_t)shim::__stop_shim_shared; }

/* The number of the segment of an access; the last one of the thread while it meets no other thread. */
uint32_t segment_of(uint32_t thread, bool is_atomic) {
    const uint64_t epoch = blocks << 40 | (uint64_t)barriers << 20 | warp_barriers[thread];
    if (!is_atomic && epochs[thread] == epoch) return current[thread];
    segments.push_back({block_number(), thread, barriers, warp_barriers[thread], is_atomic});
    const uint32_t number = base + (uint32_t)segments.size() - 1;
    if (!is_atomic) current[thread] = number, epochs[thread] = epoch;
    return number;
}

/* Whether an earlier access of this launch is not ordered before one of `now`. */
bool races_with(uint32_t stamp, const segment &now, bool are_shared) {
    const uint32_t number = stamp & SERIAL;
    if (number < base) return false;
    const segment &old = segments[number - base];
    if (old.is_atomic && now.is_atomic) return false;
    if (old.block != now.block) {
        if (are_shared) return false; /* each block has its own */
        const auto found = seen.find(old.block);
        if (found == seen.end()) return true;
        return !(old.barriers < found->second.barriers || old.thread == found->second.thread);
    }
    if (!are_shared && (stamp & OF_BLOCKS) && seen.empty()) return true;
    if (old.barriers != now.barriers) return false;
    if ((stamp & OF_WARPS) || old.thread / 32 != now.thread / 32) return true;
    return old.warp_barriers == now.warp_barriers && ((stamp & OF_THREADS) || old.thread != now.thread);
}

std::string line_of(const void *code) {
    Dl_info info;
    char line[512] = "?", command[1024];
    if (!dladdr(code, &info) || !info.dli_fname) return line;
    std::snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%lx 2>/dev/null", info.dli_fname, (unsigned long)((const char *)code - 1 - (const char *)info.dli_fbase));
    if (FILE *pipe = popen(command, "r")) {
        if (std::fgets(line, sizeof line, pipe)) line[std::strcspn(line, "\n")] = 0;
        pclose(pipe);
    }
    return line;
}

void report(uint32_t stamp, bool old_writes, const segment &now, bool writes, uint64_t at, const void *code) {
    const segment &old = segments[(stamp & SERIAL) - base];
    const std::string place = line_of(code);
    if (!known.insert(place + (old_writes ? "w" : "r") + (writes ? "w" : "r")).second || races.size() > 50) return;
    const char *verb = old_writes ? " wrote" : " read";
    races.push_back(place + ": thread " + std::to_string(now.thread) + " of block " + std::to_string(now.block) + (writes ? " writes" : " reads") +
                    (is_shared(at) ? " shared memory" : " memory") + " that thread " + std::to_string(old.thread) + " of block " +
                    std::to_string(old.block) + verb + ", and nothing orders them");
}

page *page_of(uint64_t number) {
    if (number == last_number) return last_page;
    page *&found = pages[number];
    if (!found) found = new page();
    if (found->launch != launches) {
        std::memset(found->read, 0, sizeof found->read + sizeof found->written);
        found->launch = launches, touched[number] = found;
    }
    last_number = number;
    return last_page = found;
}

/* The readers of a byte since its last write: the last one, and whether there were others that a write must be ordered behind. */
uint32_t with_reader(uint32_t old, uint32_t number, const segment &now) {
    if ((old & SERIAL) < base) return number;
    const segment &other = segments[(old & SERIAL) - base];
    if (other.block != now.block) return number | OF_BLOCKS;
    uint32_t flags = old & OF_BLOCKS;
    if (other.barriers != now.barriers) return number | flags;
    flags |= old & OF_WARPS;
    if (other.thread / 32 != now.thread / 32) flags |= OF_WARPS;
    else if (other.warp_barriers == now.warp_barriers && (other.thread != now.thread || (old & OF_THREADS))) flags |= OF_THREADS;
    return number | flags;
}

bool is_one_of_this_launch(const uint32_t *stamps, uint64_t count) {
    uint32_t newest = 0;
    for (uint64_t k = 0; k < count; k++) newest = std::max(newest, stamps[k] & SERIAL);
    return newest >= base;
}

void set_bits(uint64_t *bits, uint64_t first, uint64_t count) {
    for (uint64_t i = first; i < first + count; i++) bits[i / 64] |= 1ull << i % 64;
}

/* An access within a page. */
void touch_part(uint64_t at, uint64_t count, bool writes, uint32_t number, const void *code) {
    page *p = page_of(at / PAGE);
    const uint64_t first = at % PAGE;
    const segment now = segments[number - base];
    const bool are_shared = is_shared(at);
    uint32_t *writer = p->writer + first, *reader = p->reader + first;
    if (is_one_of_this_launch(writer, count))
        for (uint64_t k = 0; k < count; k++)
            if (races_with(writer[k], now, are_shared)) report(writer[k], true, now, writes, at + k, code);
    if (!writes) {
        for (uint64_t k = 0; k < count; k++)
            if (reader[k] != number) reader[k] = with_reader(reader[k], number, now);
        return set_bits(p->read, first, count);
    }
    if (is_one_of_this_launch(reader, count))
        for (uint64_t k = 0; k < count; k++)
            if (races_with(reader[k], now, are_shared)) report(reader[k], false, now, true, at + k, code);
    std::fill_n(writer, count, number), std::fill_n(reader, count, 0);
    set_bits(p->written, first, count);
}

void touch(uint64_t at, uint64_t num_bytes, bool writes, bool is_atomic, const void *code) {
    if (!shim::is_inside || (at >= stacks_begin && at < stacks_end) || (is_ours(at) && !is_shared(at))) return;
    const uint32_t thread = shim::self->index, number = segment_of(thread, is_atomic);
    if (writes && !is_atomic) has_fenced[thread] = false;
    for (uint64_t end = at + num_bytes; at < end;) {
        const uint64_t count = std::min(end - at, PAGE - at % PAGE);
        touch_part(at, count, writes, number, code);
        at += count;
    }
}

/* The runs of bits that are set, as ranges of bytes. */
template <class F> void each_run(const uint64_t *bits, uint64_t begin, F each) {
    for (uint64_t i = 0; i < PAGE;) {
        if (i % 64 == 0 && bits[i / 64] == 0) i += 64;
        else if (!(bits[i / 64] >> i % 64 & 1)) i++;
        else {
            const uint64_t first = i;
            while (i < PAGE && (i % 64 == 0 && bits[i / 64] == ~0ull ? 1 : bits[i / 64] >> i % 64 & 1)) i += i % 64 == 0 && bits[i / 64] == ~0ull ? 64 : 1;
            each(begin + first, begin + i);
        }
    }
}

} // namespace

void shim::trace_launch(const void *stacks, uint64_t num_bytes) {
    base += (uint32_t)segments.size();
    if (base > SERIAL / 2 || pages.size() > 1 << 14) {
        for (auto &[number, p] : pages) delete p;
        pages.clear(), base = 1;
    }
    stacks_begin = (uint64_t)stacks, stacks_end = stacks_begin + num_bytes;
    segments.clear(), touched.clear(), published.clear(), known.clear(), launches++, last_number = ~0ull;
    std::fill_n(epochs, shim::MAX_THREADS, 0);
}
void shim::trace_block() {
    blocks++, barriers = 0, seen.clear(), pending.clear();
    std::fill_n(warp_barriers, shim::MAX_THREADS, 0), std::fill_n(has_fenced, shim::MAX_THREADS, false);
}
void shim::trace_barrier() { barriers++; }
void shim::trace_warp_barrier() { warp_barriers[shim::self->index]++; }
void shim::trace_fence() {
    has_fenced[shim::self->index] = true;
    for (const auto &[block, what] : pending) seen[block] = what;
    pending.clear();
}
void shim::trace_atomic(const void *at, uint64_t num_bytes) {
    const uint32_t thread = shim::self->index;
    if (!is_shared((uint64_t)at)) {
        auto &here = published[(uint64_t)at];
        for (const auto &[block, what] : here) pending[block] = what;
        if (has_fenced[thread]) here[block_number()] = {barriers, thread};
    }
    touch((uint64_t)at, num_bytes, true, true, __builtin_return_address(0));
}

/* Call `each` with the ranges of the last launch: writes and reads by ascending address. */
EXPORT void shim_ranges(void (*each)(void *, uint64_t, uint64_t, int), void *who) {
    for (int writes = 0; writes < 2; writes++) {
        uint64_t begin = 0, end = 0;
        for (const auto &[number, p] : touched) {
            if (is_shared(number * PAGE + PAGE / 2)) continue;
            each_run(writes ? p->written : p->read, number * PAGE, [&](uint64_t from, uint64_t to) {
                if (is_shared(from)) return;
                if (from != end && end) each(who, begin, end, writes);
                if (from != end) begin = from;
                end = to;
            });
        }
        if (end) each(who, begin, end, writes);
    }
}

/* Take one race of the launches so far; 0 if there is none. */
EXPORT int64_t shim_races(const char **text) {
    static std::string last;
    if (races.empty()) return 0;
    last = races.back(), races.pop_back();
    return *text = last.c_str(), 1;
}

#define ACCESS(bytes) \
    HOOK void __tsan_read##bytes(void *at) { touch((uint64_t)at, bytes, false, false, __builtin_return_address(0)); } \
    HOOK void __tsan_write##bytes(void *at) { touch((uint64_t)at, bytes, true, false, __builtin_return_address(0)); } \
    HOOK void __tsan_unaligned_read##bytes(void *at) { touch((uint64_t)at, bytes, false, false, __builtin_return_address(0)); } \
    HOOK void __tsan_unaligned_write##bytes(void *at) { touch((uint64_t)at, bytes, true, false, __builtin_return_address(0)); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
HOOK void __tsan_read_range(void *at, unsigned long n) { touch((uint64_t)at, n, false, false, __builtin_return_address(0)); }
HOOK void __tsan_write_range(void *at, unsigned long n) { touch((uint64_t)at, n, true, false, __builtin_return_address(0)); }
HOOK void __tsan_vptr_update(void *, void *) {}
HOOK void __tsan_vptr_read(void *) {}
HOOK void __tsan_func_entry(void *) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_init() {}
