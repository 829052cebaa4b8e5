/* The runtime behind -fsanitize=thread, for kernels: which bytes a launch reads and writes, and which two threads touch a byte
 * without a barrier between them, one of them writing.
 *
 * ThreadSanitizer's own runtime cannot be loaded into Python, and it does not know what orders threads on a card: barriers within
 * a block, __syncwarp within a warp, and between blocks of a launch nothing but atomics and fences. It is compiled without that
 * flag, and linked in place of libtsan. */
#include "fibers.h"
#include <cstddef>
#include <dlfcn.h>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HOOK extern "C" __attribute__((visibility("hidden")))

namespace {

constexpr uint64_t PAGE = 4096, MOST_PAGES = 4096; /* of 72 KiB each */
/* Who touched a byte last, and when: the launch's other accesses to it are compared with that. 0: nobody. */
union stamp {
    uint64_t bits;
    struct {
        uint64_t thread : 10, warp_barriers : 12, barriers : 17, block : 20, is_there : 1, is_atomic : 1;
        uint64_t of_threads : 1, of_warps : 1, of_blocks : 1; /* of a read: others of that warp, block or launch read it, too */
    };
};
static_assert(sizeof(stamp) == 8);

struct page {
    uint64_t read[PAGE / 64], written[PAGE / 64]; /* bits: bytes, in this launch */
    stamp writer[PAGE], reader[PAGE];
    uint64_t launch;
};

std::unordered_map<uint64_t, page *> pages;
std::map<uint64_t, page *> touched; /* in this launch */
std::vector<std::string> races;
std::set<std::tuple<const void *, bool, bool>> known; /* races of this launch, by code */
uint32_t barriers, warp_barriers[shim::MAX_THREADS];
uint64_t launches, stacks_begin, stacks_end, last_number = ~0ull;
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

stamp stamp_of(uint32_t thread, bool is_atomic) {
    stamp now = {};
    now.thread = thread, now.warp_barriers = warp_barriers[thread], now.barriers = barriers, now.block = block_number();
    now.is_there = 1, now.is_atomic = is_atomic;
    return now;
}

/* Whether an earlier access of this launch is not ordered before one of now. */
bool races_with(stamp old, stamp now, bool are_shared) {
    if (!old.is_there || (old.is_atomic && now.is_atomic)) return false;
    if (old.block != now.block) {
        if (are_shared) return false; /* each block has its own */
        const auto found = seen.find(old.block);
        if (found == seen.end()) return true;
        return !(old.barriers < found->second.barriers || old.thread == found->second.thread);
    }
    if (!are_shared && old.of_blocks && seen.empty()) return true;
    if (old.barriers != now.barriers) return false;
    if (old.of_warps || old.thread / 32 != now.thread / 32) return true;
    return old.warp_barriers == now.warp_barriers && (old.of_threads || old.thread != now.thread);
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

void report(stamp old, bool old_writes, stamp now, bool writes, uint64_t at, const void *code) {
    if (!known.insert({code, old_writes, writes}).second || races.size() > 50) return;
    const std::string place = line_of(code);
    const bool are_several = old.of_threads || old.of_warps || old.of_blocks;
    races.push_back(place + ": thread " + std::to_string(now.thread) + " of block " + std::to_string(now.block) + (writes ? " writes" : " reads") +
                    (is_shared(at) ? " shared memory" : " memory") + " that thread " + std::to_string(old.thread) + " of block " +
                    std::to_string(old.block) + (are_several ? " and others" : "") + (old_writes ? " wrote" : " read") + ", and nothing orders them");
}

page *page_of(uint64_t number) {
    if (number == last_number) return last_page;
    page *&found = pages[number];
    if (!found) found = new page();
    if (found->launch != launches) {
        std::memset((void *)found, 0, offsetof(page, launch));
        found->launch = launches, touched[number] = found;
    }
    last_number = number;
    return last_page = found;
}

/* The readers of a byte since its last write: the last one, and whether there were others that a write must be ordered behind. */
stamp with_reader(stamp old, stamp now) {
    if (!old.is_there) return now;
    now.of_blocks = old.of_blocks;
    if (old.block != now.block) now.of_blocks = 1;
    else if (old.barriers == now.barriers) {
        now.of_warps = old.of_warps || old.thread / 32 != now.thread / 32;
        now.of_threads = old.warp_barriers == now.warp_barriers && (old.thread != now.thread || old.of_threads);
    }
    return now;
}

void set_bits(uint64_t *bits, uint64_t first, uint64_t count) {
    for (uint64_t i = first; i < first + count; i++) bits[i / 64] |= 1ull << i % 64;
}

/* An access within a page. */
void touch_part(uint64_t at, uint64_t count, bool writes, stamp now, const void *code) {
    page *p = page_of(at / PAGE);
    const uint64_t first = at % PAGE;
    const bool are_shared = is_shared(at);
    stamp *writer = p->writer + first, *reader = p->reader + first;
    for (uint64_t k = 0; k < count; k++)
        if (writer[k].bits && races_with(writer[k], now, are_shared)) report(writer[k], true, now, writes, at + k, code);
    set_bits(writes ? p->written : p->read, first, count);
    if (!writes) {
        for (uint64_t k = 0; k < count; k++)
            if (reader[k].bits != now.bits) reader[k] = with_reader(reader[k], now);
        return;
    }
    for (uint64_t k = 0; k < count; k++)
        if (reader[k].bits && races_with(reader[k], now, are_shared)) report(reader[k], false, now, true, at + k, code);
    std::fill_n(writer, count, now), std::fill_n(reader, count, stamp{});
}

void touch(uint64_t at, uint64_t num_bytes, bool writes, bool is_atomic, const void *code) {
    if (!shim::is_inside || (at >= stacks_begin && at < stacks_end) || (is_ours(at) && !is_shared(at))) return;
    const uint32_t thread = shim::self->index;
    const stamp now = stamp_of(thread, is_atomic);
    if (writes && !is_atomic) has_fenced[thread] = false;
    for (uint64_t end = at + num_bytes; at < end;) {
        const uint64_t count = std::min(end - at, PAGE - at % PAGE);
        touch_part(at, count, writes, now, code);
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
    if (pages.size() > MOST_PAGES) {
        for (auto &[number, p] : pages) delete p;
        pages.clear();
    }
    stacks_begin = (uint64_t)stacks, stacks_end = stacks_begin + num_bytes;
    touched.clear(), published.clear(), known.clear(), launches++, last_number = ~0ull;
}
void shim::trace_block() {
    barriers = 0, seen.clear(), pending.clear();
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
