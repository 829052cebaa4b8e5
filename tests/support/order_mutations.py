"""Changes of the CPU's arithmetic: what `scripts/reorder_additions` makes, one at a time.

What a kernel does with the change -> its file, a text that is in it once, and the text in its place.
"""

Change = tuple[str, str, str]

FIRST_BLOCK = "add_block(codec, T, place, tile, b, 1, segment);"
SECOND_BLOCK = "add_block(codec, T, place, tile, b + 1, 0, segment);"
# Of every set's panels.
PANELS: dict[str, Change] = {
    "a product is rounded before it is added": (
        "panel_rows.h",
        "sf_fma(sum, product, *target)",
        "sf_add(sf_mul(sum, product), *target)",
    ),
    "scales are multiplied in another order": (
        "panel_rows.h",
        "*target = is_first && g == 0 ? sf_mul(sum, product)",
        "*target = is_first && g == 0 ? sf_mul(sf_mul(sum, scale), sf_broadcast(scales[g * T + t]))",
    ),
    "the second block of a segment comes first": (
        "panel_rows.h",
        f"{FIRST_BLOCK}\n            {SECOND_BLOCK}",
        f"{FIRST_BLOCK.replace('b, 1', 'b + 1, 1')}\n            {SECOND_BLOCK.replace('b + 1, 0', 'b, 0')}",
    ),
    "a segment has one block": (
        "panel_rows.h",
        SECOND_BLOCK,
        f"add_segment(T, totals, segment);\n            {SECOND_BLOCK.replace('1, 0', '1, 1')}",
    ),
    "a nested scale is rounded before its offset is added": (
        "panel_rows.h",
        "return sf_fma(map, pick_steps(&place->steps, slice, (int)(b % OM_NESTED)), sf_broadcast(",
        "return sf_add(sf_mul(map, pick_steps(&place->steps, slice, (int)(b % OM_NESTED))), sf_broadcast(",
    ),
    "the minima of a superblock are rounded before they are added": (
        "panel_gguf.h",
        "to->least[t] = sf_fma(sf_of_integers(si_add(m0, m1)), scale, to->least[t]);",
        "to->least[t] = sf_add(sf_mul(sf_of_integers(si_add(m0, m1)), scale), to->least[t]);",
    ),
    "the minimum of a block is rounded before it is added": (
        "panel_gguf.h",
        "sf_fma(sf_broadcast((float)wide_sum(part, 0, j, t)), least, *target)",
        "sf_add(sf_mul(sf_broadcast((float)wide_sum(part, 0, j, t)), least), *target)",
    ),
    "an exponential's polynomial is rounded more often": (
        "arithmetic.h",
        "om_fma(p, r * r, r) + 1.0f",
        "p * (r * r) + r + 1.0f",
    ),
    "a group of numbers that are not finite counts as zero": (
        "arithmetic.h",
        "most < OM_SMALLEST_BITS ? 0.0f : om_from_bits(OM_NAN_BITS)",
        "0.0f",
    ),
}
PORTABLE_PANELS: dict[str, Change] = {
    "a product is rounded before it is added": (
        "panel_portable.c",
        "om_fma(sum, scale, segment)",
        "(sum * scale + segment)",
    ),
    "segments are longer": ("panel_portable.c", "group % (2 * OM_GROUPS(codec)) == 0", "group == 0"),
}

