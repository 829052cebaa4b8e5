/* What Python does with a card beside passes: memory, page-locking, modules. Every call makes the card's primary context, which
 * torch uses too, that of its thread. Results are 0 or a code of the driver. */
#include "card_driver.h"

#include <stdlib.h>

OM_EXPORT int om_session_open(om_driver *driver, int32_t device, om_session *session) {
    *session = (om_session){.driver = driver, .device = device};
    int code = driver->cuDevicePrimaryCtxRetain(&session->context, device);
    if (code == OM_CU_OK) code = driver->cuCtxSetCurrent(session->context);
    if (code == OM_CU_OK) code = driver->cuStreamCreate(&session->stream, OM_CU_NON_BLOCKING);
    return code;
}

OM_EXPORT void om_session_close(om_session *session) {
    session->driver->cuCtxSetCurrent(session->context);
    if (session->stream != NULL) session->driver->cuStreamDestroy(session->stream);
    session->driver->cuDevicePrimaryCtxRelease(session->device);
}

static int enter(const om_session *session) { return session->driver->cuCtxSetCurrent(session->context); }

/* Memory of the card. */
OM_EXPORT int om_session_allocate(const om_session *session, int64_t num_bytes, uint64_t *address) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuMemAlloc(address, (size_t)num_bytes);
}

OM_EXPORT int om_session_free(const om_session *session, uint64_t address) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuMemFree(address);
}

/* Page-locked memory that both sides reach: its addresses here and on the card, which differ on some systems. */
OM_EXPORT int om_session_allocate_shared(const om_session *session, int64_t num_bytes, void **at, uint64_t *address) {
    int code = enter(session);
    if (code == OM_CU_OK) code = session->driver->cuMemHostAlloc(at, (size_t)num_bytes, OM_CU_PORTABLE | OM_CU_MAPPED);
    if (code == OM_CU_OK) code = session->driver->cuMemHostGetDevicePointer(address, *at, 0);
    return code;
}

OM_EXPORT int om_session_free_shared(const om_session *session, void *at) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuMemFreeHost(at);
}

/* Lock memory of the host, mapped as well as portable, and its address on the card. */
OM_EXPORT int om_session_lock(const om_session *session, void *at, int64_t num_bytes) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuMemHostRegister(at, (size_t)num_bytes, OM_CU_PORTABLE | OM_CU_MAPPED);
}

OM_EXPORT int om_session_unlock(const om_session *session, void *at) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuMemHostUnregister(at);
}

OM_EXPORT int om_session_address_of(const om_session *session, void *at, uint64_t *address) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuMemHostGetDevicePointer(address, at, 0);
}

/* Copies behind all that was queued, and waits. */
OM_EXPORT int om_session_upload(const om_session *session, uint64_t to, const void *from, int64_t num_bytes) {
    int code = enter(session);
    if (code == OM_CU_OK) code = session->driver->cuMemcpyHtoDAsync(to, from, (size_t)num_bytes, session->stream);
    return code != OM_CU_OK ? code : session->driver->cuStreamSynchronize(session->stream);
}

OM_EXPORT int om_session_download(const om_session *session, void *to, uint64_t from, int64_t num_bytes) {
    int code = enter(session);
    if (code == OM_CU_OK) code = session->driver->cuMemcpyDtoHAsync(to, from, (size_t)num_bytes, session->stream);
    return code != OM_CU_OK ? code : session->driver->cuStreamSynchronize(session->stream);
}

OM_EXPORT int om_session_load(const om_session *session, const void *image, void **module) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuModuleLoadData(module, image);
}

OM_EXPORT int om_session_unload(const om_session *session, void *module) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuModuleUnload(module);
}

OM_EXPORT int om_session_function(const om_session *session, void *module, const char *name, void **function) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuModuleGetFunction(function, module, name);
}

/* Wait for all work of the context, torch's included. */
OM_EXPORT int om_session_synchronize(const om_session *session) {
    const int code = enter(session);
    return code != OM_CU_OK ? code : session->driver->cuCtxSynchronize();
}
