/* Graphs of the fake driver: nodes that are added one by one, executables, and captures of one stream. */
#pragma once
#include "fake_calls.h"

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
CALL_OF_PASSES(cuGraphLaunch, (void *e, void *s), true, if (set.at_once) return ((executable *)e)->launch_at_once();,
     ALIVE(executables, e) ALIVE(streams, s) ((executable *)e)->launch_on(of(s)); return 0;)
CALL(cuGraphExecKernelNodeSetParams_v2, (void *e, void *handle, const om_kernel_node *params), true,
     ALIVE(executables, e)
     auto *x = (executable *)e;
     const auto found = x->numbers.find((const node *)handle);
     if (found == x->numbers.end() || x->nodes[found->second].kind != node::KERNEL) return 1;
     x->nodes[found->second].kernel = describe((function *)params->function, params->grid, params->block, params->params);
     return x->nodes[found->second].kernel.is_possible() ? 0 : 1;)
CALL(cuGraphExecDestroy, (void *e), true, ALIVE(executables, e) executables.erase(e); delete (executable *)e; return 0;)


CALL(cuStreamBeginCapture_v2, (void *s, int mode), true,
     ALIVE(streams, s)
     of(s).taken = std::make_shared<capture>(capture{{}, nullptr, mode, std::this_thread::get_id(), false});
     return 0;)
CALL(cuStreamEndCapture, (void *s, void **made), true,
     ALIVE(streams, s)
     if (!of(s).taken) return 1;
     const std::shared_ptr<capture> taken = std::move(of(s).taken);
     of(s).taken = nullptr;
     *made = nullptr;
     if (taken->is_broken) return 901;
     graphs.insert(*made = new graph(std::move(taken->made)));
     return 0;)