VECTORS: dict[str, Change] = {
    "a key's product is rounded before it is added": (
        "attend.h",
        "vec_fma(vec_load(q + h * width + i), row, sums[h * R + r])",
        "vec_add(vec_mul(vec_load(q + h * width + i), row), sums[h * R + r])",
    ),
    "what later tokens alone see is rounded before it is added": (
        "attend.h",
        "vec_fma(weight, load_row(is_bf16, row, w * OM_LANES), tile[h * W + w])",
        "vec_add(vec_mul(weight, load_row(is_bf16, row, w * OM_LANES)), tile[h * W + w])",
    ),
    "values are weighed in shorter tiles": ("attend.h", "OM_TILE_ROWS 64", "OM_TILE_ROWS 32"),
    "a section's values are rounded before they are added": (
        "attend.h",
        "vec_fma(vec_broadcast(factor), vec_load(sums + s * dim + i), vec_load(out + i))",
        "vec_add(vec_mul(vec_broadcast(factor), vec_load(sums + s * dim + i)), vec_load(out + i))",
    ),
    "a sum of products is in one lane more": (
        "sums.h",
        "sum = vec_fma(load_some(a + i, length - i), load_some(b + i, length - i), sum);\n    return vec_sum(sum);",
        "return vec_sum(sum) + vec_sum(vec_mul(load_some(a + i, length - i), load_some(b + i, length - i)));",
    ),
    "a sum is in one lane more": (
        "sums.h",
        "sum = vec_add(sum, load_some(values + i, count - i));\n    return vec_sum(sum);",
        "return vec_sum(sum) + vec_sum(load_some(values + i, count - i));",
    ),
    "a layer norm's mean is summed in one lane": (
        "sums.h",
        "const float mean = sum_of(values, length) / (float)length;",
        "float mean = 0.0f;\n    for (int64_t i = 0; i < length; i++) mean += values[i];\n    mean /= (float)length;",
    ),
    "a layer norm's bias is added before a product is rounded": (
        "sums.h",
        "    rms_norm(result, weight, length, epsilon, result);\n"
        "    for (int64_t i = 0; i < length; i++) result[i] += bias[i];",
        "    const float scale = 1.0f / sqrtf(dot(result, result, length) / (float)length + epsilon);\n"
        "    for (int64_t i = 0; i < length; i++) result[i] = om_fma(result[i] * scale, weight[i], bias[i]);",
    ),
    "a row's product is rounded before it is added": (
        "value_rows.h",
        "upper[t] = vec_fma(vec_load(values[t] + i + OM_LANES), second, upper[t]);",
        "upper[t] = vec_add(vec_mul(vec_load(values[t] + i + OM_LANES), second), upper[t]);",
    ),
    "a tap's product is rounded before it is added": (
        "delta.h",
        "sum = om_fma(weight[t], window[t], sum);",
        "sum += weight[t] * window[t];",
    ),
    "a query's norm is divided twice": (
        "delta.h",
        "scaling / sqrtf(dot(values, values, dim) + 1e-6f)",
        "scaling * (1.0f / sqrtf(dot(values, values, dim) + 1e-6f))",
    ),
    "a logarithm's exponent is added before its polynomial": (
        "arithmetic.h",
        "om_fma(0.693359375f, (float)exponent, m + p)",
        "om_fma(0.693359375f, (float)exponent, m) + p",
    ),
    "a softplus is divided last": ("delta.h", "om_log(u) * (y / (u - 1.0f))", "om_log(u) * y / (u - 1.0f)"),
    "what a state holds for a key is rounded before it is added": (
        "delta.h",
        "sums[w] = vec_fma(faded, key, sums[w]);",
        "sums[w] = vec_add(vec_mul(faded, key), sums[w]);",
    ),
    "what a state takes up is rounded before it is added": (
        "delta.h",
        "vec_fma(change[w], key, vec_load(row + w * OM_LANES))",
        "vec_add(vec_mul(change[w], key), vec_load(row + w * OM_LANES))",
    ),
    "what a query reads is rounded before it is added": (
        "delta.h",
        "sums[w] = vec_fma(changed, query, sums[w]);",
        "sums[w] = vec_add(vec_mul(changed, query), sums[w]);",
    ),
    "an exponential's polynomial is rounded more often": PANELS["an exponential's polynomial is rounded more often"],
}
PORTABLE_VECTORS: dict[str, Change] = {
    "lanes are added in another order": (
        "vector_portable.c",
        "v.lane[j] += v.lane[j + count];",
        "v.lane[j] = v.lane[2 * j] + v.lane[2 * j + 1];",
    ),
    "a product is rounded before it is added": (
        "vector_portable.c",
        "om_fma(a.lane[j], b.lane[j], c.lane[j])",
        "(a.lane[j] * b.lane[j] + c.lane[j])",
    ),
}

# Of what all sets share, each with a file of tests and the part of a name of those that notice it.
SHARED: dict[str, tuple[Change, tuple[str, str]]] = {
    "experts are added in descending order": (
        (
            "panel_moe.c",
            "for (int64_t i = 0; i < job->num_segments; i++) second_segment(",
            "for (int64_t i = job->num_segments; i-- > 0;) second_segment(",
        ),
        ("tests/unit/test_panel_experts.py", "arrive"),
    ),
    "an expert's product is not rounded before it is added": (
        ("panel_moe.c", "out[r] += weight * values[r];", "out[r] = __builtin_fmaf(weight, values[r], out[r]);"),
        ("tests/unit/test_panel_experts.py", "arrive"),
    ),
    "experts that were late are added in descending order": (
        (
            "moe.c",
            "sums[c] += pairs[r * num_columns + c];",
            "sums[c] += pairs[(num_rows - 1 - r) * num_columns + c];",
        ),
        ("tests/unit/test_panel_experts.py", "arrive"),
    ),
    "a router's shares are divided one by one": (
        ("router.c", "values[i] *= share;", "values[i] /= 1.0f / share;"),
        ("tests/unit/test_vectors.py", "router"),
    ),
    "chosen sigmoids are added from the last one on": (
        (
            "router.c",
            "for (int64_t k = 0; k < router->top_k; k++) chosen += weights[k];",
            "for (int64_t k = router->top_k; k-- > 0;) chosen += weights[k];",
        ),
        ("tests/unit/test_vectors.py", "router"),
    ),
    "a shared expert's product is not rounded before it is added": (
        (
            "mlp.c",
            "((float *)job->out)[i] += job->weights[t] * ((const float *)job->results)[i];",
            "((float *)job->out)[i] = "
            "__builtin_fmaf(job->weights[t], ((float *)job->results)[i], ((float *)job->out)[i]);",
        ),
        ("tests/unit/test_native_span.py", "shared"),
    ),
    "what attention gives is not rounded before it is added": (
        (
            "layer.c",
            "x[i] + layer->residual_scale * residual[i]",
            "__builtin_fmaf(layer->residual_scale, residual[i], x[i])",
        ),
        ("tests/unit/test_native_span.py", "without_a_router"),
    ),
    "what experts give is not rounded before it is added": (
        (
            "span.c",
            "rows->residual[i] + layer->layer->residual_scale * rows->x[i]",
            "__builtin_fmaf(layer->layer->residual_scale, rows->x[i], rows->residual[i])",
        ),
        ("tests/unit/test_native_span.py", "a_run_is_its_layers"),
    ),
}
