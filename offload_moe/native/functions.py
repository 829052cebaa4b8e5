"""The functions of the native library that Python calls: types of the result and the parameters."""

from ctypes import c_char_p as text
from ctypes import c_double as float64
from ctypes import c_float as float32
from ctypes import c_int as integer
from ctypes import c_int32 as int32
from ctypes import c_int64 as int64
from ctypes import c_uint32 as uint32
from ctypes import c_void_p as pointer
from typing import Any

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "om_select": (integer, text),
    "om_active_name": (text,),
    "om_configure_threads": (integer, integer, integer),
    "om_use_cores": (None, pointer, integer),
    "om_num_threads": (integer,),
    "om_crc32": (uint32, pointer, int64, uint32),
    "om_encode_nf4": (None, pointer, int32, int64, pointer, pointer),
    "om_encode_int8": (None, pointer, int32, int64, pointer, pointer),
    "om_encode_nested": (None, pointer, float32, int64, pointer, pointer),
    "om_repack": (None, pointer, int64, pointer, int32, pointer),
    "om_linear_forward": (integer, *[pointer] * 3, int64, pointer, int64, int32, int32),
    "om_moe_forward": (integer, pointer, pointer, int64, int32, *[pointer] * 5, int64, pointer, int32, int32),
    "om_sum_rows": (None, pointer, int64, int64, pointer, int32),
    "om_attention_step": (integer, *[pointer] * 5, int64, pointer),
    "om_latent_step": (integer, *[pointer] * 5, int64, pointer),
    "om_rms_norm": (None, pointer, pointer, int64, float32, pointer),
    "om_router_step": (integer, *[pointer] * 2, int64, *[pointer] * 3),
    "om_layer_step": (integer, *[pointer] * 5, int64, *[pointer] * 5),
    "om_mlp_forward": (integer, pointer, pointer, int64, int32, pointer, int32),
    "om_add_shared": (integer, *[pointer] * 2, int64, pointer),
    "om_slot_table_open": (pointer, pointer, pointer, pointer),
    "om_slot_table_close": (None, pointer),
    "om_slot_table_resize": (None, pointer, pointer, pointer, int64),
    "om_slot_table_admit": (integer, pointer, int64, int32),
    "om_slot_table_arrived": (None, pointer, int32, pointer),
    "om_slot_table_loaded": (None, pointer, int32, pointer),
    "om_slot_table_vacate": (integer, pointer, int32, int32),
    "om_slot_table_lease": (None, pointer, pointer, int64, pointer),
    "om_slot_table_release": (None, pointer, pointer, int64),
    "om_reads_open": (pointer, pointer, pointer),
    "om_reads_close": (integer, pointer, float64),
    "om_reads_leave": (None, pointer),
    "om_reads_use_file": (integer, pointer, int32, pointer),
    "om_reads_read_with": (None, pointer, pointer),
    "om_reads_submit": (integer, pointer, int64, int32, pointer, integer),
    "om_reads_demand": (None, pointer, int64),
    "om_reads_cancel": (integer, pointer, int64),
    "om_reads_reserve": (None, pointer, int32, pointer),
    "om_reads_need_below": (None, pointer, int32),
    "om_reads_reclaim": (int32, pointer),
    "om_reads_completions": (int64, pointer, pointer, int64),
    "om_reads_wait": (None, pointer, int64, float64),
    "om_reads_wake": (None, pointer),
    "om_reads_attend": (integer, pointer, float64),
    "om_reads_notice": (None, pointer),
    "om_span_pass": (int64, *[pointer] * 3),
    "om_pass_start": (pointer, *[pointer] * 4),
    "om_pass_next": (int64, pointer, int64, float64, pointer),
    "om_pass_end": (None, pointer),
    "om_rank": (None, pointer, pointer),
    "om_driver_open": (pointer, text, pointer, int64),
    "om_driver_close": (None, pointer),
    "om_driver_describe": (None, pointer, int32, pointer, int64),
    "om_card_describe": (integer, pointer, pointer),
}
