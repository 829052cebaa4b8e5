/* What the calls of the fake driver share: handles, injected failures, queueing. */
#pragma once
#include "fake_graph.h"
extern "C" {
#include "card_driver.h"
}

namespace fake {

static thread_local void *current;
static int context; /* its address is the handle */
static std::set<void *> streams, events, graphs, executables, modules;
static int num_streams;

struct event {
    reference last;
    bool is_recorded = false;
};

static stream &of(void *handle) { return *(stream *)handle; }

/* Calls that a capture does not bear, whose results it cannot hold; in GLOBAL mode from any thread. */
static bool breaks_a_capture(const std::string &call) {
    static const std::set<std::string> unsafe = {"cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemHostRegister_v2", "cuEventQuery",
                                                 "cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuModuleLoadData"};
    bool is_broken = false;
    for (void *s : streams)
        if (capture *c = of(s).taken.get(); c && unsafe.count(call))
            if (c->mode == OM_CU_CAPTURE_GLOBAL || (c->mode == OM_CU_CAPTURE_THREAD && c->thread == std::this_thread::get_id()))
                is_broken = c->is_broken = true;
    return is_broken;
}

static int begin(const char *call, bool needs_context = true) {
    if (const int code = injected(call)) return code;
    if (needs_context && current != &context) return 201;
    return breaks_a_capture(call) ? 900 : 0;
}

/* Queue an operation behind the last one of a stream, or add it to the graph that the stream is captured to. */
static reference queue_on(void *s, const std::string &name, std::function<void(const access &)> run, bool is_copy) {
    if (of(s).taken) return of(s).taken->add({is_copy ? node::COPY : node::FILL, {}, {}, name + " in a graph", std::move(run)}), nullptr;
    return of(s).tail = operations.add({of(s).tail}, name, std::move(run), is_copy);
}

static int synchronize(const reference &op) {
    counts["synchronizations"]++;
    operations.finish(op);
    return set.lost_after == 0 ? (int)set.lost_code : 0;
}

static std::function<void(const access &)> copying(uint64_t to, uint64_t from, size_t num_bytes, bool to_card, bool from_card) {
    return [=](const access &me) {
        if (from_card) card_touches(from, num_bytes, false, me);
        else orders.touch(from, from + num_bytes, false, me);
        if (to_card) card_touches(to, num_bytes, true, me);
        else orders.touch(to, to + num_bytes, true, me);
        if ((!to_card || cards_memory.reaches(to, num_bytes)) && (!from_card || cards_memory.reaches(from, num_bytes)))
            std::memcpy((void *)to, (const void *)from, num_bytes);
    };
}

static void count_copy(size_t num_bytes) { counts["copies"]++, counts["copied_bytes"] += (int64_t)num_bytes; }

} // namespace fake

using namespace fake;

#define CALL(name, parameters, context, ...) CALL_OF_PASSES(name, parameters, context, , __VA_ARGS__)
/* quick: first, without a lock or a count, for the option `at_once`. */
#define CALL_OF_PASSES(name, parameters, context, quick, ...) \
    extern "C" __attribute__((visibility("default"))) int name parameters { \
        quick \
        std::lock_guard<std::recursive_mutex> guard(fake::lock); \
        if (const int code = begin(#name, context)) return code; \
        __VA_ARGS__ \
    }
#define ALIVE(handles, handle) if (!handles.count((void *)handle)) return 400;

