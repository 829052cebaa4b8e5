/* Operations of the fake card: queued by streams and graphs, run when the host waits for them, in an order that a test chooses. */
#pragma once
#include "fake_memory.h"

namespace fake {

struct operation {
    access at;
    std::vector<std::shared_ptr<operation>> after; /* emptied once it has run */
    std::function<void(const access &)> run;
    bool is_copy = false, is_done = false, is_submitted = true;
    int mark = 0;
};
using reference = std::shared_ptr<operation>;

struct capture;

struct stream {
    reference tail;
    std::shared_ptr<capture> taken; /* while it is captured */
};

inline order orders;
inline memory cards_memory;

class queue {
    std::vector<reference> waiting; /* in the order in which they were queued */
    uint64_t random_state = 88172645463325252ull;
    int last_mark = 0;

    unsigned random_below(size_t n) {
        random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
        return (unsigned)((random_state >> 33) % n);
    }

    static bool is_ready(const operation &op) {
        return op.is_submitted && std::all_of(op.after.begin(), op.after.end(), [](const reference &a) { return a->is_done; });
    }

    static void mark(operation &op, int number) {
        std::vector<operation *> left{&op};
        while (!left.empty()) {
            operation *next = left.back();
            left.pop_back();
            if (next->is_done || next->mark == number) continue;
            next->mark = number;
            for (const reference &a : next->after) left.push_back(a.get());
        }
    }

    /* What runs next: among what `target` waits for, or among all for nullptr. */
    reference pick(operation *target) {
        if (target) mark(*target, ++last_mark);
        std::vector<reference> ready, copies;
        for (const reference &op : waiting) {
            if (!is_ready(*op) || (target && op->mark != last_mark && set.order < 2)) continue;
            (set.late_copies && op->is_copy ? copies : ready).push_back(op);
        }
        if (ready.empty()) ready.swap(copies);
        if (ready.empty()) return nullptr;
        return set.order == 0 ? ready.front() : set.order == 1 ? ready.back() : ready[random_below(ready.size())];
    }

    void run(const reference &op) {
        waiting.erase(std::find(waiting.begin(), waiting.end(), op));
        cards_memory.open(true);
        if (op->run) op->run(op->at);
        cards_memory.open(false);
        op->is_done = true, op->after.clear(), op->run = nullptr;
        if (set.lost_after > 0) set.lost_after--;
    }

public:
    /* Queue an operation behind others and behind what the host has done. */
    reference add(const std::vector<reference> &after, const std::string &name, std::function<void(const access &)> run, bool is_copy = false) {
        clock known = orders.host;
        auto op = std::make_shared<operation>();
        for (const reference &a : after) {
            if (!a) continue;
            join(known, *a->at.known);
            if (!a->is_done) op->after.push_back(a);
        }
        orders.host_goes_on();
        op->at = orders.begin(std::move(known), orders.number_of(name));
        op->run = std::move(run), op->is_copy = is_copy, op->is_submitted = !set.batches;
        waiting.push_back(op);
        if (set.eager) finish(op);
        return op;
    }

    void submit() {
        for (const reference &op : waiting) op->is_submitted = true;
    }

    bool step(operation *target = nullptr) {
        if (set.lost_after == 0) return false;
        const reference op = pick(target);
        if (op) run(op);
        return op != nullptr;
    }

    /* Run until it is done, and let the host know. */
    void finish(const reference &op) {
        submit();
        while (op && !op->is_done && step(op.get())) {}
        if (op && op->is_done) orders.host_follows(op->at);
    }

    void finish_all() {
        submit();
        while (step()) {}
    }

    /* Whether it is done; the host follows it then. Something runs between two queries. */
    bool query(const reference &op) {
        submit();
        const bool is_done = !op || op->is_done;
        if (is_done && op) orders.host_follows(op->at);
        if (!is_done) step();
        return is_done;
    }

    void clear() { waiting.clear(); }
};

inline queue operations;

/* The bytes an operation touches. */
inline void card_touches(uint64_t at, uint64_t num_bytes, bool writes, const access &me) {
    if (num_bytes == 0) return;
    if (!cards_memory.reaches(at, num_bytes))
        report(orders.name_of(me.what) + (writes ? " writes " : " reads ") + std::to_string(num_bytes) + " bytes from " + cards_memory.words(at) +
               " on: the card does not reach them");
    const uint64_t host = cards_memory.canonical(at);
    orders.touch(host, host + num_bytes, writes, me);
}

} // namespace fake
