/* Takes rows through a model on a card. Queued: all graphs at once, and the device fetches what is missing; where it cannot, it
 * stops, the host edits the tables, and the pass continues behind the layer's router. Stepwise: see `card_step.c`.
 *
 * No thread of its own: `om_card_next` is called until the pass has ended, and returns where Python is needed. */
#define _GNU_SOURCE
#include "card_pass.h"

#include <stdlib.h>
#include <time.h>

#define NOT_READY 600
#define SHORTEST_NAP_S 20e-6
#define NAP_SHARE 0.9 /* of the expected time that is slept away */

double om_card_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

OM_EXPORT om_device_pass *om_card_open(const om_card_options *options) {
    om_device_pass *pass = calloc(1, sizeof *pass);
    if (pass == NULL) return NULL;
    pass->options = options, pass->session = options->session, pass->driver = options->session->driver;
    pass->notice = options->notice, pass->token = 1;
    return pass;
}

OM_EXPORT void om_card_close(om_device_pass *pass) { free(pass); }

int om_card_run_graph(const om_device_pass *pass, void *graph) {
    return pass->driver->cuGraphLaunch(graph, pass->session->stream);
}

int64_t om_card_is_idle(const om_device_pass *pass) {
    const int code = pass->driver->cuStreamQuery(pass->session->stream);
    return code == 0 ? 1 : code == NOT_READY ? 0 : OM_CARD_ERROR(code);
}

/* Queue the edits that are given. Taken here, so that an interrupt in Python leaves them given or taken, and never lost. */
static int apply(const om_device_pass *pass) {
    int code = pass->driver->cuCtxSetCurrent(pass->session->context);
    const int64_t num_edits = *pass->options->num_edits;
    if (code != 0 || num_edits <= 0) return code;
    om_host_access(pass->driver, pass->options->edits, num_edits * (int64_t)sizeof(om_card_edit), OM_HOST_WRITES);
    om_card_apply_params params = *(const om_card_apply_params *)pass->options->apply->params;
    params.num_edits = (int)num_edits;
    om_card_node node = *pass->options->apply;
    node.params = &params;
    node.grid[0] = (int32_t)OM_CARD_UP(num_edits, OM_APPLY_THREADS);
    code = om_card_launch_node(pass->session, &node);
    if (code == 0) *pass->options->num_edits = 0;
    return code;
}

int om_card_queue_end(om_device_pass *pass) {
    const om_card_options *o = pass->options;
    const int code = om_card_run_graph(pass, pass->end);
    if (code != 0) return code;
    return pass->driver->cuMemcpyDtoHAsync(o->host_log, pass->steps->log, (size_t)pass->steps->log_bytes, pass->session->stream);
}

/* Queue the layers from `first` on, whose attention has been computed where `is_behind_router`. */
static int queue_layers(om_device_pass *pass, int64_t first, int is_behind_router) {
    int code = 0;
    for (int64_t l = first; l < pass->steps->num_layers && code == 0; l++) {
        const om_card_layer *layer = pass->steps->layers + l;
        if (!is_behind_router || l > first) code = om_card_run_graph(pass, layer->attend);
        if (code == 0 && layer->experts != NULL) code = om_card_run_graph(pass, layer->experts);
    }
    return code == 0 ? om_card_queue_end(pass) : code;
}

static int64_t began(om_device_pass *pass, int state, int code) {
    pass->state = code == 0 ? state : OM_CARD_IDLE;
    return code == 0 ? 0 : OM_CARD_ERROR(code);
}

/* Begin a pass: the edits, which include its rows, tokens and positions where they are not what the device has; gives:
 * OM_GIVES_HIDDEN and on. Returns 0 or OM_CARD_ERROR. */
OM_EXPORT int64_t om_card_begin(om_device_pass *pass, const om_card_steps *steps, int64_t num_rows, int32_t is_stepwise, int32_t gives) {
    pass->steps = steps, pass->end = steps->ends[gives], pass->num_rows = num_rows, pass->at = 0, pass->num_on_cpu = 0, pass->cpu_s = 0.0;
    pass->began_s = om_card_seconds();
    int code = apply(pass);
    if (code == 0) code = om_card_run_graph(pass, steps->begin);
    if (code != 0) return began(pass, OM_CARD_IDLE, code);
    if (!is_stepwise) return began(pass, OM_CARD_RUNNING, queue_layers(pass, 0, 0));
    return began(pass, OM_CARD_ROUTING, om_card_run_graph(pass, steps->layers[0].attend));
}

