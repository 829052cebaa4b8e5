/* The functions of NVIDIA's driver that the device pass calls, in a table that is filled at run time: no toolkit, no header and
 * no library of CUDA is needed to build or to install. Types and numbers are those of CUDA's driver API. */
#ifndef OM_CARD_DRIVER_H
#define OM_CARD_DRIVER_H

#include "om_kernels.h"

typedef uint64_t om_address;   /* of memory as the card sees it: CUdeviceptr */
typedef void om_cu;            /* a handle: context, module, function, stream, event, graph, node */

enum { OM_CU_OK = 0, OM_CU_INVALID = 1, OM_CU_NO_MEMORY = 2, OM_CU_NO_CARD = 100, OM_CU_NOT_READY = 600,
       OM_CU_ALREADY_LOCKED = 712, OM_CU_NOT_LOCKED = 713 };
enum { OM_CU_NON_BLOCKING = 1 };                  /* streams: apart from the legacy default stream */
enum { OM_CU_NO_TIMING = 2 };                     /* events */
enum { OM_CU_PORTABLE = 1, OM_CU_MAPPED = 2 };    /* page-locked memory, allocated or registered */
enum { OM_CU_HOST_MEMORY = 1, OM_CU_CARD_MEMORY = 2 };
enum { OM_CU_CAPTURE_GLOBAL = 0, OM_CU_CAPTURE_THREAD = 1, OM_CU_CAPTURE_RELAXED = 2 };

/* CUDA_KERNEL_NODE_PARAMS_v2. What `params` points to is copied when the node is added. */
typedef struct {
    om_cu *function;
    unsigned grid[3], block[3], shared_bytes;
    void **params, **extra;
    om_cu *kernel, *context;
} om_kernel_node;

/* CUDA_MEMSET_NODE_PARAMS. */
typedef struct {
    om_address to;
    size_t pitch;
    unsigned value, element_bytes;
    size_t width, height;
} om_memset_node;

/* CUDA_MEMCPY3D: one side and the other, then bytes, 1, 1. */
typedef struct {
    struct {
        size_t x, y, z, level;
        int memory; /* OM_CU_HOST_MEMORY or OM_CU_CARD_MEMORY */
        const void *host;
        om_address device;
        om_cu *array;
        void *reserved;
        size_t pitch, height;
    } from, to;
    size_t num_bytes, num_rows, num_layers;
} om_copy_node;

