/* A driver that is none, with the names of NVIDIA's: streams do nothing until the host waits, memory is poisoned, graphs keep the
 * parameters they were given, and operations or accesses of the host that touch the same bytes unordered are reported.
 *
 * `fake.py` builds it and has what tests need; the structs are those of `card_driver.h`. */
#include "fake_calls.h"

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
CALL(cuGetErrorString, (int, const char **text), false, *text = "injected"; return 0;)
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
CALL_OF_PASSES(cuCtxSetCurrent, (void *wanted), false, if (set.at_once) { current = wanted; return 0; }, current = wanted; return wanted && wanted != &context ? 201 : 0;)
CALL(cuCtxGetCurrent, (void **found), false, *found = current; return 0;)
CALL_OF_PASSES(cuCtxSynchronize, (), true, if (set.at_once) return 0;,
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
CALL_OF_PASSES(cuMemcpyDtoHAsync_v2, (void *to, uint64_t from, size_t num_bytes, void *s), true, if (set.at_once) return 0;,
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
CALL_OF_PASSES(cuStreamQuery, (void *s), true, if (set.at_once) return 0;, ALIVE(streams, s) return operations.query(of(s).tail) ? 0 : 600;)
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
CALL_OF_PASSES(cuLaunchKernel, (void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned, void *s, void **params, void **), true,
     if (set.at_once) return 0;,
     ALIVE(streams, s)
     counts["kernels"]++;
     if (set.no_kernels && !executed.count(((function *)f)->entry->name)) return 0;
     const unsigned g[] = {gx, gy, gz};
     const unsigned b[] = {bx, by, bz};
     const launch l = describe((function *)f, g, b, params);
     if (!l.is_possible()) return 1;
     if (of(s).taken) return of(s).taken->add({node::KERNEL, {}, l, std::string(l.what->entry->name) + " in a graph", nullptr}), 0;
     queue_on(s, l.what->entry->name, [l](const access &me) { l.run(me); }, false);
     return 0;)

#include "fake_graph_calls.h"
#include "fake_control.h"