/* Continue a stopped pass behind the router of its layer, once the edits make the layer possible; they clear `stop`. */
OM_EXPORT int64_t om_card_continue(om_device_pass *pass, int32_t is_stepwise) {
    const om_card_layer *layer = pass->steps->layers + pass->at;
    pass->notice->stop = 0, pass->notice->stamp = 0;
    om_host_access(pass->driver, pass->notice, sizeof *pass->notice, OM_HOST_WRITES);
    int code = apply(pass);
    if (code == 0) code = om_card_launch_node(pass->session, layer->resolve);
    if (code != 0) return began(pass, OM_CARD_IDLE, code);
    if (is_stepwise) return began(pass, OM_CARD_ROUTING, 0);
    return began(pass, OM_CARD_RUNNING, queue_layers(pass, pass->at, 1));
}

/* Apply edits while no pass is under way, run a graph behind them unless it is NULL, and wait. */
OM_EXPORT int64_t om_card_run_between(om_device_pass *pass, void *graph) {
    int code = apply(pass);
    if (code == 0 && graph != NULL) code = om_card_run_graph(pass, graph);
    if (code == 0) code = pass->driver->cuStreamSynchronize(pass->session->stream);
    return code == 0 ? 0 : OM_CARD_ERROR(code);
}

/* Sleep through most of the time that a pass is expected to take, then poll the driver. */
static void wait_a_little(const om_device_pass *pass) {
    const double left_s = pass->began_s + NAP_SHARE * pass->expected_s - om_card_seconds();
    if (left_s < SHORTEST_NAP_S) return;
    const struct timespec nap = {0, (long)(1e9 * (left_s < 1e-3 ? left_s : 1e-3))};
    nanosleep(&nap, NULL);
}

static int64_t ended(om_device_pass *pass) {
    const om_card_notice *notice = pass->notice;
    om_host_access(pass->driver, notice, sizeof *notice, OM_HOST_READS);
    om_host_access(pass->driver, pass->options->host_log, pass->steps->log_bytes, OM_HOST_READS);
    if (notice->stop != 0) return pass->at = notice->layer;
    if (pass->state == OM_CARD_RUNNING) pass->expected_s = om_card_seconds() - pass->began_s;
    pass->state = OM_CARD_IDLE, pass->token++;
    return pass->steps->num_layers;
}

/* Wait for what comes next, `limit_s` seconds at most. Returns the number of layers when the pass has ended; a layer that Python
 * is needed for: the pass has stopped there, or, stepwise, experts of the layer are not in RAM; OM_UNDER_WAY; -1 when memory was
 * short; or OM_CARD_ERROR. */
OM_EXPORT int64_t om_card_next(om_device_pass *pass, double limit_s) {
    const double deadline_s = om_card_seconds() + limit_s;
    if (pass->state == OM_CARD_IDLE) return pass->steps->num_layers;
    if (pass->state == OM_CARD_ROUTING || pass->state == OM_CARD_COMPUTING) {
        const int64_t result = om_card_step(pass, deadline_s);
        if (result != OM_UNDER_WAY || pass->state != OM_CARD_ENDING) return result;
    }
    for (;;) {
        const int64_t is_idle = om_card_is_idle(pass);
        if (is_idle != 0) return is_idle < 0 ? is_idle : ended(pass);
        if (om_card_seconds() > deadline_s) return OM_UNDER_WAY;
        wait_a_little(pass);
    }
}

/* Give a pass up: what was queued runs to its end. The next pass has a number of its own, which the card gets with the host's
 * edits, so that nothing in the log is taken for its part. Returns 0 or OM_CARD_ERROR. */
OM_EXPORT int64_t om_card_cancel(om_device_pass *pass) {
    int code = pass->driver->cuCtxSetCurrent(pass->session->context);
    if (code == 0) code = pass->driver->cuStreamSynchronize(pass->session->stream);
    pass->state = OM_CARD_IDLE, pass->notice->stop = 0, pass->token++;
    return code == 0 ? 0 : OM_CARD_ERROR(code);
}

/* The number of the next pass, or of the one that is under way: the log has it. */
OM_EXPORT int32_t om_card_number(const om_device_pass *pass) { return (int32_t)pass->token; }

/* Seconds of the CPU's share of the last pass. */
OM_EXPORT double om_card_cpu_seconds(const om_device_pass *pass) { return pass->cpu_s; }

/* Experts that it has computed, as often as it has read them. */
OM_EXPORT int64_t om_card_num_on_cpu(const om_device_pass *pass) { return pass->num_on_cpu; }
