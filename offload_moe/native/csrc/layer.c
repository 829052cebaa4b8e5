/* A decode step of one decoder layer up to its experts in one call: norm, attention, residual sum, norm, router.
 *
 * T rows in fp32, each a token: of decode steps, or of a prompt. Each part computes the same as its own call. */
#include "float_mode.h"
#include "job.h"

static void norm_rows(const om_layer *layer, int which, const float *x, int64_t num_rows, float *normed) {
    om_norm(x, layer->norms[which], layer->norm_biases[which], num_rows, layer->hidden, layer->epsilons[which], normed);
}

OM_APART static void add_residual(const om_layer *layer, const float *x, int64_t num_rows, float *residual) {
    for (int64_t i = 0; i < num_rows * layer->hidden; i++) residual[i] = x[i] + layer->residual_scale * residual[i];
}

/* x[T, H] -> residual[T, H] = x + attention, normed[T, H]; and logits, weights, ids as in `om_router_step`. The rooms and the
 * rotary embedding are as in `om_attention_step`, `om_latent_step` or `om_linear_attention_step`. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_layer_step(const om_layer *layer, const float *x, const float *cos, const float *signed_sin,
                            const om_room *rooms, int64_t num_rows, float *residual, float *normed, float *logits,
                            float *weights, int64_t *ids) {
    norm_rows(layer, 0, x, num_rows, normed);
    const int status = layer->linear != NULL
        ? om_linear_attention_step(layer->linear, normed, rooms, num_rows, residual)
        : layer->latent != NULL
        ? om_latent_step(layer->latent, normed, cos, signed_sin, rooms, num_rows, residual)
        : om_attention_step(layer->attention, normed, cos, signed_sin, rooms, num_rows, residual);
    if (status != 0) return -1;
    const uint64_t callers_mode = om_enter_float_mode();
    add_residual(layer, x, num_rows, residual);
    om_restore_float_mode(callers_mode);
    norm_rows(layer, 1, residual, num_rows, normed);
    return layer->router == NULL ? 0 : om_router_step(layer->router, normed, num_rows, logits, weights, ids);
}

/* Route another layer's residual[H] with this layer's norm and router. The rest is as in `om_layer_step`, of one row. */
int om_layer_guess(const om_layer *layer, const float *residual, float *normed, float *logits, float *weights, int64_t *ids) {
    norm_rows(layer, 1, residual, 1, normed);
    return om_router_step(layer->router, normed, 1, logits, weights, ids);
}
