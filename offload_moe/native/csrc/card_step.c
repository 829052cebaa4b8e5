/* Stepwise: the graphs of a pass one by one. The router's choice comes back through mapped memory, and the CPU computes the
 * missing experts that lie in RAM while the card computes the others. */
#define _GNU_SOURCE
#include "card_pass.h"
#include "float_mode.h"

/* The pairs that the CPU computes at once, as `om_moe_forward` takes them. */
typedef struct {
    int64_t num_experts, keys[OM_CARD_PAIRS];
    const uint8_t *records[OM_CARD_PAIRS];
    int32_t offsets[OM_CARD_PAIRS + 1], row_ids[OM_CARD_PAIRS], out_ids[OM_CARD_PAIRS];
    float weights[OM_CARD_PAIRS];
} share;

static uint32_t stamp_of(const om_device_pass *pass) {
    return pass->token * (uint32_t)pass->steps->num_layers + (uint32_t)pass->at + 1u;
}

static int64_t num_pairs(const om_device_pass *pass) { return pass->num_rows * pass->steps->layers[pass->at].top_k; }

/* The place of pair i's expert among those of its row, ascending. */
static int64_t rank_of(const om_card_notice *notice, int64_t i, int64_t top_k) {
    const int64_t first = i / top_k * top_k;
    int64_t rank = 0;
    for (int64_t k = first; k < first + top_k; k++) rank += notice->ids[k] < notice->ids[i];
    return rank;
}

static void add_pair(const om_device_pass *pass, int64_t i, share *s) {
    const om_card_layer *layer = pass->steps->layers + pass->at;
    const om_card_notice *notice = pass->notice;
    const int32_t n = s->offsets[s->num_experts];
    s->row_ids[n] = (int32_t)(i / layer->top_k);
    s->out_ids[n] = (int32_t)(i / layer->top_k * layer->stride + rank_of(notice, i, layer->top_k));
    s->weights[n] = notice->weights[i] * layer->weight_scale;
    s->offsets[s->num_experts] = n + 1;
}

/* Lease the missing experts that are in RAM and not computed yet. Returns how many pairs are left for Python. */
static int64_t lease_share(om_device_pass *pass, share *s) {
    const om_card_notice *notice = pass->notice;
    om_slot_table *ram = pass->options->ram;
    const int64_t count = num_pairs(pass), first_key = pass->steps->layers[pass->at].first_key;
    int64_t num_left = 0;
    s->num_experts = s->offsets[0] = 0;
    pthread_mutex_lock(&ram->lock);
    for (int64_t i = 0; i < count; i++) {
        if (notice->found[i] == OM_CARD_HIT || pass->is_done[i]) continue;
        const int64_t key = first_key + notice->ids[i];
        if (!om_is_resident(ram, key)) {
            num_left++;
            continue;
        }
        const int64_t n = s->num_experts;
        s->keys[n] = key, s->records[n] = ram->records[key], s->offsets[n + 1] = s->offsets[n];
        ram->leases[key]++;
        s->num_experts++;
        for (int64_t j = i; j < count; j++)
            if (notice->ids[j] == notice->ids[i] && !pass->is_done[j]) {
                add_pair(pass, j, s);
                pass->is_done[j] = 1;
            }
    }
    pthread_mutex_unlock(&ram->lock);
    return num_left;
}

static void release_share(om_slot_table *ram, const share *s) {
    pthread_mutex_lock(&ram->lock);
    for (int64_t n = 0; n < s->num_experts; n++) ram->leases[s->keys[n]]--;
    pthread_mutex_unlock(&ram->lock);
}

static int compute_share(om_device_pass *pass, share *s) {
    const om_card_options *o = pass->options;
    const om_card_layer *layer = pass->steps->layers + pass->at;
    if (s->num_experts == 0) return 0;
    const double began_s = om_card_seconds();
    const int64_t row_bytes = o->hidden * (int64_t)sizeof(float);
    om_host_access(pass->driver, o->host_normed, pass->num_rows * row_bytes, OM_HOST_READS);
    om_host_access(pass->driver, o->host_pairs, pass->num_rows * layer->stride * row_bytes, OM_HOST_WRITES);
    const int64_t num_inputs = layer->scales_inputs ? s->offsets[s->num_experts] : pass->num_rows;
    if (layer->scales_inputs) om_scale_inputs(o->host_normed, o->hidden, s->row_ids, num_inputs, s->weights, s->row_ids, o->scaled);
    const int status = om_moe_forward(layer->moe, layer->scales_inputs ? o->scaled : o->host_normed, num_inputs, OM_F32, s->records,
                                      s->offsets, s->row_ids, s->out_ids, s->weights, s->num_experts, o->host_pairs, OM_F32, 0);
    pass->cpu_s += om_card_seconds() - began_s;
    pass->num_on_cpu += s->num_experts;
    return status;
}

