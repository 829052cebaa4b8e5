/* Memory of the fake card, and page-locked memory of the host.
 *
 * The card's memory is full of NaN when it is allocated, and the host cannot touch it: it is accessible only while an operation
 * runs. */
#pragma once
#include "fake_order.h"
#include <cstring>
#include <sys/mman.h>

namespace fake {

constexpr uint64_t ARENA_BYTES = 1ull << 38, ALIGNMENT = 512, PAGE = 4096;

struct locked_block {
    uint64_t num_bytes;
    unsigned flags;
    uint64_t alias; /* where the card sees it */
    bool is_own;    /* allocated here */
};

class memory {
    uint64_t arena = 0, used = 0; /* `used`: the furthest byte so far */
    std::map<uint64_t, uint64_t> blocks; /* of the card: address -> bytes, as asked for */
    std::map<uint64_t, int> labels;
    std::map<uint64_t, locked_block> locked;
    std::map<uint64_t, uint64_t> host_of; /* alias -> address of the host */
    std::map<uint64_t, uint64_t> hosts;   /* address -> bytes that are the host's, whatever `adopts` says */
    int num_blocks = 0;
    bool is_open = false;

    static uint64_t up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

    /* The first gap between blocks that is large enough. */
    uint64_t place(uint64_t num_bytes) const {
        uint64_t at = arena;
        for (const auto &[begin, bytes] : blocks) {
            if (begin >= at + num_bytes + ALIGNMENT) break;
            at = up(begin + bytes + ALIGNMENT, ALIGNMENT); /* at least so many bytes lie between two blocks */
        }
        return at;
    }

    template <class T> static auto containing(T &map, uint64_t at) {
        auto found = map.upper_bound(at);
        return found == map.begin() ? map.end() : --found;
    }

public:
    uint64_t num_allocated = 0, num_locked = 0, num_for_graphs = 0;

