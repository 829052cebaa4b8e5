#include "card_graph.h"

#define MAX_NODES 64
#define MAX_AFTER 4

static om_kernel_node described(const om_card_node *node, void **params) {
    params[0] = (void *)node->params;
    return (om_kernel_node){.function = node->function,
                            .grid = {(unsigned)node->grid[0], (unsigned)node->grid[1], (unsigned)node->grid[2]},
                            .block = {(unsigned)node->num_threads, 1, 1},
                            .params = params};
}

static int add_node(const om_driver *driver, void *graph, const om_card_node *nodes, int64_t n, void **handles) {
    void *params[1], *after[MAX_AFTER];
    size_t num_after = 0;
    const om_kernel_node kernel = described(nodes + n, params);
    for (int i = 0; i < MAX_AFTER; i++)
        if (nodes[n].after[i] >= 0) after[num_after++] = handles[nodes[n].after[i]];
    return driver->cuGraphAddKernelNode(handles + n, graph, after, num_after, &kernel);
}

/* An executable graph of these kernels, each behind those of its `after`, which come before it in the list. Parameters are copied
 * into it. Returns 0, or OM_CARD_ERROR of the first call that failed. */
OM_EXPORT int64_t om_card_graph(const om_session *session, const om_card_node *nodes, int64_t num_nodes, void **executable) {
    const om_driver *driver = session->driver;
    void *graph = NULL, *handles[MAX_NODES];
    if (num_nodes > MAX_NODES) return -1;
    int code = driver->cuCtxSetCurrent(session->context);
    if (code == 0) code = driver->cuGraphCreate(&graph, 0);
    for (int64_t n = 0; n < num_nodes && code == 0; n++) code = add_node(driver, graph, nodes, n, handles);
    if (code == 0) code = driver->cuGraphInstantiateWithFlags(executable, graph, 0);
    if (graph != NULL) driver->cuGraphDestroy(graph);
    return code == 0 ? 0 : OM_CARD_ERROR(code);
}

OM_EXPORT void om_card_graph_free(const om_session *session, void *executable) {
    session->driver->cuCtxSetCurrent(session->context);
    session->driver->cuGraphExecDestroy(executable);
}

/* Launch one kernel alone. Returns the driver's code. */
int om_card_launch_node(const om_session *session, const om_card_node *node) {
    void *params[1];
    const om_kernel_node kernel = described(node, params);
    return session->driver->cuLaunchKernel(kernel.function, kernel.grid[0], kernel.grid[1], kernel.grid[2], kernel.block[0], 1, 1, 0,
                                           session->stream, params, NULL);
}
