/* Kernels and graphs of the fake card. A module's image names a library that `shim.py` compiled. */
#pragma once
#include "../cuda/pass.h"
#include "entries.h"
#include "fake_queue.h"
#include <dlfcn.h>
#include <thread>

namespace fake {

struct module {
    void *library;
    const shim::entry *entries;
    void (*ranges)(void (*each)(void *, uint64_t, uint64_t, int), void *);
    int64_t (*races)(const char **);
};

struct function {
    const module *of;
    const shim::entry *entry;
};

/* A launch with its parameters, copied when it was described. */
struct launch {
    const function *what = nullptr;
    unsigned grid[3] = {}, block[3] = {};
    std::vector<unsigned char> params;

    bool is_possible() const {
        const uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
        return what && threads > 0 && threads <= 1024 && grid[0] && grid[1] && grid[2];
    }
    bool runs() const { return !set.no_kernels || executed.count(what->entry->name); }

    void run(const access &me) const {
        static unsigned num_runs;
        what->entry->run(params.data(), grid, block, set.order < 2 ? (unsigned)set.order : ++num_runs + 1);
        if (what->of->ranges)
            what->of->ranges(
                [](void *who, uint64_t begin, uint64_t end, int writes) { card_touches(begin, end - begin, writes, *(const access *)who); },
                (void *)&me);
        const char *race = nullptr;
        while (what->of->races && what->of->races(&race)) report(orders.name_of(me.what) + ": " + race);
    }
};

inline launch describe(const function *what, const unsigned *grid, const unsigned *block, void *const *params) {
    launch l;
    l.what = what;
    std::copy_n(grid, 3, l.grid), std::copy_n(block, 3, l.block);
    const auto *bytes = (const unsigned char *)params[0];
    l.params.assign(bytes, bytes + what->entry->num_bytes);
    return l;
}

struct node {
    enum { KERNEL, COPY, FILL, EMPTY } kind;
    std::vector<size_t> after;
    launch kernel;
    std::string name;
    std::function<void(const access &)> run; /* of the others */
};

struct graph {
    std::vector<std::unique_ptr<node>> nodes; /* a handle is the address of one */
    std::map<const node *, size_t> numbers;

    /* Returns nullptr if it is to follow a node of another graph. */
    node *add(node &&made, void *const *after, size_t num_after) {
        for (size_t n = 0; n < num_after; n++) {
            const auto found = numbers.find((const node *)after[n]);
            if (found == numbers.end()) return nullptr;
            made.after.push_back(found->second);
        }
        nodes.push_back(std::make_unique<node>(std::move(made)));
        numbers[nodes.back().get()] = nodes.size() - 1;
        return nodes.back().get();
    }
};

/* A stream whose operations become a graph, each behind the last one. */
struct capture {
    graph made;
    node *last;
    int mode;
    std::thread::id thread;
    bool is_broken;

    void add(node &&n) {
        void *const after[] = {last};
        last = made.add(std::move(n), after, last ? 1 : 0);
    }
};

struct executable {
    std::vector<node> nodes; /* copies: parameters of the graph that change later do not matter */
    std::map<const node *, size_t> numbers;
    size_t num_kernels = 0;
    reference last; /* a launch follows the launch before it */
    /* For the option `at_once`. */
    volatile unsigned *stamp = nullptr; /* of the host, where the graph has a router */
    unsigned layer = 0, num_layers = 0;
    bool is_end = false; /* of a pass */
    static inline unsigned pass = 1;

    explicit executable(const graph &g) : numbers(g.numbers) {
        for (const auto &n : g.nodes) {
            nodes.push_back(*n);
            if (n->kind == node::KERNEL) note_for_launches_at_once(n->kernel);
            if (n->kind == node::KERNEL) num_kernels++;
        }
        cards_memory.num_for_graphs += nodes.size() * (uint64_t)set.node_bytes;
    }
    ~executable() { cards_memory.num_for_graphs -= nodes.size() * (uint64_t)set.node_bytes; }

    void note_for_launches_at_once(const launch &l) {
        const std::string name = l.what->entry->name;
        is_end = is_end || name == "om_finish";
        if (name != "om_resolve") return;
        const auto *p = (const om_card_resolve_params *)l.params.data();
        stamp = &p->notice->stamp, layer = (unsigned)p->layer, num_layers = (unsigned)p->num_layers;
    }

    int launch_at_once() const {
        if (stamp) *stamp = pass * num_layers + layer + 1;
        if (is_end) pass++;
        return 0;
    }

    void launch_on(stream &s) {
        if (is_end) pass++;
        counts["nodes"] += (int64_t)nodes.size(), counts["kernels"] += (int64_t)num_kernels;
        const auto runs = [](const node &n) { return n.kind == node::KERNEL && n.kernel.runs(); };
        if (set.no_kernels && (executed.empty() || std::none_of(nodes.begin(), nodes.end(), runs))) return;
        std::vector<reference> made;
        for (const node &n : nodes) {
            std::vector<reference> after;
            for (const size_t number : n.after) after.push_back(made[number]);
            if (after.empty()) after = {s.tail, last};
            if (n.kind == node::KERNEL && n.kernel.runs()) made.push_back(operations.add(after, n.name, [k = n.kernel](const access &me) { k.run(me); }));
            else made.push_back(operations.add(after, n.name, set.no_kernels ? decltype(n.run)() : n.run, n.kind == node::COPY));
        }
        last = s.tail = operations.add(made, "the end of a graph", nullptr);
    }
};

} // namespace fake
