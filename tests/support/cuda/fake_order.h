/* Which operations are ordered, by vector clocks, and who touched which bytes last.
 *
 * The host, all its threads together, is chain 0. Other chains are operations that follow each other; an operation continues any
 * chain whose last operation it follows anyway, so there are as many chains as operations that can run at once. Two accesses to a
 * byte, of which one writes, must be ordered, whatever order they happen to run in. */
#pragma once
#include "fake_state.h"
#include <algorithm>
#include <functional>
#include <memory>

namespace fake {

using clock = std::vector<uint32_t>; /* by chain: the last tick that is known to be before */

inline uint32_t tick_of(const clock &c, size_t chain) { return chain < c.size() ? c[chain] : 0; }

inline void join(clock &c, const clock &other) {
    if (c.size() < other.size()) c.resize(other.size());
    for (size_t n = 0; n < other.size(); n++) c[n] = std::max(c[n], other[n]);
}

struct access {
    uint32_t chain = 0, tick = 0; /* tick 0: nobody's */
    int what = 0;
    std::shared_ptr<const clock> known; /* of an operation */
};

inline bool is_before(const access &a, const clock &c) { return a.tick <= tick_of(c, a.chain); }

class order {
    struct span {
        uint64_t end;
        access write;
        std::vector<access> reads; /* since that write, those that are not ordered among each other */
    };
    std::map<uint64_t, span> spans;
    std::vector<uint32_t> last{0}; /* tick of each chain */
    std::vector<std::string> names{""};
    std::map<std::string, int> numbers;

    void cut(uint64_t at) {
        auto found = spans.upper_bound(at);
        if (found == spans.begin() || (--found)->first == at || found->second.end <= at) return;
        span right = found->second;
        found->second.end = at;
        spans.emplace(at, std::move(right));
    }

    void conflict(const access &a, bool a_writes, const access &b, bool b_writes, uint64_t at) const {
        report(names[a.what] + (a_writes ? " writes " : " reads ") + place(at) + " and " + names[b.what] + (b_writes ? " writes" : " reads") +
               " it: nothing orders them");
    }

    void meet(span &s, uint64_t at, bool writes, const access &me, const clock &c) {
        if (!is_before(s.write, c)) conflict(s.write, true, me, writes, at);
        if (writes) {
            for (const access &read : s.reads)
                if (!is_before(read, c)) conflict(read, false, me, true, at);
            return;
        }
        s.reads.erase(std::remove_if(s.reads.begin(), s.reads.end(), [&](const access &r) { return is_before(r, c); }), s.reads.end());
        s.reads.push_back(me);
    }

public:
    clock host{1};
    std::function<std::string(uint64_t)> place; /* words for an address */

    int number_of(const std::string &name) {
        const auto [found, is_new] = numbers.emplace(name, (int)names.size());
        if (is_new) names.push_back(name);
        return found->second;
    }

    const std::string &name_of(int what) const { return names[what]; }

    /* The place of an operation in the order, behind what its clock has: it continues a chain or begins one. */
    access begin(clock c, int what) {
        uint32_t chain = 1;
        while (chain < last.size() && tick_of(c, chain) != last[chain]) chain++;
        if (chain == last.size()) last.push_back(0);
        if (c.size() <= chain) c.resize(chain + 1);
        c[chain] = ++last[chain];
        return {chain, last[chain], what, std::make_shared<const clock>(std::move(c))};
    }

    /* The host has queued something: what it does from now on is not before that. */
    void host_goes_on() { host[0]++; }
    void host_follows(const access &a) { if (a.known) join(host, *a.known); }

    void touch(uint64_t begin, uint64_t end, bool writes, const access &me) { touch(begin, end, writes, me, *me.known); }

    void host_touches(uint64_t begin, uint64_t end, bool writes, const std::string &name) {
        touch(begin, end, writes, {0, host[0], number_of(name), nullptr}, host);
    }

    void touch(uint64_t begin, uint64_t end, bool writes, const access &me, const clock &c) {
        cut(begin), cut(end);
        uint64_t at = begin;
        for (auto s = spans.lower_bound(begin); at < end; s++) {
            const uint64_t next = s == spans.end() ? end : std::min(end, s->first);
            if (at < next && !writes) s = spans.emplace(at, span{next, {}, {me}}).first;
            else if (at < next) s = spans.emplace(at, span{next, {}, {}}).first;
            else meet(s->second, at, writes, me, c);
            at = s->second.end;
        }
        if (!writes) return;
        spans.erase(spans.lower_bound(begin), spans.lower_bound(end));
        spans.emplace(begin, span{end, me, {}});
    }

    /* The last writer of an address; tick 0 if there is none. */
    access writer(uint64_t at) const {
        auto found = spans.upper_bound(at);
        if (found == spans.begin()) return {};
        found--;
        return found->second.end > at ? found->second.write : access{};
    }

    /* Memory that is new or gone. */
    void forget(uint64_t begin, uint64_t end) {
        cut(begin), cut(end);
        spans.erase(spans.lower_bound(begin), spans.lower_bound(end));
    }
};

} // namespace fake
