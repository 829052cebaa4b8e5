/* What a test calls, see `fake.py`; and what native code reports of the host. */
#pragma once
#include "fake_calls.h"

#define CONTROL extern "C" __attribute__((visibility("default")))
CONTROL void omHostAccess(const void *at, int64_t num_bytes, int kind) {
    if (set.at_once) return;
    std::lock_guard<std::recursive_mutex> guard(fake::lock);
    const uint64_t begin = cards_memory.canonical((uint64_t)at);
    if (cards_memory.is_of_card(begin)) return report("the host touches " + cards_memory.words(begin));
    if (kind != OM_HOST_POLLS) return orders.host_touches(begin, begin + (uint64_t)num_bytes, kind == OM_HOST_WRITES, "the host");
    operations.step();
    orders.host_follows(orders.writer(begin));
}
CONTROL void omFakeDeclareHosts(const void *at, int64_t num_bytes) { cards_memory.declare_hosts((uint64_t)at, (uint64_t)num_bytes); }
CONTROL int omFakeSet(const char *name, int64_t value) {
    int64_t *option = fake::option(name);
    if (option) *option = value;
    return option ? 0 : 1;
}
CONTROL void omFakeFail(const char *call, int64_t after, int code) { failures[call] = {after, code}; }
CONTROL void omFakeExecute(const char *kernel) { executed.insert(kernel); }
CONTROL int64_t omFakeCount(const char *name) { return counts[name]; }
CONTROL void omFakeForgetCounts() { counts.clear(); }
CONTROL const char *omFakeProblem(int64_t number) { return number < (int64_t)problems.size() ? problems[(size_t)number].c_str() : nullptr; }
/* As if the process began anew. Handles that are in use are no longer valid. */
CONTROL void omFakeReset() {
    operations.clear(), cards_memory.clear();
    streams.clear(), events.clear(), graphs.clear(), executables.clear(), modules.clear();
    executable::pass = 1;
    fake::set = {}, failures.clear(), counts.clear(), problems.clear(), executed.clear();
    const auto place = std::move(orders.place);
    orders = {};
    orders.place = [](uint64_t at) { return cards_memory.words(at); };
    current = nullptr;
}