/* FUNCTION(name, version of its symbol, parameters). */
#define OM_DRIVER_FUNCTIONS(FUNCTION) \
    FUNCTION(cuInit, , (unsigned flags)) \
    FUNCTION(cuDriverGetVersion, , (int *version)) \
    FUNCTION(cuGetErrorName, , (int code, const char **name)) \
    FUNCTION(cuGetErrorString, , (int code, const char **text)) \
    FUNCTION(cuDeviceGetCount, , (int *count)) \
    FUNCTION(cuDeviceGet, , (int *device, int number)) \
    FUNCTION(cuDeviceGetName, , (char *name, int room, int device)) \
    FUNCTION(cuDeviceGetAttribute, , (int *value, int attribute, int device)) \
    FUNCTION(cuDeviceTotalMem, _v2, (size_t *num_bytes, int device)) \
    FUNCTION(cuDevicePrimaryCtxRetain, , (om_cu **context, int device)) \
    FUNCTION(cuDevicePrimaryCtxRelease, _v2, (int device)) \
    FUNCTION(cuCtxSetCurrent, , (om_cu *context)) \
    FUNCTION(cuCtxGetCurrent, , (om_cu **context)) \
    FUNCTION(cuCtxSynchronize, , (void)) \
    FUNCTION(cuMemGetInfo, _v2, (size_t *num_free, size_t *num_bytes)) \
    FUNCTION(cuMemAlloc, _v2, (om_address *at, size_t num_bytes)) \
    FUNCTION(cuMemFree, _v2, (om_address at)) \
    FUNCTION(cuMemHostAlloc, , (void **at, size_t num_bytes, unsigned flags)) \
    FUNCTION(cuMemFreeHost, , (void *at)) \
    FUNCTION(cuMemHostRegister, _v2, (void *at, size_t num_bytes, unsigned flags)) \
    FUNCTION(cuMemHostUnregister, , (void *at)) \
    FUNCTION(cuMemHostGetDevicePointer, _v2, (om_address *device, void *at, unsigned flags)) \
    FUNCTION(cuMemcpyHtoDAsync, _v2, (om_address to, const void *from, size_t num_bytes, om_cu *stream)) \
    FUNCTION(cuMemcpyDtoHAsync, _v2, (void *to, om_address from, size_t num_bytes, om_cu *stream)) \
    FUNCTION(cuMemcpyDtoDAsync, _v2, (om_address to, om_address from, size_t num_bytes, om_cu *stream)) \
    FUNCTION(cuMemsetD8Async, , (om_address to, unsigned char value, size_t num_bytes, om_cu *stream)) \
    FUNCTION(cuStreamCreate, , (om_cu **stream, unsigned flags)) \
    FUNCTION(cuStreamDestroy, _v2, (om_cu *stream)) \
    FUNCTION(cuStreamSynchronize, , (om_cu *stream)) \
    FUNCTION(cuStreamQuery, , (om_cu *stream)) \
    FUNCTION(cuStreamWaitEvent, , (om_cu *stream, om_cu *event, unsigned flags)) \
    FUNCTION(cuEventCreate, , (om_cu **event, unsigned flags)) \
    FUNCTION(cuEventDestroy, _v2, (om_cu *event)) \
    FUNCTION(cuEventRecord, , (om_cu *event, om_cu *stream)) \
    FUNCTION(cuEventQuery, , (om_cu *event)) \
    FUNCTION(cuEventSynchronize, , (om_cu *event)) \
    FUNCTION(cuEventElapsedTime, , (float *ms, om_cu *first, om_cu *last)) \
    FUNCTION(cuModuleLoadData, , (om_cu **module, const void *image)) \
    FUNCTION(cuModuleUnload, , (om_cu *module)) \
    FUNCTION(cuModuleGetFunction, , (om_cu **function, om_cu *module, const char *name)) \
    FUNCTION(cuFuncGetAttribute, , (int *value, int attribute, om_cu *function)) \
    FUNCTION(cuLaunchKernel, , (om_cu *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
                                unsigned block_y, unsigned block_z, unsigned shared_bytes, om_cu *stream, void **params, \
                                void **extra)) \
    FUNCTION(cuGraphCreate, , (om_cu **graph, unsigned flags)) \
    FUNCTION(cuGraphDestroy, , (om_cu *graph)) \
    FUNCTION(cuGraphAddKernelNode, _v2, (om_cu **node, om_cu *graph, om_cu *const *after, size_t num_after, \
                                         const om_kernel_node *params)) \
    FUNCTION(cuGraphAddMemcpyNode, , (om_cu **node, om_cu *graph, om_cu *const *after, size_t num_after, \
                                      const om_copy_node *params, om_cu *context)) \
    FUNCTION(cuGraphAddMemsetNode, , (om_cu **node, om_cu *graph, om_cu *const *after, size_t num_after, \
                                      const om_memset_node *params, om_cu *context)) \
    FUNCTION(cuGraphAddEmptyNode, , (om_cu **node, om_cu *graph, om_cu *const *after, size_t num_after)) \
    FUNCTION(cuGraphInstantiateWithFlags, , (om_cu **executable, om_cu *graph, unsigned long long flags)) \
    FUNCTION(cuGraphUpload, , (om_cu *executable, om_cu *stream)) \
    FUNCTION(cuGraphLaunch, , (om_cu *executable, om_cu *stream)) \
    FUNCTION(cuGraphExecKernelNodeSetParams, _v2, (om_cu *executable, om_cu *node, const om_kernel_node *params)) \
    FUNCTION(cuGraphExecDestroy, , (om_cu *executable))

#define OM_DECLARE_DRIVER_FUNCTION(name, version, parameters) int(*name) parameters;

struct om_driver {
    OM_DRIVER_FUNCTIONS(OM_DECLARE_DRIVER_FUNCTION)
    void (*host_access)(const void *at, int64_t num_bytes, int kind); /* of a driver that checks orders; NULL of NVIDIA's */
};

enum { OM_HOST_READS = 0, OM_HOST_WRITES = 1, OM_HOST_POLLS = 2 };

/* Report what the host does with memory that the card reaches too. A flag that is polled orders what its writer did before it. */
static inline void om_host_access(const om_driver *driver, const void *at, int64_t num_bytes, int kind) {
    if (driver->host_access != NULL) driver->host_access(at, num_bytes, kind);
}

#endif