    memory() {
        arena = (uint64_t)mmap(nullptr, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }

    void open(bool wanted) {
        if (wanted != is_open && used) mprotect((void *)arena, up(used, PAGE), wanted ? PROT_READ | PROT_WRITE : PROT_NONE);
        is_open = wanted;
    }

    uint64_t free_bytes() const {
        const int64_t left = set.vram - set.vram_elsewhere - (int64_t)(num_allocated + num_for_graphs);
        return left > 0 ? (uint64_t)left : 0;
    }

    int allocate(uint64_t num_bytes, uint64_t *at) {
        if (num_bytes == 0) return 1;
        if (num_bytes > free_bytes()) return 2;
        const uint64_t begin = place(num_bytes);
        if (begin + num_bytes > arena + ARENA_BYTES) return 2;
        if (begin + num_bytes > arena + used) {
            used = begin + num_bytes - arena;
            mprotect((void *)arena, up(used, PAGE), is_open ? PROT_READ | PROT_WRITE : PROT_NONE);
        }
        blocks[begin] = num_bytes, labels[begin] = num_blocks++, num_allocated += num_bytes;
        *at = begin;
        if (set.no_kernels) return 0; /* models of any size, which exist by address only */
        const bool was_open = is_open;
        open(true), std::memset((void *)begin, 0xff, num_bytes), open(was_open);
        return 0;
    }

    /* The bytes that were allocated there, or 0. */
    uint64_t release(uint64_t at) {
        const auto found = blocks.find(at);
        if (found == blocks.end()) return 0;
        const uint64_t num_bytes = found->second;
        num_allocated -= num_bytes;
        blocks.erase(found), labels.erase(at);
        return num_bytes;
    }

    bool is_of_card(uint64_t at) const { return at >= arena && at < arena + ARENA_BYTES; }

    int lock_pages(uint64_t at, uint64_t num_bytes, unsigned flags, bool is_own) {
        if (num_bytes == 0) return 1;
        const auto next = locked.upper_bound(at);
        if (next != locked.end() && next->first < up(at + num_bytes, PAGE)) return 712;
        if (next != locked.begin() && up(std::prev(next)->first + std::prev(next)->second.num_bytes, PAGE) > at / PAGE * PAGE) return 712;
        if ((int64_t)(num_locked + num_bytes) > set.lockable) return (int)set.lock_error;
        uint64_t alias = at;
        if (set.aliases && at % PAGE == 0) { /* only shared mappings have a second one */
            void *second = mremap((void *)at, 0, up(num_bytes, PAGE), MREMAP_MAYMOVE);
            if (second != MAP_FAILED) alias = (uint64_t)second, host_of[alias] = at;
        }
        locked[at] = {num_bytes, flags, alias, is_own}, num_locked += num_bytes;
        return 0;
    }

    /* The block that is locked exactly there, or nullptr. */
    const locked_block *locked_at(uint64_t at) const {
        const auto found = locked.find(at);
        return found == locked.end() ? nullptr : &found->second;
    }

    void unlock_pages(uint64_t at) {
        const locked_block block = locked.at(at);
        if (block.alias != at) munmap((void *)block.alias, up(block.num_bytes, PAGE)), host_of.erase(block.alias);
        num_locked -= block.num_bytes;
        locked.erase(at);
    }

    /* The locked block around these bytes of the host, and where it begins. */
    const locked_block *locked_around(uint64_t at, uint64_t num_bytes, uint64_t *begin = nullptr) const {
        const auto found = containing(locked, at);
        if (found == locked.end() || at + num_bytes > found->first + found->second.num_bytes) return nullptr;
        if (begin) *begin = found->first;
        return &found->second;
    }

    /* One address per byte: that of the host for what the card sees elsewhere. */
    uint64_t canonical(uint64_t at) const {
        const auto found = containing(host_of, at);
        if (found == host_of.end() || at >= found->first + locked.at(found->second).num_bytes) return at;
        return found->second + (at - found->first);
    }

    /* Whether the card may touch these bytes. */
    bool reaches(uint64_t at, uint64_t num_bytes) const {
        const auto found = containing(blocks, at);
        if (found != blocks.end() && at + num_bytes <= found->first + found->second) return true;
        uint64_t begin = 0;
        const uint64_t host = canonical(at);
        const locked_block *block = locked_around(host, num_bytes, &begin);
        if (!block && set.adopts && !is_of_card(at)) return !is_hosts(at);
        return block && (block->flags & 2) && (host != at || block->alias == begin);
    }

    void declare_hosts(uint64_t at, uint64_t num_bytes) { hosts[at] = num_bytes; }

    bool is_hosts(uint64_t at) const {
        const auto found = containing(hosts, at);
        return found != hosts.end() && at < found->first + found->second;
    }

    std::string words(uint64_t at) const {
        const auto found = containing(blocks, at);
        if (found != blocks.end() && at < found->first + found->second)
            return "byte " + std::to_string(at - found->first) + " of allocation " + std::to_string(labels.at(found->first)) + " (" +
                   std::to_string(found->second) + " bytes)";
        uint64_t begin = 0;
        if (const locked_block *block = locked_around(at, 1, &begin))
            return "byte " + std::to_string(at - begin) + " of page-locked memory (" + std::to_string(block->num_bytes) + " bytes)";
        return is_of_card(at) ? "memory of the card that is not allocated" : "memory of the host that is not page-locked";
    }

    std::vector<uint64_t> own_locked() const {
        std::vector<uint64_t> all;
        for (const auto &[at, block] : locked) all.push_back(at);
        return all;
    }

    void clear() {
        for (const uint64_t at : own_locked()) {
            const locked_block block = locked.at(at);
            unlock_pages(at);
            if (block.is_own) munmap((void *)at, up(block.num_bytes, PAGE));
        }
        hosts.clear();
        blocks.clear(), labels.clear(), num_blocks = 0, num_allocated = 0;
        if (used) madvise((void *)arena, up(used, PAGE), MADV_DONTNEED);
    }
};

} // namespace fake