static int has_missing(const om_device_pass *pass) {
    for (int64_t i = 0; i < num_pairs(pass); i++)
        if (pass->notice->found[i] != OM_CARD_HIT) return 1;
    return 0;
}

/* The CPU's part of the layer that is on the card. Returns 0, the layer if Python has to bring experts, or as `om_card_next`. */
static int64_t compute_missing(om_device_pass *pass, int *needs_python) {
    share s;
    const int64_t num_left = lease_share(pass, &s);
    const int status = compute_share(pass, &s);
    release_share(pass->options->ram, &s);
    *needs_python = status == 0 && num_left > 0;
    return status == 0 ? 0 : -1;
}

/* Behind the router: hits on the card. */
static int queue_hits(om_device_pass *pass) {
    __builtin_memset(pass->is_done, 0, sizeof pass->is_done);
    pass->state = OM_CARD_COMPUTING;
    const int code = om_card_run_graph(pass, pass->steps->layers[pass->at].hits);
    if (code == 0) pass->driver->cuStreamQuery(pass->session->stream); /* submits what a driver would batch */
    return code;
}

/* Behind all experts of the layer: the host's rows, and the next layer's attention, or the end. */
static int queue_next(om_device_pass *pass) {
    int code = has_missing(pass) ? om_card_launch_node(pass->session, pass->steps->layers[pass->at].take) : 0;
    pass->state = OM_CARD_ROUTING;
    if (code == 0 && ++pass->at < pass->steps->num_layers) code = om_card_run_graph(pass, pass->steps->layers[pass->at].attend);
    if (code == 0 && pass->at == pass->steps->num_layers) {
        pass->state = OM_CARD_ENDING;
        code = om_card_queue_end(pass);
    }
    return code;
}

/* A layer without a router has been queued as a whole. */
static int skip_dense(om_device_pass *pass) {
    int code = 0;
    while (code == 0 && pass->state == OM_CARD_ROUTING && pass->steps->layers[pass->at].hits == NULL) {
        pass->at++;
        if (pass->at < pass->steps->num_layers) {
            code = om_card_run_graph(pass, pass->steps->layers[pass->at].attend);
        } else {
            pass->state = OM_CARD_ENDING;
            code = om_card_queue_end(pass);
        }
    }
    return code;
}

/* Wait for the router of the layer. 1: it has chosen; 0: not yet; negative: OM_CARD_ERROR. */
static int64_t has_chosen(const om_device_pass *pass) {
    const int64_t is_idle = om_card_is_idle(pass); /* which also submits what a driver would batch */
    /* Acquire: what the card has written before the stamp is read behind it, by processors that reorder loads, too. */
    const uint32_t stamp = __atomic_load_n(&pass->notice->stamp, __ATOMIC_ACQUIRE);
    if (is_idle < 0 || stamp != stamp_of(pass)) return is_idle < 0 ? is_idle : 0;
    om_host_access(pass->driver, (const void *)&pass->notice->stamp, sizeof pass->notice->stamp, OM_HOST_POLLS);
    om_host_access(pass->driver, pass->notice, sizeof *pass->notice, OM_HOST_READS);
    return 1;
}

int64_t om_card_step(om_device_pass *pass, double deadline_s) {
    for (;;) {
        int code = skip_dense(pass), needs_python = 0;
        if (code != 0) return OM_CARD_ERROR(code);
        if (pass->state == OM_CARD_ENDING) return OM_UNDER_WAY;
        if (pass->state == OM_CARD_ROUTING) {
            const int64_t chosen = has_chosen(pass);
            if (chosen < 0) return chosen;
            if (chosen == 0) {
                if (om_card_seconds() > deadline_s) return OM_UNDER_WAY;
                continue;
            }
            if ((code = queue_hits(pass)) != 0) return OM_CARD_ERROR(code);
        }
        const int64_t status = compute_missing(pass, &needs_python);
        if (status != 0) return status;
        if (needs_python) return pass->at;
        if ((code = queue_next(pass)) != 0) return OM_CARD_ERROR(code);
    }
}
