/* A driver that is none, with the names of NVIDIA's: streams do nothing until somebody waits, memory is poisoned, graphs keep the
 * parameters they were given, and operations or accesses of the host that touch the same bytes unordered are reported.
 *
 * `fake.py` builds it and has what tests need; the structs are those of `card_driver.h`. */
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

static int begin(const char *call, bool needs_context = true) {
    if (const int code = injected(call)) return code;
    return needs_context && current != &context ? 201 : 0;
}

static reference queue_on(void *s, const std::string &name, std::function<void(const access &)> run, bool is_copy) {
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

#define CALL(name, parameters, context, ...) \
    extern "C" __attribute__((visibility("default"))) int name parameters { \
        std::lock_guard<std::recursive_mutex> guard(fake::lock); \
        if (const int code = begin(#name, context)) return code; \
        __VA_ARGS__ \
    }
#define ALIVE(handles, handle) if (!handles.count((void *)handle)) return 400;

CALL(cuInit, (unsigned), false, return set.num_cards ? 0 : 100;)
CALL(cuDriverGetVersion, (int *version), false, *version = 13000; return 0;)
CALL(cuGetErrorName, (int code, const char **name), false,
     static const std::map<int, const char *> names = {
         {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"},
         {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
         {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"}, {600, "CUDA_ERROR_NOT_READY"},
         {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {702, "CUDA_ERROR_LAUNCH_TIMEOUT"},
         {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"}, {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
         {719, "CUDA_ERROR_LAUNCH_FAILED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"},
         {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}, {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"}};
     const auto found = names.find(code);
     *name = found == names.end() ? nullptr : found->second;
     return *name ? 0 : 1;)
CALL(cuGetErrorString, (int, const char **text), false, *text = "as the fake driver was told"; return 0;)
CALL(cuDeviceGetCount, (int *count), false, *count = (int)set.num_cards; return 0;)
CALL(cuDeviceGet, (int *device, int number), false, *device = number; return number < set.num_cards ? 0 : 101;)
CALL(cuDeviceGetName, (char *name, int room, int), false, std::snprintf(name, (size_t)room, "Fake card"); return 0;)
CALL(cuDeviceGetAttribute, (int *value, int attribute, int), false,
     static const std::map<int, int> values = {{13, 1700000}, {16, 28}, {17, 1}, {18, 0}, {19, 1}, {36, 7500000}, {37, 192}};
     const auto found = values.find(attribute);
     *value = attribute == 75 ? (int)set.architecture / 10 : attribute == 76 ? (int)set.architecture % 10 : found == values.end() ? 0 : found->second;
     return 0;)
CALL(cuDeviceTotalMem_v2, (size_t *num_bytes, int), false, *num_bytes = (size_t)set.vram; return 0;)
CALL(cuDevicePrimaryCtxRetain, (void **made, int), false, *made = &context; return 0;)
CALL(cuDevicePrimaryCtxRelease_v2, (int), false, return 0;)
CALL(cuCtxSetCurrent, (void *wanted), false, current = wanted; return wanted && wanted != &context ? 201 : 0;)
CALL(cuCtxGetCurrent, (void **found), false, *found = current; return 0;)
CALL(cuCtxSynchronize, (), true,
     counts["synchronizations"]++;
     operations.finish_all();
     for (void *s : streams) operations.finish(of(s).tail);
     return set.lost_after == 0 ? (int)set.lost_code : 0;)

CALL(cuMemGetInfo_v2, (size_t *num_free, size_t *num_bytes), true, *num_free = cards_memory.free_bytes(), *num_bytes = (size_t)set.vram; return 0;)
CALL(cuMemAlloc_v2, (uint64_t *at, size_t num_bytes), true,
     const int code = cards_memory.allocate(num_bytes, at);
     if (code == 0) orders.forget(*at, *at + num_bytes);
     return code;)
CALL(cuMemFree_v2, (uint64_t at), true,
     operations.finish_all(); /* as the real one waits */
     return at == 0 || cards_memory.release(at) ? 0 : 1;)
CALL(cuMemHostAlloc, (void **at, size_t num_bytes, unsigned flags), true,
     const size_t whole = (num_bytes + PAGE - 1) / PAGE * PAGE;
     *at = num_bytes ? mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
     if (*at == MAP_FAILED) return 2;
     std::memset(*at, 0xff, num_bytes);
     const int code = cards_memory.lock_pages((uint64_t)*at, num_bytes, flags, true);
     if (code) munmap(*at, whole);
     else orders.forget((uint64_t)*at, (uint64_t)*at + num_bytes);
     return code;)
CALL(cuMemFreeHost, (void *at), true,
     const locked_block *found = cards_memory.locked_at((uint64_t)at);
     if (!found || !found->is_own) return 1;
     const uint64_t num_bytes = found->num_bytes;
     orders.host_touches((uint64_t)at, (uint64_t)at + num_bytes, true, "cuMemFreeHost");
     cards_memory.unlock_pages((uint64_t)at);
     munmap(at, (num_bytes + PAGE - 1) / PAGE * PAGE);
     return 0;)
CALL(cuMemHostRegister_v2, (void *at, size_t num_bytes, unsigned flags), true, return cards_memory.lock_pages((uint64_t)at, num_bytes, flags, false);)
CALL(cuMemHostUnregister, (void *at), true,
     const locked_block *found = cards_memory.locked_at((uint64_t)at);
     if (!found || found->is_own) return 713;
     orders.host_touches((uint64_t)at, (uint64_t)at + found->num_bytes, true, "cuMemHostUnregister");
     cards_memory.unlock_pages((uint64_t)at);
     return 0;)
CALL(cuMemHostGetDevicePointer_v2, (uint64_t *device, void *at, unsigned), true,
     uint64_t from = 0;
     const locked_block *block = cards_memory.locked_around((uint64_t)at, 1, &from);
     if (!block || !(block->flags & OM_CU_MAPPED)) return 1;
     *device = block->alias + ((uint64_t)at - from);
     return 0;)

CALL(cuMemcpyHtoDAsync_v2, (uint64_t to, const void *from, size_t num_bytes, void *s), true,
     ALIVE(streams, s)
     count_copy(num_bytes);
     if (set.no_kernels) return 0;
     if (cards_memory.locked_around((uint64_t)from, num_bytes)) {
         queue_on(s, "a copy to the card", copying(to, (uint64_t)from, num_bytes, true, false), true);
         return 0;
     }
     orders.host_touches((uint64_t)from, (uint64_t)from + num_bytes, false, "a copy out of pageable memory");
     std::vector<char> staged((const char *)from, (const char *)from + num_bytes);
     const int code = synchronize(of(s).tail); /* as the real one waits before it stages */
     queue_on(s, "a copy to the card", [=](const access &me) {
         card_touches(to, num_bytes, true, me);
         if (cards_memory.reaches(to, num_bytes)) std::memcpy((void *)to, staged.data(), num_bytes);
     }, true);
     return code;)
CALL(cuMemcpyDtoHAsync_v2, (void *to, uint64_t from, size_t num_bytes, void *s), true,
     ALIVE(streams, s)
     count_copy(num_bytes);
     if (set.no_kernels) return 0;
     const reference op = queue_on(s, "a copy to the host", copying((uint64_t)to, from, num_bytes, false, true), true);
     return cards_memory.locked_around((uint64_t)to, num_bytes) ? 0 : synchronize(op);)
CALL(cuMemcpyDtoDAsync_v2, (uint64_t to, uint64_t from, size_t num_bytes, void *s), true,
     ALIVE(streams, s)
     count_copy(num_bytes);
     if (!set.no_kernels) queue_on(s, "a copy on the card", copying(to, from, num_bytes, true, true), true);
     return 0;)
CALL(cuMemsetD8Async, (uint64_t to, unsigned char value, size_t num_bytes, void *s), true,
     ALIVE(streams, s)
     if (!set.no_kernels) queue_on(s, "a memset", [=](const access &me) {
         card_touches(to, num_bytes, true, me);
         if (cards_memory.reaches(to, num_bytes)) std::memset((void *)to, value, num_bytes);
     }, false);
     return 0;)

CALL(cuStreamCreate, (void **made, unsigned flags), true,
     if (!(flags & OM_CU_NON_BLOCKING)) report("a stream that waits for the legacy default stream");
     streams.insert(*made = new stream);
     num_streams++;
     return 0;)
CALL(cuStreamDestroy_v2, (void *s), true, ALIVE(streams, s) streams.erase(s); delete (stream *)s; return 0;)
CALL(cuStreamSynchronize, (void *s), true, ALIVE(streams, s) return synchronize(of(s).tail);)
CALL(cuStreamQuery, (void *s), true, ALIVE(streams, s) return operations.query(of(s).tail) ? 0 : 600;)
CALL(cuStreamWaitEvent, (void *s, void *e, unsigned), true,
     ALIVE(streams, s) ALIVE(events, e)
     if (!((event *)e)->is_recorded) report("a stream waits for an event that was never recorded: it does not wait");
     if (set.no_kernels) return 0;
     of(s).tail = operations.add({of(s).tail, ((event *)e)->last}, "a wait for an event", nullptr);
     return 0;)
CALL(cuEventCreate, (void **made, unsigned), true, events.insert(*made = new event); return 0;)
CALL(cuEventDestroy_v2, (void *e), true, ALIVE(events, e) events.erase(e); delete (event *)e; return 0;)
CALL(cuEventRecord, (void *e, void *s), true, ALIVE(streams, s) ALIVE(events, e) *(event *)e = {of(s).tail, true}; return 0;)
CALL(cuEventQuery, (void *e), true, ALIVE(events, e) return operations.query(((event *)e)->last) ? 0 : 600;)
CALL(cuEventSynchronize, (void *e), true, ALIVE(events, e) return synchronize(((event *)e)->last);)
CALL(cuEventElapsedTime, (float *ms, void *first, void *last), true, ALIVE(events, first) ALIVE(events, last) *ms = 0.01f; return 0;)

CALL(cuModuleLoadData, (void **made, const void *image), true,
     static const std::string mark = "OMFAKE:";
     if (std::strncmp((const char *)image, mark.c_str(), mark.size())) return 200;
     void *library = dlopen((const char *)image + mark.size(), RTLD_NOW | RTLD_LOCAL);
     if (!library) return 200;
     auto *m = new module{library, (const shim::entry *)dlsym(library, "shim_kernels"), nullptr, nullptr};
     m->ranges = (decltype(m->ranges))dlsym(library, "shim_ranges"), m->races = (decltype(m->races))dlsym(library, "shim_races");
     modules.insert(*made = m);
     return 0;)
CALL(cuModuleUnload, (void *m), true, ALIVE(modules, m) modules.erase(m); return 0;)
CALL(cuModuleGetFunction, (void **made, void *m, const char *name), true,
     ALIVE(modules, m)
     for (const shim::entry *e = ((module *)m)->entries; e->name; e++)
         if (!std::strcmp(e->name, name)) return *made = new function{(module *)m, e}, 0;
     return 500;)
CALL(cuFuncGetAttribute, (int *value, int attribute, void *), true, *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0; return 0;)
CALL(cuLaunchKernel, (void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned, void *s, void **params, void **), true,
     ALIVE(streams, s)
     counts["kernels"]++;
     if (set.no_kernels && !executed.count(((function *)f)->entry->name)) return 0;
     const unsigned g[] = {gx, gy, gz};
     const unsigned b[] = {bx, by, bz};
     const launch l = describe((function *)f, g, b, params);
     if (!l.is_possible()) return 1;
     queue_on(s, ((function *)f)->entry->name, [l](const access &me) { l.run(me); }, false);
     return 0;)

static int added(void **made, void *g, void *const *after, size_t num_after, node &&n) {
    ALIVE(graphs, g)
    *made = ((graph *)g)->add(std::move(n), after, num_after);
    return *made ? 0 : 1;
}
CALL(cuGraphCreate, (void **made, unsigned), true, graphs.insert(*made = new graph); return 0;)
CALL(cuGraphDestroy, (void *g), true, ALIVE(graphs, g) graphs.erase(g); delete (graph *)g; return 0;)
CALL(cuGraphAddKernelNode_v2, (void **made, void *g, void *const *after, size_t num_after, const om_kernel_node *params), true,
     node n{node::KERNEL, {}, describe((function *)params->function, params->grid, params->block, params->params), "", nullptr};
     n.name = std::string(n.kernel.what->entry->name) + " in a graph";
     if (!n.kernel.is_possible()) return 1;
     return added(made, g, after, num_after, std::move(n));)
CALL(cuGraphAddMemcpyNode, (void **made, void *g, void *const *after, size_t num_after, const om_copy_node *params, void *), true,
     const bool to_card = params->to.memory == OM_CU_CARD_MEMORY;
     const bool from_card = params->from.memory == OM_CU_CARD_MEMORY;
     if (params->num_rows != 1 || params->num_layers != 1) return 1;
     const uint64_t to = to_card ? params->to.device : (uint64_t)params->to.host;
     const uint64_t from = from_card ? params->from.device : (uint64_t)params->from.host;
     return added(made, g, after, num_after, {node::COPY, {}, {}, "a copy in a graph", copying(to, from, params->num_bytes, to_card, from_card)});)
CALL(cuGraphAddMemsetNode, (void **made, void *g, void *const *after, size_t num_after, const om_memset_node *params, void *), true,
     if (params->element_bytes != 1 || params->height != 1) return 1;
     const om_memset_node p = *params;
     return added(made, g, after, num_after, {node::FILL, {}, {}, "a memset in a graph", [p](const access &me) {
         card_touches(p.to, p.width, true, me);
         if (cards_memory.reaches(p.to, p.width)) std::memset((void *)p.to, (int)p.value, p.width);
     }});)
CALL(cuGraphAddEmptyNode, (void **made, void *g, void *const *after, size_t num_after), true,
     return added(made, g, after, num_after, {node::EMPTY, {}, {}, "an empty node", nullptr});)
CALL(cuGraphInstantiateWithFlags, (void **made, void *g, unsigned long long), true,
     ALIVE(graphs, g)
     executables.insert(*made = new executable(*(graph *)g));
     return 0;)
CALL(cuGraphUpload, (void *e, void *s), true, ALIVE(executables, e) ALIVE(streams, s) return 0;)
CALL(cuGraphLaunch, (void *e, void *s), true, ALIVE(executables, e) ALIVE(streams, s) ((executable *)e)->launch_on(of(s)); return 0;)
CALL(cuGraphExecKernelNodeSetParams_v2, (void *e, void *handle, const om_kernel_node *params), true,
     ALIVE(executables, e)
     auto *x = (executable *)e;
     const auto found = x->numbers.find((const node *)handle);
     if (found == x->numbers.end() || x->nodes[found->second].kind != node::KERNEL) return 1;
     x->nodes[found->second].kernel = describe((function *)params->function, params->grid, params->block, params->params);
     return x->nodes[found->second].kernel.is_possible() ? 0 : 1;)
CALL(cuGraphExecDestroy, (void *e), true, ALIVE(executables, e) executables.erase(e); delete (executable *)e; return 0;)

#define CONTROL extern "C" __attribute__((visibility("default")))
CONTROL void omHostAccess(const void *at, int64_t num_bytes, int kind) {
    std::lock_guard<std::recursive_mutex> guard(fake::lock);
    const uint64_t begin = cards_memory.canonical((uint64_t)at);
    if (cards_memory.is_of_card(begin)) return report("the host touches " + cards_memory.words(begin));
    if (kind != OM_HOST_POLLS) return orders.host_touches(begin, begin + (uint64_t)num_bytes, kind == OM_HOST_WRITES, "the host");
    operations.step();
    orders.host_follows(orders.writer(begin));
}
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
    fake::set = {}, failures.clear(), counts.clear(), problems.clear(), executed.clear();
    const auto place = std::move(orders.place);
    orders = {};
    orders.place = [](uint64_t at) { return cards_memory.words(at); };
    current = nullptr;
}
